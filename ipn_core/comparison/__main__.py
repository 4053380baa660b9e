"""Run one job: `python -m ipn_core.comparison JOB.json`."""

from __future__ import annotations

import sys
from pathlib import Path

from ipn_core.comparison.job import Job, run_job_in_own_process

if __name__ == "__main__":
    run_job_in_own_process(Job.read(Path(sys.argv[1])))
