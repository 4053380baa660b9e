"""What becomes of results: tables in documents, a page and plots for each device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ipn_core.attention.choice import Case
from ipn_core.attention.drawing import label
from ipn_core.benchmarking import Results, Row, Section, store

ROOT = Path(__file__).parents[1]
ABOUT = {"cpu": "some CPU", "threads": 2, "torch": "9.9", "day": "2020-01-02", "command": "it"}


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


def attention(queries: int, keys: int, ratio: float = 1.01, grad: bool = False) -> list[Row]:
    """The rows of one shape: eager is four times as slow, and one backend refuses."""
    case = Case(8, queries, keys, 8, 8, 64, 64, "float32", "none", grad)
    what, name = case._asdict(), label(case)
    times = {"eager": 4e-3, "sdpa": 1e-3, "auto": ratio * 1e-3}
    rows = [
        Row.of(f"{name} / {one}", [t * keys] * 6, {**what, "backend": one}, error=2e-7)
        for one, t in times.items()
    ]
    refused = Row.refused(f"{name} / flash", ["needs a GPU"], {**what, "backend": "flash"})
    over = Row.of(
        f"{name} / auto over the fastest",
        [ratio] * 6,
        {**what, "chosen": "sdpa", "fastest": "sdpa"},
        unit="ratio",
        goal=1.05,
        more={"attempts": 3.0 if ratio > 1.05 else 1.0},
    )
    return [*rows[:2], refused, rows[2], over]


def modules() -> list[Row]:
    case = {"strategy": "rvii", "size": "starter", "batch": 1, "dtype": "float32", "grad": False}
    name = "rvii starter b1 float32 forward"
    alone = {**case, "strategy": "film"}
    return [
        Row.of(f"{name} / ours", [2e-3] * 5, {**case, "of": "ours", "class": "rvii"}, error=1e-6),
        Row.of(f"{name} / theirs", [1e-3] * 5, {**case, "of": "theirs", "class": "nn.Decoder"}),
        Row.of(f"{name} / ours over theirs", [2.0] * 5, case, unit="ratio"),
        Row.of(f"film {name[5:]} / ours", [3e-3] * 5, {**alone, "of": "ours", "class": "film"}),
        Row.refused(f"film {name[5:]} / theirs", ["no class"], {**alone, "of": "theirs"}),
        Row.refused(f"film {name[5:]} / ours over theirs", ["no class"], alone, unit="ratio"),
    ]


def peaks() -> list[Row]:
    return [
        Row.of("multiply float32", [1e11], {"dtype": "float32"}, unit="FLOP/s", better="higher"),
        Row.of("copy 1024 bytes", [9e10], {"bytes": 1024}, unit="bytes/s", better="higher"),
        Row.of("copy 4096 bytes", [1e10], {"bytes": 4096}, unit="bytes/s", better="higher"),
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of one device."""
    shapes = [attention(q, kv) for q in (1, 5) for kv in (50, 257)]
    shapes.append(attention(5, 257, ratio=1.2, grad=True))
    sections = {
        "attention": [row for rows in shapes for row in rows],
        "modules": modules(),
        "peaks": peaks(),
        "engine": [Row.of("first-token/over floor", [1.2], unit="ratio", goal=1.05)],
    }
    made = tmp_path / "results"
    made.mkdir()
    for name, rows in sections.items():
        section = Section(about=ABOUT, notes=(f"about {name}",), rows=tuple(rows))
        store(made / "some-cpu.json", "some-cpu", name, section)
    return made


# -- documents -------------------------------------------------------------------------------------


def test_a_document_gets_what_it_asks_for_and_keeps_the_rest(folder: Path) -> None:
    from benchmarks.render import render

    page = folder.parent / "page.md"
    asks = "".join(
        f"<!-- results {name}: begin -->\nold\n<!-- results {name}: end -->\n\nafter {name}\n"
        for name in ("attention", "modules", "engine", "nowhere")
    )
    page.write_text(f"# Before\n\n{asks}")
    for _ in range(2):  # filled again, it is the same
        render(folder, [page])
        text = page.read_text()
        assert text.startswith(
            "# Before\n\n<!-- results attention: begin -->\nsome CPU, 2 threads; "
        )
        assert re.findall(r"^after \w+$", text, re.MULTILINE) == [
            f"after {name}" for name in ("attention", "modules", "engine", "nowhere")
        ]
        assert "old" not in text
        assert text.count("torch 9.9; 2020-01-02; `it`") == 3
        assert "Not measured yet: no device has results of 'nowhere'." in text
        for link in re.findall(r"\]\((results/[^)]+)\)", text):
            assert (folder.parent / link).exists()
        assert text.count("![") == 3


