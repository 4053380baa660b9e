from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from command_line import Run, assert_refused

from ipn_core.benchmarking.engine import subjects, table
from ipn_core.testing.tiny import tiny_backbone


@pytest.mark.usefixtures("small_interaction")
def test_the_command_prints_rows_or_json(
    ipn: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subjects, "backbone", lambda device: (tiny_backbone(), "a toy"))
    words = (
        "bench",
        "engine",
        "--only",
        "machinery",
        "--repeats",
        "2",
        "--threads",
        "1",
        "--device",
        "cpu",
    )
    run = ipn(*words)
    assert run.code == 0, run.err
    assert run.out.startswith("a toy, float32, 1 threads of ")
    assert "goal at most 0.01" in run.out
    found = json.loads(ipn(*words, "--json").out)
    assert found["llm"] == "a toy"
    assert [row["row"] for row in found["rows"]] == ["machinery"]
    assert found["rows"][0]["rows"][0]["name"] == "machinery/first token, through hooks"


def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(
    ipn: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delattr(subjects, "backbone")
    run = ipn("bench", "engine", "--device", "cuda")
    assert_refused(run, "'--device' must be cpu here, got 'cuda'. See 'ipn doctor'.")


def test_rows_are_chosen_by_name_or_by_what_they_begin_with(ipn: Callable[..., Run]) -> None:
    some = table.choose_rows(["training", "first-token"])
    assert some == [r for r in table.ROWS if r.startswith(("first-token-", "training"))]
    run = ipn("bench", "engine", "--only", "first-tokens")
    assert_refused(
        run, "unknown row 'first-tokens': known are first-token-128, ", "stands for all whose names"
    )
