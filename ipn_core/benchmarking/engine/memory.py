"""Peak memory while answering, against the number of a picture's patches.

Measured in a process of its own, by the high-water mark that Linux keeps of it and that is reset
before each size; on CUDA, by that of torch's allocator.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ipn_core.attention.timing import peak_of
from ipn_core.benchmarking.engine.table import Found
from ipn_core.benchmarking.rows import Row

if TYPE_CHECKING:
    from ipn_core.benchmarking.engine.table import Session

__all__ = ["growth", "measure", "peaks", "slope"]

SIDES = (8, 16, 32, 64, 128)
"""Of the grids of patches: 64 to 16,384."""
NEW = 4
GOAL = 1.2
"""How much more a patch may take among many than among few: 1 is linear, 4 is quadratic."""
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def measure(session: Session) -> Found:
    """Measure in a process of its own."""
    row = "memory"
    title = f"peak memory while answering, {SIDES[0] ** 2} to {SIDES[-1] ** 2:,} patches"
    if session.device.type == "cpu" and not RESET.exists():
        why = "needs Linux, whose high-water mark of a process can be reset"
        return Found(row, title, [Row.refused(f"{row}/bytes a patch", [why], unit="bytes")])
    count = session.repeats(2, 1)
    found = [_in_a_process(session.device) for _ in range(count)]
    rows = [
        Row.of(f"{row}/{side**2:,} patches", [one[at] for one in found], unit="bytes")
        for at, side in enumerate(SIDES)
    ]
    grown = [growth(one) for one in found]
    return Found(
        row,
        title,
        [
            *rows,
            Row.of(f"{row}/bytes a patch", [slope(one) for one in found], unit="bytes"),
            Row.of(f"{row}/a patch among many : among few", grown, unit="ratio", goal=GOAL),
        ],
        notes=[
            "what was held before the picture's features were made is left out; a patch's "
            "own features are 5,120 bytes of what it takes",
            "bytes a patch: the slope of a line through all sizes; among many: from the last size "
            "but one to the last, among few: from the one before",
        ],
    )


def slope(bytes_of: Sequence[float]) -> float:
    """Return the slope of the least-squares line through the sizes, in bytes a patch."""
    patches = torch.tensor([float(side**2) for side in SIDES], dtype=torch.float64)
    values = torch.tensor(list(bytes_of), dtype=torch.float64)
    off = patches - patches.mean()
    return float((off * (values - values.mean())).sum() / (off * off).sum())


def growth(bytes_of: Sequence[float]) -> float:
    """Return how many times as much a patch takes between the last two sizes as before them."""
    sizes = [side**2 for side in SIDES]
    last = (bytes_of[-1] - bytes_of[-2]) / (sizes[-1] - sizes[-2])
    before = (bytes_of[-2] - bytes_of[-3]) / (sizes[-2] - sizes[-3])
    return last / before


def _in_a_process(device: torch.device) -> list[int]:
    # What is freed goes back to the system at once, so that the mark is of what is held.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    words = ("-m", "ipn_core.benchmarking.engine.memory", str(torch.get_num_threads()), str(device))
    done = subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, check=True
    )
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found


def peaks(device: torch.device) -> list[int]:
    """Return for each size how many bytes more are held at the peak of an answer than before.

    Args:
        device: whose memory it is: the process's, or that of torch's allocator on CUDA.
    """
    from ipn_core.benchmarking.engine import subjects
    from ipn_core.clock import Clock
    from ipn_core.generate import decode
    from ipn_core.prompt import Prompt

    llm, _ = subjects.backbone(device)
    model = subjects.asking_model(llm)
    prompt = Prompt.ask("Is there a dog?", ["the picture"])

    @torch.no_grad()
    def answer(side: int) -> None:
        features = subjects.features_of(1, llm.device, (side, side))
        plans = [model.planner.plan(prompt)]
        percept = model.perceive([], [prompt.question], features)
        decode(model, plans, percept, {"max_new_tokens": NEW}, Clock(llm.device))

    # The first once more: whatever is made once is made there.
    return [_peak(partial(answer, side), device) for side in (SIDES[0], *SIDES)][1:]


def _peak(task: Callable[[], object], device: torch.device) -> int:
    """Return how many bytes a task holds at most beyond what was held before."""
    counted = peak_of(task, device)
    if counted is not None:
        return counted
    RESET.write_text("5")
    before = _kilobytes("VmRSS")
    task()
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(what: str) -> int:
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps(peaks(torch.device(sys.argv[2]))))
