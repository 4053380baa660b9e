"""Timing of the backends for given calls: each checked first, none left out without a reason."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ipn_core.attention.choice import Case
from ipn_core.attention.dispatch import backends_for, get_backend
from ipn_core.attention.drawing import draw, label
from ipn_core.attention.exact import call, exact, largest_difference, results
from ipn_core.benchmarking.turns import turns
from ipn_core.errors import IPNError

if TYPE_CHECKING:
    from ipn_core.benchmarking import Row

__all__ = [
    "TOLERANCE",
    "Timing",
    "Trial",
    "in_turn",
    "measure",
    "peak_of",
    "seconds_of",
]

TOLERANCE = {
    "float64": 1e-10,
    "float32": 1e-3,  # CUDA may be set to multiply in TF32
    "float16": 5e-3,
    "bfloat16": 4e-2,
}
"""How far a backend may be from double precision, relative to the largest value."""

SAMPLE_S = 0.002
"""What one sample of a timing takes at least, so that the clock's own error does not count."""
WARM_S = 0.01
"""A call that takes less is run once before each sample, untimed: what another backend left in the
caches slows it by more than backends that are alike differ."""
LONG_S = 0.1
SAMPLES = (5, 200)
"""How many samples a row gets at least and at most."""
MAP_BYTES = 2 << 30
"""What the map of a call may take on a CPU, in float32, for a backend that holds all of it: a CPU
that runs out of memory ends the program, where a GPU says so."""

Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Timing:
    """What one backend did with one case.

    Attributes:
        case: the call.
        backend: its name.
        reasons: why it was not timed, empty if it was.
        error: largest difference from double precision, of the result and of the gradients, each
            relative to the largest value; None if it never ran.
        failed: whether it took the call and then broke, or gave something wrong.
        seconds: of one call, with all that `attend` does around it; a number a sample.
        peak_bytes: what a call holds at most beyond its inputs, None where nobody counts it.
    """

    case: Case
    backend: str
    reasons: tuple[str, ...] = ()
    error: float | None = None
    failed: bool = False
    seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None

    def to_row(self) -> Row:
        """Return the row of a benchmark; its interval is of the median."""
        from ipn_core.benchmarking import Row

        name = f"{label(self.case)} / {self.backend}"
        what = {**self.case._asdict(), "backend": self.backend}
        if not self.seconds:
            return Row.refused(name, self.reasons or ("it was not timed",), what, error=self.error)
        more = {} if self.peak_bytes is None else {"peak_bytes": float(self.peak_bytes)}
        return Row.of(name, self.seconds, what, error=self.error, more=more)


