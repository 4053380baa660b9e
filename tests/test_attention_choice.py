"""What `auto` takes: by measurement where there is one, else by the list."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from ipn_core import processors
from ipn_core.attention import AttentionInputs, choice, dispatch, get_backend
from ipn_core.attention.choice import Case, describe, measured, table_path, write_table
from ipn_core.attention.dispatch import choose
from ipn_core.attention.drawing import default_cases, draw

CPU = torch.device("cpu")
PLAIN = Case(2, 3, 5, 4, 2, 16, 16, "float32", "none", False)
MASKINGS = ("none", "mask", "bias", "lengths", "packed", "mask+bias", "mask+bias+packed")


@pytest.fixture(autouse=True)
def table(own_table: None) -> Path:
    """Where the table of this machine lies: in a cache of the test's own, and not there yet."""
    return table_path(CPU)


def taken(case: Case) -> str:
    return choose(draw(case, CPU)).name


# -- cases -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("masking", MASKINGS)
def test_a_drawn_call_is_of_its_case(masking: str, grad: bool) -> None:
    packed = "packed" in masking
    case = PLAIN._replace(
        batch=3, queries=9 if packed else 3, keys=17, masking=masking, grad=grad, dtype="bfloat16"
    )
    assert Case.of(draw(case, CPU)) == case


def test_rounding_raises_lengths_and_batch_to_powers_of_two() -> None:
    case = PLAIN._replace(batch=3, queries=5, keys=64)
    assert case.rounded() == PLAIN._replace(batch=4, queries=8, keys=64)
    assert case.rounded().rounded() == case.rounded()


def test_the_default_cases_are_the_starters() -> None:
    shapes = {(case.queries, case.keys, case.masking) for case in default_cases(CPU)}
    assert shapes == {(5, 5, "none"), (5, 64, "bias")}
    assert {case.dtype for case in default_cases(torch.device("cuda"))} == {"bfloat16", "float32"}


# -- the table -------------------------------------------------------------------------------------


def test_without_a_table_the_list_decides(table: Path) -> None:
    assert not table.exists()
    assert taken(PLAIN) == "sdpa"


def test_the_fastest_measured_is_taken() -> None:
    write_table(CPU, {PLAIN: "sdpa-math"})
    assert taken(PLAIN) == "sdpa-math"
    assert taken(PLAIN._replace(grad=True)) == "sdpa"
    assert taken(PLAIN._replace(masking="mask")) == "sdpa"
    assert taken(PLAIN._replace(head_dim=8, value_dim=8)) == "sdpa"


def test_a_shape_of_its_own_goes_before_a_near_one() -> None:
    near = PLAIN._replace(keys=7)
    write_table(CPU, {near: "eager"})
    assert taken(PLAIN) == taken(near) == taken(PLAIN._replace(queries=4, keys=8)) == "eager"
    assert taken(PLAIN._replace(keys=9)) == "sdpa"
    write_table(CPU, {PLAIN: "sdpa-math"})
    assert taken(PLAIN) == "sdpa-math"
    assert taken(near) == "eager"


@pytest.mark.parametrize("name", ["xformers", "flex", "of-a-plugin-that-is-gone"])
def test_a_winner_that_cannot_gives_way_to_the_list(name: str) -> None:
    case = PLAIN._replace(grad=True)
    write_table(CPU, {case: name})
    assert taken(case) == "sdpa"


def test_maps_and_compiled_code_do_not_ask_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(CPU, {PLAIN: "sdpa-math"})
    inputs = draw(PLAIN, CPU)
    assert measured(inputs) == choose(inputs).name == "sdpa-math"
    q, k, v = inputs.q, inputs.k, inputs.v
    assert choose(AttentionInputs.make(q, k, v, return_map=True)).name == "eager"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choose(inputs).name == "sdpa"


def test_the_table_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(CPU, {PLAIN: "sdpa-math"})
    read, reads = choice._read, []
    monkeypatch.setattr(choice, "_read", lambda device: reads.append(device) or read(device))
    assert [taken(PLAIN) for _ in range(3)] == ["sdpa-math"] * 3
    assert reads == [CPU]


def test_every_kind_of_call_gets_its_own_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "REMEMBERED", 3)
    winners = {
        PLAIN._replace(**change): name
        for name, change in (
            ("eager", {"keys": 6}),
            ("sdpa-math", {"grad": True}),
            ("eager", {"masking": "mask"}),
            ("sdpa-math", {"value_dim": 8}),
            ("eager", {"batch": 2, "queries": 6, "keys": 10, "masking": "packed"}),
            ("sdpa-flash", {"dtype": "bfloat16"}),
        )
    }
    write_table(CPU, winners)
    for _ in range(2):
        assert {case: taken(case) for case in winners} == winners
    assert 0 < len(choice.answers) <= 3
    assert taken(PLAIN._replace(dtype="float16")) == "sdpa"
    write_table(CPU, dict.fromkeys(winners, "eager"))  # an answer is not kept beyond its table
    assert {taken(case) for case in winners} == {"eager"}


