from __future__ import annotations

import json
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Run, assert_refused, edit, tree
from PIL import Image

from ipn_core import IPN

STAGES = ("perceive", "prefill", "request", "interact", "inject", "decode")
KINDS = ("text", "static", "request", "dynamic", "generated")


def test_ask_prints_the_answer_alone(home: Path, ipn: Callable[..., Run]) -> None:
    run = ipn("ask", home / "scene.png", "Is there a dog?", "--model", home / "model")
    expected = IPN.from_pretrained(home / "model").ask(home / "scene.png", "Is there a dog?")
    assert (run.code, run.out, run.err) == (0, expected.text + "\n", "")


def test_ask_json_adds_up(home: Path, ipn: Callable[..., Run]) -> None:
    run = ipn("ask", home / "scene.png", "Is there a dog?", "-m", home / "model", "--json")
    found = json.loads(run.out)
    assert list(found) == ["answer", "model", "interact", "seconds", "tokens", "answer_tokens"]
    assert found["model"] == str(home / "model")
    assert found["interact"] == "tiny-look"
    assert list(found["seconds"]) == [*STAGES, "first_token", "total"]
    assert list(found["tokens"]) == list(KINDS)
    total = sum(found["seconds"][stage] for stage in STAGES)
    assert total == pytest.approx(found["seconds"]["total"], rel=0.02)
    assert found["tokens"]["dynamic"] == 2
    assert found["tokens"]["generated"] == found["answer_tokens"] - 1


def test_the_wished_interaction_is_used(home: Path, ipn: Callable[..., Run]) -> None:
    run = ipn(
        "ask", home / "scene.png", "hi", "-m", home / "model", "--interact", "tiny-mean", "--json"
    )
    assert json.loads(run.out)["interact"] == "tiny-mean"


def test_a_question_that_looks_like_an_option(home: Path, ipn: Callable[..., Run]) -> None:
    run = ipn("ask", "-m", home / "model", "--", home / "scene.png", "--debug")
    assert run.code == 0


def test_an_interaction_without_weights_needs_to_be_asked_for(
    home: Path, ipn: Callable[..., Run]
) -> None:
    only = home / "model" / "tiny-look"
    ask = ("ask", home / "scene.png", "hi", "-m", only, "-i", "tiny-mean")
    assert_refused(ipn(*ask), "no trained weights for interaction 'tiny-mean'", "tiny-look")
    run = ipn(*ask, "--untrained", "--json")
    assert run.code == 0
    assert json.loads(run.out)["interact"] == "tiny-mean"
    assert "no trained weights for interaction 'tiny-mean'" in run.err
    assert "random" in run.err


def test_the_heatmap_is_written_beside_the_answer(
    home: Path, tmp_path: Path, ipn: Callable[..., Run]
) -> None:
    target = tmp_path / "map.png"
    run = ipn("ask", home / "scene.png", "hi", "-m", home / "model", "--heatmap", target)
    assert run.code == 0
    assert run.out.count("\n") >= 1
    assert str(target) in run.err
    with Image.open(target) as drawn:
        assert drawn.format == "PNG"


def broken_inputs(home: Path, folder: Path) -> dict[str, tuple[tuple[object, ...], str]]:
    """Wrong inputs of `ask` by name, with a part of the message that each must give."""
    picture, model = home / "scene.png", home / "model"
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").write_bytes(b"")
    content = picture.read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    # A header that claims 30,000 × 30,000 pixels: it starts at byte 12, its checksum ends it.
    header = b"IHDR" + (30_000).to_bytes(4, "big") * 2 + content[24:29]
    checksum = zlib.crc32(header).to_bytes(4, "big")
    (folder / "bomb.png").write_bytes(content[:12] + header + checksum + content[33:])
    (folder / "nothing").mkdir()
    (folder / "d.png").mkdir()
    return {
        "missing": ((folder / "none.png", "hi"), "no such file"),
        "folder": ((folder, "hi"), "is a folder"),
        "text": ((folder / "text.png", "hi"), "not an image"),
        "empty": ((folder / "empty.png", "hi"), "not an image"),
        "cut": ((folder / "cut.png", "hi"), "damaged or cut short"),
        "bomb": ((folder / "bomb.png", "hi"), "at most 50,000,000 are accepted"),
        "no question": ((picture, "  \n"), "the question is empty"),
        "bytes": ((picture, "what \udcff"), "not valid text"),
        "long": ((picture, "why " * 200, "-m", model), "fit into the context"),
        "model": ((picture, "hi", "-m", "startre"), "unknown model 'startre'"),
        "near model": ((picture, "hi", "-m", "startre"), "did you mean 'starter'?"),
        "no model": ((picture, "hi", "-m", folder / "nothing"), "is no model of ours"),
        "interact": ((picture, "hi", "-m", model, "-i", "tiny-lok"), "did you mean 'tiny-look'?"),
        "untrained": (
            (picture, "hi", "-m", model, "-i", "tiny-lok", "--untrained"),
            "unknown strategy 'tiny-lok'",
        ),
        "no map": (
            (picture, "hi", "-m", model, "-i", "tiny-mean", "--heatmap", folder / "a.png"),
            "interaction 'tiny-mean' keeps no attention map",
        ),
        "map type": ((picture, "hi", "--heatmap", folder / "a.jpg"), "does not end in .png"),
        "map folder": ((picture, "hi", "--heatmap", folder / "no" / "a.png"), "there is no folder"),
        "map is a folder": ((picture, "hi", "--heatmap", folder / "d.png"), "is a folder"),
        "map is the picture": ((picture, "hi", "--heatmap", picture), "is the picture itself"),
    }


