"""The parts of documents that programs write, and the table of hops among them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from toys import picture, toy_model

from ipn_core.plugins import Registry
from ipn_core.tasks import Example, Picture

ROOT = Path(__file__).parents[1]


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import pages

    return pages


@pytest.fixture
def hops(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import hops

    return hops


def test_only_what_stands_between_the_comments_is_written(
    pages: ModuleType, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    text = "# One\n<!-- it: begin -->\nold\n<!-- it: end -->\n<!-- other: begin -->\n"
    page.write_text(text)
    assert pages.held(page, "it") == "old"
    pages.fill(page, "it", "new\nlines")
    assert page.read_text() == text.replace("old", "new\nlines")
    assert pages.held(page, "it") == "new\nlines"
    for name in ("other", "none"):
        with pytest.raises(SystemExit, match=f"has no '<!-- {name}: begin -->'"):
            pages.fill(page, name, "x")


EXAMPLES = [
    Example(
        f"What is it, number {row}?",
        ("a",),
        (Picture(f"p{row}", lambda row=row: picture(row)),),
        kind,
    )
    for row, kind in enumerate(("one", "two", "two"))
]


@pytest.mark.parametrize(("bias", "looks"), [(100.0, 3.0), (-100.0, 1.0)])
def test_a_row_of_hops_counts_tokens_and_looks(
    hops: ModuleType, registry: Registry, bias: float, looks: float
) -> None:
    model = toy_model(registry, "toy-both", layout={"look_again": 2, "dynamic": 2})
    with torch.no_grad():
        model.look_head.score.bias.fill_(bias)
    found = hops.measure(model, EXAMPLES)
    assert (found["n"], found["by_type"]["two"]["n"]) == (3, 2)
    assert found["looks"] == looks
    assert found["tokens"] == {"static": 9, "request": looks, "dynamic": 2 * looks}


def test_the_table_of_hops_has_the_rows_that_were_measured(hops: ModuleType) -> None:
    score = {"accuracy": 0.5, "ci95": [0.25, 0.75], "n": 3, "looks": 2.0}
    score["by_type"] = {"one": dict(score), "two": dict(score)}
    score["tokens"] = {"static": 0, "request": 16, "dynamic": 6}
    lines = hops.table({"2": score}, EXAMPLES).splitlines()
    assert lines[0].endswith("| one hop (1) | two hops (2) | all |")
    cell = "50.0 % (25.0 to 75.0)"
    assert lines[2] == f"| 2, `decide` for 300 more | 22 | 2.00 | {cell} | {cell} | **{cell}** |"
    assert lines[-1] == "The most frequent answer, a, would be right in 100.0 % of all."
