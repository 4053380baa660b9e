from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command_line import Run, assert_refused

from ipn_core.attention import choice

TINY = ("bench", "attention", "--seconds", "0", "--shape", "2,3,4/2,16,2")


@pytest.fixture(autouse=True)
def _own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("IPN_CACHE", str(tmp_path))
    monkeypatch.delenv(choice.SWITCH)
    choice.forget()
    yield
    choice.forget()


def test_every_backend_is_listed_with_a_time_or_a_reason(ipn: Callable[..., Run]) -> None:
    run = ipn(*TINY)
    assert run.code == 0, run.err
    title, *rows = run.out.splitlines()
    assert title == ("2 queries, 3 keys, 4/2 heads of 16, batch 2, float32, masking none, forward")
    assert sum(row.endswith("<- auto") for row in rows) == 1
    for name, says in (("eager", " ms  ("), ("sdpa", " ms  ("), ("xformers", "no: needs a device")):
        assert [says in row for row in rows if row.split()[0] == name] == [True]


def test_tuning_keeps_the_fastest_for_auto(ipn: Callable[..., Run], tmp_path: Path) -> None:
    before = json.loads(ipn(*TINY, "--json").out)
    assert before["table"] is None
    words = (*TINY, "--masking", "packed", "--masking", "none", "--dtype", "bfloat16", "--backward")
    run = ipn(*words, "--tune", "--json")
    found = json.loads(run.out)
    assert Path(found["table"]).is_relative_to(tmp_path)
    cases = [(c["masking"], c["grad"], c["batch"], c["queries"]) for c in found["auto"]]
    assert cases == [
        ("packed", False, 2, 4),
        ("packed", True, 2, 4),
        ("none", False, 2, 2),
        ("none", True, 2, 2),
    ]
    for case in found["auto"]:
        timed = {
            row["case"]["backend"]: row["median"]
            for row in found["rows"]
            if all(row["case"][what] == case[what] for what in ("masking", "grad"))
            and row["median"] is not None
        }
        assert timed[case["backend"]] <= 2 * min(timed.values())  # what is sure takes longer
    kept = {(r["masking"], r["grad"]): r["winner"] for r in table(found["table"])}
    assert kept == {(c["masking"], c["grad"]): c["backend"] for c in found["auto"]}


def table(path: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads(Path(path).read_text())["rows"]
    return rows


def test_what_a_model_computes_is_timed(
    ipn: Callable[..., Run], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = choice.Case(2, 3, 4, 2, 2, 16, 16, "float32", "none", False)
    asked: list[str] = []
    monkeypatch.setattr(
        "ipn_core.attention.drawing.cases_of", lambda model: asked.append(model.strategy) or [case]
    )
    words = ("bench", "attention", "--seconds", "0", "--model", home / "model")
    run = ipn(*words, "--json")
    assert run.code == 0, run.err
    assert asked == ["tiny-look"]
    assert [row["case"]["keys"] for row in json.loads(run.out)["rows"]][:1] == [4]


def test_a_model_that_leaves_nothing_to_auto_is_told(ipn: Callable[..., Run], home: Path) -> None:
    run = ipn("bench", "attention", "--model", home / "model")
    assert_refused(run, "leaves no attention to the backend 'auto'", "with '--shape'")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--model", "starter", "--shape", "5,6,8,32,1"), "both say what to time"),
        (("--shape", "5,64,8,32"), "five numbers from 1 such as 5,64,8,32,1"),
        (("--shape", "5,64,9/2,32,1"), "got '5,64,9/2,32,1'"),
        (("--shape", "5,64,8,32,0"), "five numbers from 1"),
        (("--shape", "5,6,8,32,1", "--dtype", "float3"), "did you mean 'float32'?"),
        (("--shape", "5,6,8,32,1", "--masking", "pack"), "did you mean 'packed'?"),
        (("--masking", "packed"), "'--masking' says what to give a '--shape'"),
        (("--device", "tpu"), "'--device' must be cpu"),
    ],
)
def test_what_it_cannot_time_is_refused(
    ipn: Callable[..., Run], words: tuple[str, ...], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert_refused(ipn("bench", "attention", *words), says)
