"""RVII and every strategy of the catalogue as modules, each beside the class of a library.

Ours and the library's are of the same size and read the same (`modules.py`); each is held against
itself in double precision with attention written out, result and gradients. Both are timed in turn,
on CUDA by its events, and their ratio is a row; where no library has such a class, a row says so.

    .venv/bin/python -m pytest benchmarks/bench_modules.py -m "not gpu" [--grid short|usual|full]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.grids import Grid
from benchmarks.modules import ENTRIES, SIZES, Entry, Seen, Subject, see
from benchmarks.replay import recorded, replay
from benchmarks.results import Row
from benchmarks.sections import Book
from ipn_core.attention.exact import largest_difference
from ipn_core.attention.timing import in_turn, peak_of

OURS, THEIRS, RATIO = "ours", "theirs", "ours over theirs"
NAMES = (OURS, THEIRS, RATIO)
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1, "float16": 2e-2}
"""How far a module may be from double precision, of the largest value."""
LIGHT = ("film", "gated-xattn", "lmeye", "rvii", "static", "zoom")
"""Of fewer than ten million weights: what a CPU is asked in batches, too."""


class Case(NamedTuple):
    """What is timed: `grad` is with a backward pass to all weights."""

    strategy: str
    size: str
    batch: int
    dtype: str
    grad: bool

    @property
    def label(self) -> str:
        """A short name."""
        passes = "forward+backward" if self.grad else "forward"
        return f"{self.strategy} {self.size} b{self.batch} {self.dtype} {passes}"


def _usual() -> list[Case]:
    alone = [Case(s, "starter", 1, "float32", g) for s, g in product(ENTRIES, (False, True))]
    return alone + [Case(s, "starter", 8, "float32", False) for s in LIGHT]


def _full() -> list[Case]:
    batches, dtypes = (1, 8, 64), ("float32", "bfloat16", "float16")
    return [Case(*one) for one in product(ENTRIES, SIZES, batches, dtypes, (False, True))]


LEVELS: dict[str, Callable[[], list[Case]]] = {
    "short": lambda: [Case(s, "starter", 1, "float32", False) for s in ("film", "rvii", "static")],
    "usual": _usual,
    "full": _full,
}
NOTES = {
    "short": "A few of them, to see that it works; `--grid usual` has all.",
    "usual": (
        "At the sizes of the starter (64 patches 1,280 wide, an LLM 576 wide), float32: each for "
        "one picture, and those of fewer than ten million weights for eight; `--grid full` adds "
        "the sizes of LLaVA-1.5-7B (576 patches, 4,096 wide), batch 64 and half precision."
    ),
    "full": "At the sizes of the starter and of LLaVA-1.5-7B.",
}


# -- what is timed ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One of a pair: the task that is timed, or why it is not; `failed` if it should have been."""

    task: Callable[[], Any] | None
    reasons: tuple[str, ...] = ()
    error: float | None = None
    failed: bool = False


def setup_pair(case: Case, device: torch.device) -> dict[str, Run]:
    """Build ours and theirs and hold both against double precision; for time and memory alike."""
    entry, size = ENTRIES[case.strategy], SIZES[case.size]
    builders: dict[str, Callable[[str], Subject] | None] = {
        OURS: lambda attention: entry.ours(size, "eager" if attention == "eager" else "auto"),
        THEIRS: None,
    }
    if entry.theirs is not None:
        theirs = entry.theirs
        builders[THEIRS] = lambda attention: theirs(size, attention)
    dtype: torch.dtype = getattr(torch, case.dtype)
    seen = see(size, case.batch).to(device, dtype)
    return {
        name: Run(None, (entry.original,)) if build is None else _checked(case, entry, build, seen)
        for name, build in builders.items()
    }


def _checked(case: Case, entry: Entry, build: Callable[[str], Subject], seen: Seen) -> Run:
    if entry.is_discrete and case.dtype != "float32":
        return Run(None, ("what it chooses may be another thing in half precision",))
    device, dtype = seen.text.device, seen.text.dtype
    torch.manual_seed(0)
    subject = build("sdpa")
    subject.module.to(device, dtype).eval()
    _open_gates(subject.module)
    try:
        found = results(subject, seen, case.grad)
        exact = build("eager")
        exact.module.to(device, torch.float64).eval().load_state_dict(subject.module.state_dict())
        error = largest_difference(found, results(exact, seen.to(dtype=torch.float64), case.grad))
    except torch.OutOfMemoryError as failure:
        return Run(None, (" ".join(str(failure).split()),))
    limit = TOLERANCE[case.dtype]
    if error > limit:
        wrong = f"is off by {error:.2g}, more than {limit:g} of the largest"
        return Run(None, (wrong,), error if error < float("inf") else None, failed=True)
    return Run(task(subject, seen, case.grad), error=error)


