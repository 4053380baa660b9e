from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import Run, assert_refused, edit, tree
from PIL import Image
from safetensors.torch import load_file, save_file

from ipn_core import IPN
from ipn_core.cli import main
from ipn_core.testing.interactions import TinyLook

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


@pytest.mark.parametrize("command", ["ask", "eval", "chat"])
def test_commands_run_where_and_as_they_are_told(
    home: Path, ipn: Callable[..., Run], command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ipn_core import placing

    placed: list[tuple[str | None, str | None]] = []
    place = placing.place

    def spy(model: IPN, device: str | None = None, dtype: str | None = None) -> IPN:
        placed.append((device, dtype))
        return place(model, device, dtype)

    monkeypatch.setattr(placing, "place", spy)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    first = {"ask": (home / "scene.png", "hi"), "eval": (home / "q.jsonl",), "chat": ("a.png",)}
    words = [*first[command], "-m", home / "model", "--device", "cpu"]
    if command == "chat":
        words[0] = home / "scene.png"
    if command == "eval":
        words[0].write_text(json.dumps({"image": "scene.png", "question": "hi", "answer": "a"}))
    assert ipn(command, *words, "--dtype", "bfloat16").code == 0
    assert placed == [("cpu", "bfloat16")]
    refused = ipn(command, *words, "--dtype", "int8")
    assert_refused(refused, "'--dtype' must be one of float32, bfloat16, float16, got 'int8'")


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


def test_an_interaction_without_a_map_is_refused_before_anything_is_said_of_its_weights(
    home: Path, tmp_path: Path, ipn: Callable[..., Run]
) -> None:
    only = home / "model" / "tiny-look"
    ask = ("ask", home / "scene.png", "hi", "-m", only, "-i", "tiny-mean", "--untrained")
    assert_refused(ipn(*ask, "--heatmap", tmp_path / "map.png"), "keeps no attention map")


def test_a_damaged_picture_is_all_that_stderr_speaks_of(
    home: Path, tmp_path: Path, ipn: Callable[..., Run]
) -> None:
    Image.open(home / "scene.png").save(tmp_path / "a.tif")
    content = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(content[:-20])
    assert_refused(ipn("ask", tmp_path / "a.tif", "hi", "-m", home / "model"), "a.tif")


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


def test_the_trace_is_a_page_of_its_own_whatever_was_asked(
    home: Path, tmp_path: Path, ipn: Callable[..., Run]
) -> None:
    target = tmp_path / "trace.html"
    hostile = "<script>alert(1)</script> Is there a dog?"
    for interact in ("tiny-look", "tiny-mean"):  # the second one keeps no map
        words = ("-m", home / "model", "--interact", interact, "--trace", target)
        run = ipn("ask", home / "scene.png", hostile, *words)
        assert run.code == 0
        assert run.err == f"ipn: how it answered: {target}\n"
        page = target.read_text(encoding="utf-8")
        assert page.startswith("<!doctype html>")
        assert "<script" not in page
        assert "&lt;script&gt;alert(1)&lt;/script&gt; Is there a dog?" in page
        assert ("<figure" in page) == (interact == "tiny-look")


@pytest.mark.parametrize("words", [(), ("--json",)])
def test_the_answer_comes_before_the_note_about_the_heatmap(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("sys.stderr", terminal)
    ask = ["ask", str(home / "scene.png"), "hi", "-m", str(home / "model"), *words]
    assert main([*ask, "--heatmap", str(tmp_path / "map.png")]) == 0
    assert terminal.getvalue().splitlines()[-1].startswith("ipn: where it looked: ")


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
    (folder / "m.bin").write_bytes(pickle.dumps({"a": 1}))
    (folder / "nothing").mkdir()
    (folder / "d.png").mkdir()
    return {
        "missing": ((folder / "none.png", "hi"), "no such file"),
        "folder": ((folder, "hi"), "is a folder"),
        "text": ((folder / "text.png", "hi"), "not an image"),
        "empty": ((folder / "empty.png", "hi"), "not an image"),
        "cut": ((folder / "cut.png", "hi"), "damaged or cut short"),
        "bomb": (
            (folder / "bomb.png", "hi"),
            "has 900,000,000 pixels; at most 50,000,000 are accepted",
        ),
        "long name": (("x" * 5000, "hi"), "cannot be read (File name too long)"),
        "no question": ((picture, "  \n"), "the question is empty"),
        "bytes": ((picture, "what \udcff"), "not valid text"),
        "long": ((picture, "why " * 200, "-m", model), "fit into the context"),
        "model": ((picture, "hi", "-m", "startre"), "unknown model 'startre'"),
        "near model": ((picture, "hi", "-m", "startre"), "did you mean 'starter'?"),
        "long model": ((picture, "hi", "-m", "x" * 5000), "unknown model 'xxx"),
        "file": ((picture, "hi", "-m", picture), "is a file: weights and models are folders"),
        "pickle": ((picture, "hi", "-m", folder / "m.bin"), "is a pickle"),
        "no model": ((picture, "hi", "-m", folder / "nothing"), "is no model of ours"),
        "interact": ((picture, "hi", "-m", model, "-i", "tiny-lok"), "did you mean 'tiny-look'?"),
        "no interact": ((picture, "hi", "-m", model, "-i", ""), "weights for interaction ''"),
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
        "long map": ((picture, "hi", "--heatmap", "x" * 300 + ".png"), "than a file's name can be"),
        "map is a folder": ((picture, "hi", "--heatmap", folder / "d.png"), "is a folder"),
        "map is the picture": ((picture, "hi", "--heatmap", picture), "is the picture itself"),
        "trace type": ((picture, "hi", "--trace", folder / "a.png"), "does not end in .html"),
        "trace folder": ((picture, "hi", "--trace", folder / "n" / "a.html"), "there is no folder"),
    }


CASES = (
    "missing", "folder", "text", "empty", "cut", "bomb", "long name", "no question", "bytes",
    "long", "model", "near model", "long model", "file", "pickle", "no model", "interact",
    "no interact", "untrained", "no map", "map type", "map folder", "long map", "map is a folder",
    "map is the picture", "trace type", "trace folder",
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


def test_an_interaction_by_its_bare_name(home: Path, copied: Path, ipn: Callable[..., Run]) -> None:
    edit(copied, lambda c: c.update(interact="tiny-look", strategy=None))
    ask = ("ask", home / "scene.png", "hi", "-m")
    assert ipn(*ask, copied).out == ipn(*ask, home / "model" / "tiny-look").out != ""


def test_a_language_model_that_lacks_a_tensor(
    home: Path, copied: Path, tmp_path: Path, ipn: Callable[..., Run]
) -> None:
    llm = Path(shutil.copytree(home / "llm", tmp_path / "llm"))
    edit(copied, lambda c: c.update(backbone={"name": "llama", "weights": str(llm)}))
    state = load_file(llm / "model.safetensors")
    state.pop("model.norm.weight")
    save_file(state, llm / "model.safetensors", {"format": "pt"})
    ask = ("ask", home / "scene.png", "hi", "-m", copied)
    assert_refused(ipn(*ask), "do not fit their config", "missing model.norm.weight")
    (llm / "model.safetensors").write_bytes(b"nonsense")
    assert_refused(ipn(*ask), "cannot be loaded", "Fetch or save them again")


@pytest.mark.parametrize("importer", ["llava", "blip2", "instructblip", "idefics"])
def test_a_published_checkpoint_out_of_reach_is_one_line_and_1(
    home: Path, ipn: Callable[..., Run], importer: str
) -> None:
    run = ipn("ask", home / "scene.png", "hi", "-m", f"{importer}:no/such")
    assert (run.code, run.out, run.err.count("\n")) == (1, "", 1)
    assert f"cannot fetch the weights '{importer}:no/such' from the hub" in run.err


def test_a_hub_that_cannot_be_reached_is_1(home: Path, ipn: Callable[..., Run]) -> None:
    run = ipn("ask", home / "scene.png", "hi", "-m", "no/such")
    assert (run.code, run.out) == (1, "")
    assert "cannot fetch model 'no/such' from the hub" in run.err


def test_a_stage_that_fails_is_1(
    home: Path, monkeypatch: pytest.MonkeyPatch, ipn: Callable[..., Run]
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(TinyLook, "forward", full)
    run = ipn("ask", home / "scene.png", "hi", "-m", home / "model")
    assert (run.code, run.out) == (1, "")
    assert "stage interact of plugin tiny local failed: OutOfMemoryError: no room" in run.err


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
    ask = ("ask", home / "scene.png", "hi", "-m", home / "model")
    run = ipn(*ask, "--heatmap", target)
    assert (run.code, run.out) == (1, ipn(*ask).out)  # the answer is there all the same
    assert "No space left on device" in run.err
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["map.png"]


def test_a_trace_that_the_disk_has_no_room_for_leaves_no_heatmap_but_the_answer(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ipn: Callable[..., Run]
) -> None:
    sync = os.fsync

    def full(descriptor: int) -> None:
        if os.pread(descriptor, 9, 0) == b"<!doctype":
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    ask = ("ask", home / "scene.png", "hi", "-m", home / "model")
    run = ipn(*ask, "--heatmap", tmp_path / "map.png", "--trace", tmp_path / "trace.html")
    assert (run.code, run.out) == (1, ipn(*ask).out)
    (told,) = run.err.splitlines()
    assert told.startswith(f"ipn: cannot write '{tmp_path / 'trace.html'}': No space left")
    assert os.listdir(tmp_path) == []


def test_ctrl_c_is_130_and_says_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, ipn: Callable[..., Run]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(IPN, "ask", interrupt)
    run = ipn("ask", home / "scene.png", "hi", "-m", home / "model")
    assert (run.code, run.out, run.err) == (130, "", "")
