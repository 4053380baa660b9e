"""The benchmarks of many rows: which there are, how they are measured, and when they are kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from catalogue import CATALOGUE

from ipn_core.attention.choice import Case
from ipn_core.attention.drawing import label
from ipn_core.benchmarking import Results, Row

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("own_table")


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def asked(**options: Any) -> Any:
    """A pytest config with these options and none other."""
    return SimpleNamespace(getoption=lambda name: options.get(name.lstrip("-").replace("-", "_")))


# -- which rows there are --------------------------------------------------------------------------


def test_the_grid_of_attention_is_the_whole_product_and_a_cpu_gets_a_part_of_it() -> None:
    from benchmarks.attention_cells import GRIDS, NOTES

    full, usual, short = (list(map(label, GRIDS[name]())) for name in ("full", "usual", "short"))
    assert len(full) == len(set(full)) == 4 * 5 * 2 * 3 * 3 * 3 * 2 + 6
    assert len(usual) == len(set(usual)) < 200
    assert set(short) < set(usual) < set(full)
    assert "2,160" in NOTES["usual"]
    for word in ("bfloat16", "float16", "mask", "packed", "bias", "lengths", "h9/3", "d128", "b64"):
        assert any(word in name for name in usual), word


def test_every_strategy_of_the_catalogue_is_among_the_modules() -> None:
    from benchmarks.bench_modules import LEVELS
    from benchmarks.modules import ENTRIES

    assert set(ENTRIES) == set(CATALOGUE)
    for cases in (LEVELS["usual"](), LEVELS["full"]()):
        assert {case.strategy for case in cases} == set(CATALOGUE)
        assert len({case.label for case in cases}) == len(cases)
    assert set(LEVELS["usual"]()) < set(LEVELS["full"]())


def test_a_gpu_gets_all_and_where_there_is_none_only_what_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from benchmarks.bench_attention import GRID

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [GRID.level(asked(), kind) for kind in ("cpu", "cuda")] == ["usual", "short"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [GRID.level(asked(), kind) for kind in ("cpu", "cuda")] == ["usual", "full"]
    assert {GRID.level(asked(grid="short"), kind) for kind in ("cpu", "cuda")} == {"short"}


def test_what_runs_on_a_gpu_has_the_marker_and_all_rows_are_expected() -> None:
    from benchmarks.bench_modules import GRID
    from benchmarks.sections import Book

    made: list[Any] = []
    metafunc: Any = SimpleNamespace(
        fixturenames=["case"],
        config=asked(grid="short"),
        parametrize=lambda names, rows: made.extend(rows),
    )
    GRID.parametrize(metafunc)
    marks = {(one.values[0], tuple(mark.name for mark in one.marks)) for one in made}
    assert marks == {("cpu", ()), ("cuda", ("gpu",))}
    book = Book(Path())
    GRID.open(book, asked(grid="short"))
    for kind in ("cpu", "cuda"):
        page = book._pages["modules", kind]
        assert page.expected == {
            GRID.title(one.values[1], one.values[2]) for one in made if one.values[0] == kind
        }
    again = book._pages["modules", "cuda"].again
    assert again == (".venv/bin/python -m pytest benchmarks/bench_modules.py -m gpu --grid short")


# -- attention -------------------------------------------------------------------------------------


def test_a_cell_has_a_row_of_every_backend_of_auto_and_of_their_ratio() -> None:
    from benchmarks.bench_attention import GRID, measure, setup_attention

    case = Case(2, 3, 5, 4, 2, 16, 16, "float32", "none", False)
    cell = measure(setup_attention(case, CPU), 0)
    rows = {name: cell.row(name) for name in GRID.names}
    assert {row.name for row in rows.values()} == {GRID.title(case, name) for name in rows}
    timed = {name for name, row in rows.items() if row.median is not None}
    assert timed == {
        *("eager", "flex", "sdpa", "sdpa-flash", "sdpa-math"),
        *("auto", "auto over the fastest"),
    }
    assert all(rows[name].reasons for name in rows if name not in timed)
    assert all(rows[n].error is not None for n in timed if n != "auto over the fastest")
    ratio = rows["auto over the fastest"]
    assert (ratio.unit, ratio.goal) == ("ratio", 1.05)
    assert ratio.case["chosen"] in timed
    assert ratio.case["fastest"] in timed - {"auto"}
    assert 1 <= ratio.more["attempts"] <= 3


def test_where_no_backend_runs_auto_says_so_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import bench_attention

    case = Case(2, 3, 5, 4, 2, 16, 16, "float32", "none", False)
    trial = bench_attention.setup_attention(case, CPU)
    trial.checked = {
        name: replace(timing, reasons=("not today",)) for name, timing in trial.checked.items()
    }
    cell = bench_attention.measure(trial, 0)
    assert cell.row("auto").reasons == ("no backend takes it",)
    assert cell.row("auto over the fastest").reasons == ("no backend takes it",)


def test_a_cell_is_measured_once_for_all_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.bench_attention import GRID

    measured: list[tuple[Case, float, int]] = []

    def measure(case: Case, device: torch.device, seconds: float) -> Any:
        measured.append((case, seconds, torch.get_num_threads()))
        return SimpleNamespace()

    monkeypatch.setattr(GRID, "measure", measure)
    one, other = (Case(b, 3, 5, 4, 2, 16, 16, "float32", "none", False) for b in (1, 2))
    config = asked(threads=1, row_seconds=None)
    for case in (one, one, other, other, one):
        GRID.get(config, case, CPU)
    GRID.get(asked(threads=1, row_seconds=0.7), other, CPU)
    GRID.close()
    assert [case for case, *_ in measured] == [one, other, one, other]
    assert [seconds for _, seconds, _ in measured] == [0.08, 0.08, 0.08, 0.7]
    assert {threads for *_, threads in measured} == {1}


# -- modules ---------------------------------------------------------------------------------------


SMALL = {"Dv": 48, "grid": (3, 3), "D": 32, "T": 4}
TINY: dict[str, dict[str, Any]] = {
    "c-abstractor": {"tokens": 4, "depth": 1, "hidden": 32},
    "film": {"width": 8},
    "gated-xattn": {"hidden": 16},
    "lmeye": {"width": 16, "depth": 1, "heads": 2},
    "qformer": {"queries": 2, "width": 16, "depth": 2, "heads": 2, "hidden": 16},
    "resampler": {"latents": 2, "depth": 1, "heads": 2, "head_width": 4},
    "rvii": {"width": 16, "depth": 1, "heads": 2},
    "static": {"map": "mlp", "norm": False},
    "zoom": {"width": 16, "depth": 1, "heads": 2, "guide": {"width": 8}},
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the benchmark, with tiny ones of ours and small patches."""
    from benchmarks import bench_modules, modules

    monkeypatch.setitem(modules.SIZES, "starter", modules.Size(**SMALL))
    for name, options in TINY.items():
        entry = modules.ENTRIES[name]
        # The libraries' classes have sizes of their own, and are built where they are small.
        theirs = entry.theirs if name in ("static", "gated-xattn") else None
        monkeypatch.setitem(modules.ENTRIES, name, replace(entry, options=options, theirs=theirs))
    return bench_modules


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("strategy", TINY)
def test_a_module_is_checked_and_timed(small: Any, strategy: str, grad: bool) -> None:
    case = small.Case(strategy, "starter", 2, "float32", grad)
    pair = small.measure(case, CPU, 0)
    assert [row.name for row in pair.rows.values()] == [f"{case.label} / {n}" for n in small.NAMES]
    ours = pair.rows["ours"]
    assert not pair.runs["ours"].failed
    assert ours.median is not None
    assert ours.error is not None
    assert ours.error < 1e-5
    if pair.runs["theirs"].task is None:
        assert pair.rows["theirs"].reasons == pair.rows["ours over theirs"].reasons
    else:
        assert pair.rows["theirs"].case["class"] == small.ENTRIES[strategy].original
        assert pair.rows["ours over theirs"].unit == "ratio"