CASES = (
    "missing", "folder", "text", "empty", "cut", "bomb", "no question", "bytes", "long", "model",
    "near model", "no model", "interact", "untrained", "no map", "map type", "map folder",
    "map is a folder", "map is the picture",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_wrong_input_of_ask(case: str, home: Path, tmp_path: Path, ipn: Callable[..., Run]) -> None:
    cases = broken_inputs(home, tmp_path)
    assert set(cases) == set(CASES)
    words, part = cases[case]
    before = tree(tmp_path), tree(home)
    assert_refused(ipn("ask", *words), part)
    assert (tree(tmp_path), tree(home)) == before


def test_weights_that_do_not_fit_the_config(
    home: Path, copied: Path, ipn: Callable[..., Run]
) -> None:
    edit(copied, lambda c: c.update(interact={"name": "tiny-look", "width": 12}))
    run = ipn("ask", home / "scene.png", "hi", "-m", copied)
    assert_refused(run, "do not fit its config", "interaction.queries has shape (2, 16)", "(2, 12)")


def test_a_checkpoint_that_is_a_pickle(home: Path, copied: Path, ipn: Callable[..., Run]) -> None:
    (copied / "model.safetensors").unlink()
    (copied / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
    run = ipn("ask", home / "scene.png", "hi", "-m", copied)
    assert_refused(run, "pytorch_model.bin", "pickled weights can run code when loaded: refused")
    (copied / "config.json").unlink()
    run = ipn("ask", home / "scene.png", "hi", "-m", copied)
    assert_refused(run, "pickled weights (pytorch_model.bin)", "refused")


def test_a_pickle_under_the_name_of_safetensors(
    home: Path, copied: Path, ipn: Callable[..., Run]
) -> None:
    (copied / "model.safetensors").write_bytes(pickle.dumps({"a": 1}))
    run = ipn("ask", home / "scene.png", "hi", "-m", copied)
    assert_refused(run, "damaged or no safetensors file")


def test_unknown_names_and_keys_in_a_config(
    home: Path, copied: Path, ipn: Callable[..., Run]
) -> None:
    ask = ("ask", home / "scene.png", "hi", "-m", copied)
    edit(copied, lambda c: c.update(interact={"name": "tiny-look", "widht": 12}))
    assert_refused(ipn(*ask), "unknown key", "widht", "did you mean 'width'?")
    edit(copied, lambda c: c.update(interact={"name": "tiny-loop"}))
    assert_refused(ipn(*ask), "unknown interaction 'tiny-loop'", "did you mean 'tiny-look'?")
    edit(copied, lambda c: c.update(promt={}))
    assert_refused(ipn(*ask), "unknown key", "promt", "did you mean 'prompt'?")
    (copied / "config.json").write_text("{")
    assert_refused(ipn(*ask), "config.json' is not valid JSON")


def explode(*_: object, **__: object) -> None:
    raise RuntimeError("no luck")


def test_an_internal_error_is_1_and_shows_its_traceback_only_on_demand(
    home: Path, monkeypatch: pytest.MonkeyPatch, ipn: Callable[..., Run]
) -> None:
    monkeypatch.setattr(IPN, "ask", explode)
    ask = ("ask", home / "scene.png", "hi", "-m", home / "model")
    run = ipn(*ask)
    assert run.code == 1
    assert run.err == (
        "ipn: internal error: RuntimeError: no luck. Run it again with --debug for the traceback.\n"
    )
    for words in ((*ask, "--debug"), ("--debug", *ask)):
        run = ipn(*words)
        assert run.code == 1
        assert "Traceback" in run.err
        assert run.err.endswith("traceback.\n")


def test_a_full_disk_is_1_and_the_old_heatmap_stays(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ipn: Callable[..., Run]
) -> None:
    target = tmp_path / "map.png"
    target.write_bytes(b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    run = ipn("ask", home / "scene.png", "hi", "-m", home / "model", "--heatmap", target)
    assert (run.code, run.out) == (1, "")
    assert "No space left on device" in run.err
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["map.png"]


def test_ctrl_c_is_130_and_says_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, ipn: Callable[..., Run]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(IPN, "ask", interrupt)
    run = ipn("ask", home / "scene.png", "hi", "-m", home / "model")
    assert (run.code, run.out, run.err) == (130, "", "")