def test_a_kept_answer_costs_no_look_up_and_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(CPU, {PLAIN: "sdpa-math", PLAIN._replace(grad=True): "sdpa"})
    assert taken(PLAIN) == "sdpa-math"
    assert taken(PLAIN._replace(grad=True)) == "sdpa"
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "measured", lambda inputs: pytest.fail("it was looked up again"))
        assert taken(PLAIN) == "sdpa-math"
        assert taken(PLAIN._replace(grad=True)) == "sdpa"
    refusing = get_backend("sdpa-math")
    monkeypatch.setattr(refusing, "more_reasons", lambda inputs: ["not today"], raising=False)
    assert taken(PLAIN) == "sdpa"


def test_a_choice_that_another_refused_first_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(CPU, {PLAIN: "sdpa-math"})
    with monkeypatch.context() as patch:
        patch.setattr(get_backend("sdpa-math"), "more_reasons", lambda inputs: ["not today"])
        assert taken(PLAIN) == "sdpa"
    assert taken(PLAIN) == "sdpa-math"


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    write_table(CPU, {PLAIN: "sdpa-math"})
    monkeypatch.setenv(choice.SWITCH, "off")
    choice.forget()
    assert taken(PLAIN) == "sdpa"
    assert "IPN_ATTENTION_TABLE=off" in describe(CPU)


def with_row(**changes: Any) -> Any:
    def change(found: dict[str, Any]) -> None:
        found["rows"][0].update(changes)

    return change


DAMAGE = {
    "no rows": (lambda found: found.pop("rows"), "it is no table"),
    "rows no list": (lambda found: found.update(rows={}), "it is no table"),
    "a row no object": (lambda found: found["rows"].append(3), "a row of it is damaged"),
    "no winner": (lambda found: found["rows"][0].pop("winner"), "a row of it is damaged"),
    "an unknown field": (with_row(colour="red"), "a row of it is damaged"),
    "a length no number": (with_row(keys="5"), "a row of it is damaged"),
    "a winner no name": (with_row(winner=None), "a row of it is damaged"),
    "another format": (lambda found: found["machine"].update(format=99), "on another device"),
    "other versions": (lambda found: found["machine"].update(torch="1.0"), "other versions"),
}


@pytest.mark.parametrize("what", [*DAMAGE, "no JSON", "not text", "a folder", "a list"])
def test_a_bad_table_is_ignored_with_a_note_and_written_anew(table: Path, what: str) -> None:
    write_table(CPU, {PLAIN: "sdpa-math"})
    says = ""
    if what in DAMAGE:
        found = json.loads(table.read_text())
        change, says = DAMAGE[what]
        change(found)
        table.write_text(json.dumps(found))
    else:
        table.unlink()
        if what == "a folder":
            table.mkdir()
        else:
            table.write_bytes({"no JSON": b"{", "not text": b"\xff\xfe\x00", "a list": b"[]"}[what])
    choice.forget()
    with pytest.warns(UserWarning, match=f"are ignored: .*{says}.*ipn bench attention --tune"):
        assert taken(PLAIN) == "sdpa"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert taken(PLAIN) == "sdpa"
    assert "is ignored" in describe(CPU)
    if what != "a folder":
        write_table(CPU, {PLAIN: "eager"})
        assert taken(PLAIN) == "eager"
        assert describe(CPU).startswith("1 timed cases in ")


def test_another_number_of_threads_has_a_table_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = table_path(CPU)
    write_table(CPU, {PLAIN: "sdpa-math"})
    assert taken(PLAIN) == "sdpa-math"
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 99)
        assert table_path(CPU) != mine
        assert taken(PLAIN) == "sdpa"  # though what was taken with fewer is kept
        write_table(CPU, {PLAIN: "eager"})
        assert taken(PLAIN) == "eager"
    assert taken(PLAIN) == "sdpa-math"


def test_another_model_of_cpu_has_a_table_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processors, "ROOT", tmp_path)
    (tmp_path / "proc").mkdir()
    paths = set()
    for model in ("Fast CPU 9000", "Slow CPU 10"):
        text = f"processor\t: 0\nvendor_id\t: Some\nmodel name\t: {model}\n"
        (tmp_path / "proc" / "cpuinfo").write_text(text)
        assert choice.machine(CPU)["device"].startswith(model)
        paths.add(table_path(CPU))
    assert len(paths) == 2


def test_the_table_of_a_gpu_is_not_about_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    found = choice.machine(torch.device("cuda", 0))
    assert found["device"] == "Some GPU"
    assert "threads" not in found


@pytest.mark.parametrize("library", ["torch", "xformers", "mslk", "triton", "ipn-core"])
def test_another_version_of_what_computes_has_a_table_of_its_own(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, real = table_path(CPU), choice.version
    monkeypatch.setattr(choice, "version", lambda name: "9.9" if name == library else real(name))
    assert choice.machine(CPU)[library] == "9.9"
    assert table_path(CPU) != mine