def test_a_module_that_computes_something_else_is_not_timed(
    small: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, calls = small.results, []

    def wrong(*given: Any) -> Any:
        calls.append(given)
        found = results(*given)
        return [t * 1.01 for t in found] if len(calls) == 1 else found

    monkeypatch.setattr(small, "results", wrong)
    pair = small.measure(small.Case("film", "starter", 2, "float32", False), CPU, 0)
    assert pair.runs["ours"].failed
    assert pair.rows["ours"].reasons[0].startswith("is off by 0.01")
    assert pair.samples == {}


def test_what_jumps_is_not_held_against_double_precision_in_half(small: Any) -> None:
    pair = small.measure(small.Case("zoom", "starter", 1, "bfloat16", False), CPU, 0)
    assert "another thing in half precision" in pair.rows["ours"].reasons[0]
    assert not pair.runs["ours"].failed


@pytest.mark.slow
@pytest.mark.parametrize("strategy", CATALOGUE)
def test_ours_and_the_librarys_class_are_of_one_size(strategy: str) -> None:
    from benchmarks.modules import ENTRIES, SIZES, see

    entry, size = ENTRIES[strategy], SIZES["starter"]
    if entry.theirs is None:
        assert entry.original.startswith("neither torch nor transformers")
        return
    shapes, counts = [], []
    for subject in (entry.ours(size), entry.theirs(size, "sdpa")):
        named = subject.module.named_parameters()
        counts.append(sum(p.numel() for n, p in named if not n.startswith("encoder.")))
        with torch.no_grad():
            shapes.append(subject(see(size, 2)).shape)
    assert shapes[0] == shapes[1]
    assert counts[0] == pytest.approx(counts[1], rel=0.35)
    if strategy in ("gated-xattn", "qformer", "resampler", "static"):
        assert counts[0] == pytest.approx(counts[1], rel=1e-3)


# -- the device itself -----------------------------------------------------------------------------


def test_products_and_copies_are_measured_for_every_type() -> None:
    from benchmarks.bench_peaks import Sizes, measure

    rows = {row.name: row for row in measure(CPU, Sizes((8, 16), (1024, 2048), 0))}
    assert [*rows] == [
        *(f"multiply {dtype}" for dtype in ("float32", "bfloat16", "float16")),
        *("copy 1024 bytes", "copy 2048 bytes"),
    ]
    assert all(row.median > 0 and row.better == "higher" for row in rows.values())


# -- what is kept ----------------------------------------------------------------------------------


def test_a_section_is_written_when_it_is_whole(tmp_path: Path) -> None:
    from benchmarks.results import path_of
    from benchmarks.sections import Book

    book = Book(tmp_path, 1)
    for name, expected in (("whole", {"a", "b"}), ("partly", {"a", "b"}), ("not at all", {"a"})):
        book.open(name, "cpu", frozenset(expected), notes=("said",), again="make bench")
    for row in ("a", "b"):
        book.enter("whole", "cpu", Row.of(row, [1.0]))
    book.enter("partly", "cpu", Row.of("a", [1.0]))
    book.close()
    found = Results.read(path_of("cpu", tmp_path))
    assert [*found.sections] == ["whole"]
    assert found.sections["whole"].notes == ("said",)
    assert found.sections["whole"].about["command"] == "make bench"
    assert book.told[0].startswith("whole on cpu: 2 rows in ")
    assert book.told[1].startswith("partly on cpu: 1 of 2 rows were measured")
    assert len(book.told) == 2


def test_what_is_measured_so_far_is_put_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import sections
    from benchmarks.results import path_of

    monkeypatch.setattr(sections, "PARTLY_S", -1.0)
    book = sections.Book(tmp_path, 1)
    book.open("long", "cpu", frozenset({"a", "b"}))
    book.enter("long", "cpu", Row.of("a", [1.0]))
    aside = Results.read(path_of("cpu", tmp_path / "partly"))
    assert [row.name for row in aside.sections["long"].rows] == ["a"]
    assert not path_of("cpu", tmp_path).exists()
    book.enter("long", "cpu", Row.of("b", [1.0]))
    book.close()
    assert path_of("cpu", tmp_path).exists()
    assert not (tmp_path / "partly").exists()


def run(folder: Path, code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a file of tests in a process of its own."""
    (folder / "test_it.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py", *words]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}
    )


def test_pytest_benchmark_gets_the_samples_that_were_taken(tmp_path: Path) -> None:
    code = (
        "import pytest\nfrom benchmarks.replay import recorded, replay\n\n"
        "@pytest.mark.benchmark(timer=recorded)\n"
        "def test_row(benchmark):\n"
        "    replay(benchmark, [0.1, 0.4, 0.2], 'shape', error=1e-7)\n"
    )
    done = run(tmp_path, code, "--benchmark-json=out.json")
    assert done.returncode == 0, done.stdout
    (row,) = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert row["stats"]["data"] == pytest.approx([0.1, 0.4, 0.2])
    assert row["stats"]["median"] == pytest.approx(0.2)
    assert row["group"] == "shape"
    assert row["extra_info"] == {"error": 1e-7}


TOYS = """
from ipn_core.benchmarking.engine import subjects, table
from ipn_core.testing.tiny import tiny_backbone

subjects.INTERACT = {"name": "rvii", "width": 16, "depth": 1, "heads": 2, "mlp_ratio": 2}
subjects.backbone = lambda device: (tiny_backbone(positions=4096).to(device), "a toy")
for row in ("commands", "memory"):
    del table.ROWS[row]
"""
"""What the suite measures below, where the language model itself would take minutes. The two rows
that run processes of their own are measured by `test_bench_engine_goals.py`."""


@pytest.mark.slow
def test_the_suite_runs_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "toys_instead.py").write_text(TOYS)
    path = f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"

    def suite(*more: str) -> str:
        """Run what `make bench` runs; returns what it printed."""
        words = ("--grid", "short", "--row-seconds", "0", "--threads", "1", "--no-check")
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "toys_instead",
            "benchmarks",
            *words,
            *more,
        ]
        done = subprocess.run(
            command,
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    suite("-m", "not gpu", "--results", str(tmp_path / "all"))
    # One file, and where there are more CPUs another one of `threads`, which counts them itself.
    files = [Results.read(path).sections for path in (tmp_path / "all").glob("*.json")]
    found = {name: section for sections in files for name, section in sections.items()}
    assert set(found) == {"attention", "modules", "peaks", "engine", "threads", "training"}
    assert len(found["attention"].rows) % 6 == 0
    assert "language model: a toy" in found["engine"].notes
    rows = {row.name: row for section in found.values() for row in section.rows}
    assert rows["first-token-2048/its floor"].samples == 1
    assert rows["a whole training/encoder on, no caches : all caches"].samples == 3
    for name in ("engine", "training"):
        assert found[name].about["threads"] == 1
        again = f"pytest benchmarks/bench_{name}.py -m 'not gpu' --grid short"
        assert found[name].about["command"] == f".venv/bin/python -m {again}"

    some = suite("-m", "not gpu", "--results", str(tmp_path / "some"), "-k", "film")
    assert "modules on cpu: 3 of 9 rows were measured" in some
    assert not (tmp_path / "some").exists()

    collected = suite("-m", "gpu", "--collect-only", "-q")
    for name in ("engine", "training", "peaks"):
        assert f"bench_{name}.py::test_{name}[cuda]" in collected
