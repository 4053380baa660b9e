"""Processes that are killed, and started again, until they are let to end."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable, Sequence

PACE = "IPN_LESSON_PACE"  # seconds that a lesson waits before each optimizer step
LIMIT = 300.0  # seconds without any progress after which something hangs


def run_killed(
    command: Sequence[str], progress: Callable[[], object], kills: int, seed: int = 0
) -> None:
    """Kill a command (`kill -9`) at random moments, starting it again each time; then let it end.

    Every third kill strikes while the process still starts up or reads; the others strike a moment
    after it has saved something, however slow the machine is, so that the whole always ends.

    Args:
        command: goes on from what it finds.
        progress: what it has saved so far, in any form that compares.
        kills: how often. It must have enough to do that it is not done earlier.
        seed: of the moments.
    """
    rng = random.Random(seed)
    environment = {**os.environ, PACE: "0.2"}
    for number in range(kills):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)
        before, started = progress(), time.monotonic()
        if number % 3 == 0:
            time.sleep(rng.uniform(0.2, 4.0))
        else:
            while progress() == before and process.poll() is None:
                assert time.monotonic() - started < LIMIT, "nothing is saved"
                time.sleep(0.005)
            time.sleep(rng.uniform(0.0, 0.3))
        ended = process.poll()
        process.kill()
        _, errors = process.communicate()
        assert ended is None, f"ended by itself, after {number} kills: {ended}\n{errors.decode()}"
    done = subprocess.run(command, capture_output=True, check=False, timeout=LIMIT)
    assert done.returncode == 0, done.stderr.decode()