def test_the_summary_of_attention_has_the_worst_shape_and_every_kind(folder: Path) -> None:
    from benchmarks.tables import attention

    text = attention(Results.read(folder / "some-cpu.json").sections["attention"])
    assert "At 5 shapes `auto` takes 1.010 of the fastest" in text
    assert "1.200 at most (q5 kv257 d64 h8 b8 float32 none forward+backward)" in text
    assert "Above 1.05: 1; timed more than once, because it was above at first: 1." in text
    assert "| float32, none, forward | 8 × 64 | 8 | 4 | sdpa 4 | 1.010 | 2e-07 |" in text
    assert "| 5 queries | 50.5 ms, 4.0 × | 260 ms, 4.0 × |" in text


def test_the_page_of_a_device_hides_no_row(folder: Path) -> None:
    from benchmarks.tables import everything

    results = Results.read(folder / "some-cpu.json")
    text = everything(results)
    assert [f"## {name}" in text for name in results.sections] == [True] * 4
    assert "| shape | eager | sdpa | auto | auto / fastest |" in text
    assert (
        "| q1 kv50 d64 h8 b8 float32 none forward | 200 ms | **50 ms** | 50.5 ms | 1.010 |" in text
    )
    assert "| flash | 5 | needs a GPU |" in text
    assert "| film starter b1 float32 forward | 3 ms (3 ms to 3 ms) |  | no: no class |" in text
    assert "2 ms (2 ms to 2 ms) | `nn.Decoder` | 1 ms" in text
    assert (
        "| first-token/over floor | 1.200 | 1.200 to 1.200 | 1 | at most 1.05, **missed** |" in text
    )
    assert "| copy 4096 bytes | 10 GB/s |" in text


def test_a_sentence_about_a_section_is_filled_in(tmp_path: Path) -> None:
    from benchmarks.render import render

    page = tmp_path / "page.md"
    marks = [f"<!-- results first-token: {end} -->" for end in ("begin", "end")]
    page.write_text("\n".join(marks))
    render(tmp_path, [page])
    assert "Not measured yet: no device has results of 'engine'." in page.read_text()
    samples = {
        "one request round": [3.0, 3.0],
        "one request round : its floor": [1.01, 1.03],
        "one request round : no request": [1.25, 1.35],
        "two passes : one request round": [1.5, 1.6],
    }
    rows = [Row.of(f"first-token-128/{name}", values) for name, values in samples.items()]
    title = "first-token-128: first token, 128 tokens up to <img-q>"
    section = Section(about=ABOUT, notes=("language model: x", title), rows=tuple(rows))
    store(tmp_path / "some-cpu.json", "some-cpu", "engine", section)
    render(tmp_path, [page])
    assert page.read_text() == (
        f"{marks[0]}\n"
        "some CPU, 2 threads; torch 9.9; 2020-01-02; `it`: A first token with a look takes 1.02 "
        "(1.01 to 1.03) of its floor's time and 1.30 (1.25 to 1.35) of the same words' without a "
        "look; two passes take 1.55 (1.50 to 1.60) of it (medians of 2 turns, with their 95 % "
        "intervals; 128 "
        f"tokens up to `<img-q>`).\n{marks[1]}"
    )


def test_a_section_in_which_nothing_ran_is_shown_too() -> None:
    from benchmarks.plots import draw
    from benchmarks.tables import attention, everything

    section = Section(about=ABOUT, rows=tuple(attention_rows_refused()))
    results = Results(device="d", sections={"attention": section})
    assert attention(section) == "No backend was timed."
    assert "| auto | 1 | no backend takes it |" in everything(results)
    assert draw(results, Path()) == {}


