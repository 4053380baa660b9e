"""Timing of the backends for given calls: each checked first, none left out without a reason."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ipn_core.attention.choice import Case
from ipn_core.attention.dispatch import AUTO, attend, backends_for
from ipn_core.attention.inputs import AttentionInputs
from ipn_core.errors import IPNError

__all__ = ["TOLERANCE", "Row", "default_cases", "draw", "fastest", "measure"]

TOLERANCE = {
    "float64": 1e-10,
    "float32": 1e-3,  # CUDA may be set to multiply in TF32
    "float16": 5e-3,
    "bfloat16": 4e-2,
}
"""How far a backend may be from double precision, relative to the largest value."""

NEAR = 1.02
"""A backend that `auto` tries anyway wins unless another one takes this much less: it never refuses
what it was not timed for."""

SAMPLE_S = 0.002
"""What one sample of a timing takes at least, so that the clock's own error does not count."""
SAMPLES = (5, 200)
"""How many samples a row gets at least and at most."""

Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Row:
    """What one backend did with one case.

    Attributes:
        case: the call.
        backend: its name.
        reasons: why it was not timed, empty if it was.
        error: largest difference from double precision, of the result and of the gradients, each
            relative to the largest value; None if it never ran.
        median_s, p20_s, p80_s: seconds of one call, with all that `attend` does around it.
        samples: how many these are taken from.
    """

    case: Case
    backend: str
    reasons: tuple[str, ...] = ()
    error: float | None = None
    median_s: float | None = None
    p20_s: float | None = None
    p80_s: float | None = None
    samples: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain values."""
        return {
            **self.case._asdict(),
            "backend": self.backend,
            "reasons": list(self.reasons),
            "error": self.error,
            "median_s": self.median_s,
            "p20_s": self.p20_s,
            "p80_s": self.p80_s,
            "samples": self.samples,
        }


def default_cases(device: torch.device) -> list[Case]:
    """Return what the starter calls: its five tokens among themselves, and looking at 64 patches.

    Once for a question, and for a batch of 32 with a backward pass as in training.
    """
    dtypes = ("float32",) if device.type == "cpu" else ("bfloat16", "float32")
    return [
        Case(batch, 5, keys, 8, 8, 32, 32, dtype, masking, grad)
        for dtype in dtypes
        for batch, grad in ((1, False), (32, True))
        for keys, masking in ((5, "none"), (64, "bias"))
    ]


def draw(case: Case, device: torch.device, seed: int = 0) -> AttentionInputs:
    """Draw a call of a case, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    dtype: torch.dtype = getattr(torch, case.dtype)
    parts = case.masking.split("+")
    packed = "packed" in parts
    B = 1 if packed else case.batch
    M, N, H = case.queries, case.keys, case.heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    q = normal(B, M, H, case.head_dim)
    k = normal(B, N, case.kv_heads, case.head_dim)
    v = normal(B, N, case.kv_heads, case.value_dim)
    more: dict[str, Any] = {}
    if "mask" in parts:
        mask = torch.rand(B, N, generator=generator) > 0.25
        mask[:, 0] = True
        more["mask"] = mask.to(device)
    if "bias" in parts:
        more["bias"] = normal(B, H, 1, N)
    if "lengths" in parts:
        more["lengths"] = [max(N - 1 - i * N // (2 * B), 0) for i in range(B)]
    if packed:
        more["query_lengths"] = _ragged(M, case.batch)
        more["lengths"] = _ragged(N, case.batch)
    q, k, v = (t.requires_grad_(case.grad) for t in (q, k, v))
    return AttentionInputs.make(q, k, v, **more)


def _ragged(total: int, parts: int) -> list[int]:
    """Share a total out, neighbours by as much more and less."""
    sizes = [total // parts + (i < total % parts) for i in range(parts)]
    shift = total // parts // 4
    for i in range(0, parts - 1, 2):
        sizes[i], sizes[i + 1] = sizes[i] + shift, sizes[i + 1] - shift
    return sizes


def measure(
    cases: Sequence[Case],
    device: torch.device,
    *,
    seconds: float = 0.2,
    report: Report | None = None,
) -> list[Row]:
    """Time every backend for every case.

    The backends of a case take turns, so that whatever else the machine does meets all alike.

    Args:
        cases: the calls.
        device: where they run.
        seconds: about how long each backend of a case is timed.
        report: is told (done, total) cases.

    Returns:
        A row for each case and backend; one that refuses, fails or is wrong has the reasons.
    """
    rows: list[Row] = []
    for index, case in enumerate(cases):
        inputs = draw(case, device)
        exact = _results(inputs, "eager", exact=True)
        checked = [
            _check(case, inputs, exact, *one) for one in sorted(backends_for(inputs).items())
        ]
        tasks = {row.backend: _task(inputs, row.backend) for row in checked if not row.reasons}
        times = _in_turn(tasks, device, seconds)
        rows += [_timed(row, times.get(row.backend, [])) for row in checked]
        if report is not None:
            report(index + 1, len(cases))
    return rows


def fastest(rows: Iterable[Row]) -> dict[Case, str]:
    """Return the winner of each case that any backend was timed for."""
    best: dict[Case, dict[str, float]] = {}
    for row in rows:
        if row.median_s is not None:
            best.setdefault(row.case, {})[row.backend] = row.median_s
    winners = {}
    for case, times in best.items():
        limit = min(times.values()) * NEAR
        usual = [name for name in AUTO if times.get(name, float("inf")) <= limit]
        winners[case] = usual[0] if usual else min(times, key=lambda name: times[name])
    return winners


def _check(
    case: Case, inputs: AttentionInputs, exact: list[Tensor], name: str, reasons: list[str]
) -> Row:
    """Run a backend once and hold it against double precision."""
    if reasons:
        return Row(case, name, tuple(reasons))
    try:
        found = _results(inputs, name)
    except (IPNError, RuntimeError) as failure:
        return Row(case, name, (" ".join(str(failure).split()),))
    error = max(_off(mine, true) for mine, true in zip(found, exact, strict=True))
    limit = TOLERANCE[case.dtype]
    wrong = (
        () if error <= limit else (f"is off by {error:.2g}, more than {limit:g} of the largest",)
    )
    return Row(case, name, wrong, error)


def _off(found: Tensor, exact: Tensor) -> float:
    largest = max(float(exact.abs().max()), 1e-3)
    error = float((found.double() - exact).abs().max()) / largest
    return error if error == error else float("inf")


def _results(inputs: AttentionInputs, name: str, exact: bool = False) -> list[Tensor]:
    """Return the result, and with gradients those of q, k and v too."""
    if exact:
        q, k, v = (
            t.detach().double().requires_grad_(t.requires_grad)
            for t in (inputs.q, inputs.k, inputs.v)
        )
        inputs = replace(inputs, q=q, k=k, v=v)
    with torch.set_grad_enabled(inputs.q.requires_grad):
        out = _attend(inputs, name)
    if not inputs.q.requires_grad:
        return [out]
    ones = torch.linspace(0, 1, out.numel(), device=out.device).reshape(out.shape).to(out.dtype)
    leaves = (inputs.q, inputs.k, inputs.v)
    # A gradient that is missing counts as zero, which is wrong like any other number.
    grads = torch.autograd.grad(out, leaves, ones, materialize_grads=True)
    return [out.detach(), *grads]


def _attend(inputs: AttentionInputs, name: str) -> Tensor:
    return attend(
        inputs.q,
        inputs.k,
        inputs.v,
        mask=inputs.mask,
        bias=inputs.bias,
        lengths=inputs.lengths,
        query_lengths=inputs.query_lengths,
        backend=name,
    )


def _task(inputs: AttentionInputs, name: str) -> Callable[[], Any]:
    """Return what is timed: a call, with a backward pass if it wants gradients."""
    if not inputs.q.requires_grad:
        return torch.no_grad()(lambda: _attend(inputs, name))
    leaves = (inputs.q, inputs.k, inputs.v)
    ones = torch.ones_like(_attend(inputs, name))
    return lambda: torch.autograd.grad(_attend(inputs, name), leaves, ones)


def _in_turn(
    tasks: dict[str, Callable[[], Any]], device: torch.device, seconds: float
) -> dict[str, list[float]]:
    """Return samples of the seconds of a call; none is always the one after the same other."""
    inner, least = {}, 0.0
    for name, task in tasks.items():
        _clock(task, 1, device)
        once = min(_clock(task, 1, device) for _ in range(3))
        inner[name] = max(1, min(1000, round(SAMPLE_S / max(once, 1e-9))))
        least = max(least, inner[name] * once)
    low, high = SAMPLES
    count = max(low, min(high, round(seconds / least))) if tasks else 0
    times: dict[str, list[float]] = {name: [] for name in tasks}
    names = list(tasks)
    for turn in range(count):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            times[name].append(_clock(tasks[name], inner[name], device))
    return times


def _clock(task: Callable[[], Any], times: int, device: torch.device) -> float:
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


def _timed(row: Row, times: list[float]) -> Row:
    if not times:
        return row
    low, *_, high = statistics.quantiles(times, n=5, method="inclusive")
    middle = statistics.median(times)
    return replace(row, median_s=middle, p20_s=low, p80_s=high, samples=len(times))
