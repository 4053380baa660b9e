"""Write an IPN task into a folder for lmms-eval: `python -m ipn_lmms_eval TASK FOLDER`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ipn_core.cli.loading import check_folder
from ipn_core.errors import IPNError
from ipn_lmms_eval.local import write_task


def main() -> None:
    """Read the command line, write the task, and print its name."""
    parser = argparse.ArgumentParser(prog="python -m ipn_lmms_eval", description=__doc__)
    parser.add_argument("task", metavar="TASK|FILE.jsonl", help="A task of 'ipn plugins'.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="Where to write it.")
    parser.add_argument("--split", help="A split of the task; its test split otherwise.")
    parser.add_argument("--limit", type=int, metavar="N", help="Only the first N questions.")
    given = parser.parse_args()
    try:
        check_folder("FOLDER", given.folder)
        print(write_task(given.task, given.folder, split=given.split, limit=given.limit))
    except IPNError as error:
        print(f"ipn_lmms_eval: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