class Trial:
    """One case, drawn, with every backend checked for it: to be timed, and its memory counted.

    Args:
        case: the call.
        device: where it runs.
        names: the backends, by default every one that is registered.

    Attributes:
        inputs: the call.
        checked: a timing without seconds for each backend, by name.
    """

    def __init__(
        self, case: Case, device: torch.device, names: Iterable[str] | None = None
    ) -> None:
        self.case = case
        self.device = device
        self.inputs = draw(case, device)
        self._exact: list[torch.Tensor] | None = None
        against = backends_for(self.inputs)
        wanted = sorted(against) if names is None else list(names)
        self.checked = {name: self._check(name, against[name]) for name in wanted}
        self._exact = None  # it is large

    def _check(self, name: str, reasons: list[str]) -> Timing:
        """Run a backend once and hold it against double precision."""
        reasons = reasons or self._too_large(name)
        if reasons:
            return Timing(self.case, name, tuple(reasons))
        try:
            if self._exact is None:
                self._exact = exact(self.inputs)
            error = largest_difference(results(self.inputs, name), self._exact)
        except (IPNError, RuntimeError) as failure:
            reasons = [" ".join(str(failure).split())]
            full = isinstance(failure.__cause__ or failure, torch.OutOfMemoryError)
            return Timing(self.case, name, tuple(reasons), failed=not full)
        limit = TOLERANCE[self.case.dtype]
        if error <= limit:
            return Timing(self.case, name, error=error)
        wrong = f"is off by {error:.2g}, more than {limit:g} of the largest"
        known = error if error < float("inf") else None
        return Timing(self.case, name, (wrong,), known, failed=True)

    def _too_large(self, name: str) -> list[str]:
        B, H, M, N = self.inputs.shape
        size = 4 * B * H * M * N
        if self.device.type != "cpu" or size <= MAP_BYTES:
            return []
        if not get_backend(name).holds_map(self.inputs):
            return []
        return [f"holds the whole map, {size / 1e9:.1f} GB here, more than {MAP_BYTES / 1e9:.1f}"]

    def task(self, name: str) -> Callable[[], Any]:
        """Return what is timed: a call, with a backward pass if it wants gradients.

        Args:
            name: a backend that was found right, or "auto".
        """
        inputs = self.inputs
        if not inputs.q.requires_grad:
            return torch.no_grad()(lambda: call(inputs, name))
        leaves = (inputs.q, inputs.k, inputs.v)
        ones = torch.ones_like(call(inputs, name))
        return lambda: torch.autograd.grad(call(inputs, name), leaves, ones)

    def time(
        self,
        seconds: float,
        also: Sequence[str] = (),
        only: Sequence[str] | None = None,
        seed: int = 0,
    ) -> list[Timing]:
        """Time the backends that were found right, in turn.

        Args:
            seconds: about how long each is timed.
            also: further names to time with them, such as "auto".
            only: of the backends, these; all by default.
            seed: of the order of the turns.

        Returns:
            A timing for each of them; those that were not timed have the reasons.
        """
        asked = [t for name, t in self.checked.items() if only is None or name in only]
        timings = [*asked, *(Timing(self.case, name) for name in also)]
        tasks = {t.backend: self.task(t.backend) for t in timings if not t.reasons}
        times = in_turn(tasks, self.device, seconds, seed)
        return [
            replace(
                t,
                seconds=tuple(times[t.backend]),
                peak_bytes=peak_of(tasks[t.backend], self.device),
            )
            if t.backend in tasks
            else t
            for t in timings
        ]


def measure(
    cases: Sequence[Case],
    device: torch.device,
    *,
    seconds: float = 0.2,
    report: Report | None = None,
) -> list[Timing]:
    """Time every backend for every case.

    The backends of a case take turns, so that whatever else the machine does meets all alike.

    Args:
        cases: the calls.
        device: where they run.
        seconds: about how long each backend of a case is timed.
        report: is told (done, total) cases.

    Returns:
        A timing for each case and backend; one that refuses, fails or is wrong has the reasons.
    """
    timings: list[Timing] = []
    for index, case in enumerate(cases):
        timings += Trial(case, device).time(seconds)
        if report is not None:
            report(index + 1, len(cases))
    return timings


def in_turn(
    tasks: dict[str, Callable[[], Any]], device: torch.device, seconds: float, seed: int = 0
) -> dict[str, list[float]]:
    """Return samples of the seconds of a call.

    The i-th sample of each was taken in the same turn, and each turn has its own order.

    Args:
        tasks: by name.
        device: where they run; on CUDA they are timed by its events.
        seconds: about how long the slowest is timed.
        seed: of the orders.
    """
    inner, warm, least = {}, {}, 0.0
    for name, task in tasks.items():
        once = seconds_of(task, 1, device)
        if once < LONG_S:  # of a longer call, the first one is not so much longer than others
            once = min(seconds_of(task, 1, device) for _ in range(3))
        inner[name] = max(1, min(1000, round(SAMPLE_S / max(once, 1e-9))))
        warm[name] = once < WARM_S
        least = max(least, (inner[name] + warm[name]) * once)
    low, high = SAMPLES
    count = max(low, min(high, round(seconds / least))) if tasks else 0
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for order in turns(list(tasks), count, seed):
        for name in order:
            if warm[name]:
                tasks[name]()
            times[name].append(seconds_of(tasks[name], inner[name], device))
    return times


def seconds_of(task: Callable[[], Any], times: int, device: torch.device) -> float:
    """Return the seconds of one of so many calls."""
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(times):
            task()
        return (time.perf_counter() - began) / times
    with torch.cuda.device(device):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(times):
            task()
        last.record()
        last.synchronize()
    return float(first.elapsed_time(last)) / 1000 / times


def peak_of(task: Callable[[], Any], device: torch.device) -> int | None:
    """Return the bytes that a call holds at most beyond what was there, None but on CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    task()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)