@torch.no_grad()
def _open_gates(module: torch.nn.Module) -> None:
    """Let blocks that begin closed compute something."""
    for name, parameter in module.named_parameters():
        if name.endswith("_gate"):
            parameter.fill_(0.5)


def results(subject: Subject, seen: Seen, grad: bool) -> list[Tensor]:
    """Return the result, and with gradients those of all weights, as one tensor."""
    if not grad:
        with torch.no_grad():
            return [subject(seen)]
    out = subject(seen)
    weights = torch.linspace(0, 1, out.numel(), device=out.device, dtype=torch.float64)
    start = weights.reshape(out.shape).to(seen.request.dtype).to(out.dtype)
    grads = torch.autograd.grad(out, learned(subject), start, materialize_grads=True)
    return [out.detach(), torch.cat([g.flatten() for g in grads])]


def learned(subject: Subject) -> list[Tensor]:
    """Return the weights of a module, but for those of an encoder that it holds."""
    parameters = subject.module.named_parameters()
    return [p for name, p in parameters if not name.startswith("encoder.")]


def task(subject: Subject, seen: Seen, grad: bool) -> Callable[[], Any]:
    """Return what is timed."""
    if not grad:
        return torch.no_grad()(lambda: subject(seen))
    weights = learned(subject)
    return lambda: torch.autograd.grad(subject(seen).sum(), weights, allow_unused=True)


@dataclass
class Pair:
    """The rows of a case, and samples of what was timed."""

    rows: dict[str, Row]
    runs: dict[str, Run]
    samples: dict[str, list[float]]


def measure(case: Case, device: torch.device, seconds: float) -> Pair:
    """Check and time ours and theirs."""
    runs = setup_pair(case, device)
    tasks = {name: run.task for name, run in runs.items() if run.task is not None}
    samples = in_turn(tasks, device, seconds)
    rows = {}
    for name, run in runs.items():
        what = {**case._asdict(), "of": name, "class": _class_of(case, name)}
        title = f"{case.label} / {name}"
        if name not in tasks:
            rows[name] = Row.refused(title, run.reasons, what, error=run.error)
            continue
        peak = peak_of(tasks[name], device)
        more = {} if peak is None else {"peak_bytes": float(peak)}
        rows[name] = Row.of(title, samples[name], what, error=run.error, more=more)
    title = f"{case.label} / {RATIO}"
    if len(tasks) < 2:
        without = [r for run in runs.values() for r in run.reasons]
        rows[RATIO] = Row.refused(title, without, case._asdict(), unit="ratio")
    else:
        ratios = [a / b for a, b in zip(samples[OURS], samples[THEIRS], strict=True)]
        rows[RATIO] = Row.of(title, ratios, case._asdict(), unit="ratio")
    return Pair(rows, runs, samples)


def _class_of(case: Case, name: str) -> str | None:
    entry = ENTRIES[case.strategy]
    if name == OURS:
        return entry.name
    return entry.original if entry.theirs is not None else None


# -- the rows --------------------------------------------------------------------------------------


GRID = Grid[Case, Pair](
    section="modules",
    levels=LEVELS,
    notes=NOTES,
    names=NAMES,
    label=lambda case: case.label,
    measure=lambda case, device, seconds: measure(case, device, seconds),
    seconds={"cpu": 0.5, "cuda": 0.05},
)
pytest_generate_tests = GRID.parametrize


@pytest.fixture(scope="module")
def entered(request: pytest.FixtureRequest, book: Book) -> Iterator[Book]:
    """The book, open for these rows."""
    GRID.open(book, request.config)
    yield book
    GRID.close()


@pytest.mark.benchmark(timer=recorded)
def test_module(
    device: torch.device,
    case: Case,
    name: str,
    entered: Book,
    request: pytest.FixtureRequest,
) -> None:
    pair = GRID.get(request.config, case, device)
    row = pair.rows[name]
    entered.enter(GRID.section, device.type, row)
    if row.reasons:
        if name != RATIO and pair.runs[name].failed:
            pytest.fail(f"{row.name}: {'; '.join(row.reasons)}", pytrace=False)
        pytest.skip("; ".join(row.reasons))
    if name != RATIO:
        benchmark = request.getfixturevalue("benchmark")
        replay(benchmark, pair.samples[name], case.label, error=row.error)