def attention_rows_refused() -> list[Row]:
    case = Case(1, 1, 1, 1, 1, 8, 8, "float64", "none", False)
    reasons = {"flash": "needs a GPU", "auto": "no backend takes it"}
    rows = [
        Row.refused(f"{label(case)} / {one}", [why], {**case._asdict(), "backend": one})
        for one, why in reasons.items()
    ]
    ratio = f"{label(case)} / auto over the fastest"
    return [*rows, Row.refused(ratio, ["no backend takes it"], unit="ratio")]


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (1.5, "s", "1.5 s"),
        (0.0123, "s", "12.3 ms"),
        (4.2e-7, "s", "0.42 µs"),
        (1.2345, "ratio", "1.234"),
        (0.0123, "ratio", "0.012"),
        (2.5e9, "bytes", "2.5 GB"),
        (12.0, "bytes", "12 B"),
        (3e12, "FLOP/s", "3 TFLOP/s"),
        (31.0, "tokens/s", "31 tokens/s"),
    ],
)
def test_amounts_have_a_unit_of_their_size(value: float, unit: str, shown: str) -> None:
    from benchmarks.tables import amount

    assert amount(value, unit) == shown


def test_the_command_says_what_it_wrote_or_why_it_cannot(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.render import main

    assert main(["--results", str(folder)]) == 0
    written = {Path(line).name for line in capsys.readouterr().out.splitlines()}
    plots = {f"some-cpu-{what}.png" for what in ("attention", "roofline", "modules")}
    assert written == {"some-cpu.md", *plots}
    assert all((folder / name).read_bytes()[:4] == b"\x89PNG" for name in plots)
    (folder / "some-cpu.json").write_text("{")
    assert main(["--results", str(folder)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert re.fullmatch(r"render: '.*some-cpu.json' is no JSON: .*\n", said.err)


def test_documents_that_ask_are_found_and_ask_for_known_sections() -> None:
    from benchmarks.render import BEGINS, asked
    from benchmarks.tables import EXCERPTS

    found = asked()
    assert ROOT / "docs" / "benchmarks.md" in found
    known = {"attention", "modules", "peaks", "engine", "training", "threads", *EXCERPTS}
    known |= {"floor", "decoding", "profiles"}
    shown = {name for path in found for _, name in BEGINS.findall(path.read_text("utf-8"))}
    assert shown == known  # no section is measured that no document shows
    for path in found:
        text = path.read_text(encoding="utf-8")
        names = [name for _, name in BEGINS.findall(text)]
        assert set(names) <= known
        for name in names:
            assert text.count(f"<!-- results {name}: end -->") == 1


# -- the roofline ----------------------------------------------------------------------------------


def test_the_least_that_a_call_needs_is_counted() -> None:
    from benchmarks.roofline import work

    case = Case(2, 3, 5, 4, 2, 16, 8, "bfloat16", "none", False)
    needs = work(case)
    assert needs.flops == 2 * (2 * 3 * 5) * 4 * (16 + 8)
    assert needs.bytes == 2 * 2 * (3 * 4 + 5 * 2) * (16 + 8)
    assert needs.intensity == needs.flops / needs.bytes
    both = work(case._replace(grad=True))
    assert both.flops == needs.flops + 2 * (2 * 3 * 5) * 4 * (3 * 16 + 2 * 8)
    assert both.bytes == 3 * needs.bytes


def test_sequences_end_to_end_look_at_their_own_keys_alone() -> None:
    import torch

    from benchmarks.roofline import work
    from ipn_core.attention.drawing import draw

    case = Case(4, 24, 48, 2, 2, 8, 8, "float32", "packed", False)
    inputs = draw(case, torch.device("cpu"))
    assert inputs.query_lengths is not None
    assert inputs.lengths is not None
    pairs = sum(m * n for m, n in zip(inputs.query_lengths, inputs.lengths, strict=True))
    assert work(case).flops == 2 * pairs * 2 * 16
    tensors = (inputs.q, inputs.k, inputs.v, inputs.q)
    assert work(case).bytes == 4 * sum(t.numel() for t in tensors)


def test_the_roofs_are_the_largest_and_the_fastest_copy() -> None:
    from benchmarks.roofline import roofs

    found = roofs(Section(rows=tuple(peaks())))
    assert (found.memory, found.cache, found.flops) == (1e10, 9e10, {"float32": 1e11})


def test_a_roofline_draws_every_timed_backend_under_its_roofs(folder: Path) -> None:
    from benchmarks import plots

    results: Any = Results.read(folder / "some-cpu.json")
    timed = list(plots._timed(results.sections["attention"]))
    figure = plots._roofline(timed, results.sections["peaks"])
    (axis,) = figure.axes
    labels = {text.get_text() for text in axis.get_legend().get_texts()}
    assert labels == {"eager", "sdpa", "largest copy", "fastest copy"}
    heights = [y for points in axis.collections for _, y in points.get_offsets().tolist()]
    assert len(heights) == 2 * 5
    assert max(heights) < 1e11
