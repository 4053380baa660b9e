"""Checkpoints hold what was trained, bit for bit, and nothing else is ever loaded."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import picture, toy_model

from ipn_core import checkpoint
from ipn_core.errors import CheckpointError, DownloadError, IPNError, UnknownNameError
from ipn_core.locate import locate_model
from ipn_core.model import IPN
from ipn_core.plugins import get_registry
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig, tiny_backbone


class KilledHere(BaseException):
    """Where a process would have ended."""


@pytest.fixture
def saved(registry: Any, tmp_path: Path) -> Path:
    toy_model(registry, "toy-both").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(registry: Any, folder: Any, **options: Any) -> IPN:
    return IPN.from_pretrained(
        folder,
        backbone=tiny_backbone(),
        encoder=TinyEncoder(TinyEncoderConfig()),
        registry=registry,
        **options,
    )


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    state = {**load_file(folder / "model.safetensors"), **tensors}
    save_file({k: v for k, v in state.items() if v is not None}, folder / "model.safetensors")


@pytest.mark.parametrize("strategy", ["tiny-look", "toy-both", "toy-static"])
def test_a_saved_model_comes_back_bit_for_bit(registry: Any, tmp_path: Path, strategy: str) -> None:
    model = toy_model(registry, strategy)
    model.save_pretrained(tmp_path)
    again = load(registry, tmp_path)
    assert again.config == model.config
    mine, theirs = model.trained_state(), again.trained_state()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    options = {"max_new_tokens": 4}
    assert (
        again.ask(picture(), "What?", **options).ids == model.ask(picture(), "What?", **options).ids
    )


def test_only_the_config_and_the_trained_weights_are_written(saved: Path) -> None:
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]
    assert not any("backbone" in key for key in load_file(saved / "model.safetensors"))


def test_weights_may_be_saved_in_another_dtype(registry: Any, tmp_path: Path) -> None:
    model = toy_model(registry)
    checkpoint.save(model, tmp_path, torch.bfloat16)
    assert {v.dtype for v in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    again = load(registry, tmp_path)
    assert again.stage_dtype == torch.float32
    for key, value in model.trained_state().items():
        assert torch.equal(again.trained_state()[key], value.bfloat16().float())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"slots.request": None}, "missing slots.request"),
        ({"slots.reqest": torch.zeros(2)}, "unexpected slots.reqest .*mean 'slots.request'"),
        ({"slots.request": torch.zeros(2, 9)}, r"slots.request has shape \(2, 9\).* \(1, 32\)"),
        ({"slots.request": torch.full((1, 32), float("nan"))}, "slots.request holds .* not finite"),
        ({"slots.image": torch.full((32,), float("inf"))}, "slots.image holds .* not finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_key(
    registry: Any, saved: Path, changes: Any, reason: str
) -> None:
    change(saved, **changes)
    with pytest.raises(CheckpointError, match=reason):
        load(registry, saved)


def test_a_refused_state_leaves_the_model_as_it_was(registry: Any) -> None:
    model = toy_model(registry)
    before = {k: v.clone() for k, v in model.trained_state().items()}
    state = {k: v + 1 for k, v in before.items()}
    state["slots.request"] = torch.zeros(7)
    with pytest.raises(CheckpointError):
        checkpoint.load_state(model, state, "here")
    assert all(torch.equal(v, before[k]) for k, v in model.trained_state().items())


class Bomb:
    def __reduce__(self) -> Any:
        return (os.mkdir, (str(Path.cwd() / "pwned"),))


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "weights.pth", "a.ckpt", "a.pkl"])
@pytest.mark.parametrize("with_config", [False, True])
def test_pickled_weights_are_refused_and_not_opened(
    registry: Any, saved: Path, name: str, with_config: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved.parent)
    (saved / "model.safetensors").unlink()
    if not with_config:
        (saved / "config.json").unlink()
    (saved / name).write_bytes(pickle.dumps(Bomb()))
    said = (
        rf"there is {name}, but pickled weights can run code when loaded: refused\). "
        "Save the model again"
        if with_config
        else rf"holds pickled weights \({name}\), which can run"
    )
    with pytest.raises(CheckpointError, match=said):
        load(registry, saved)
    assert not Path("pwned").exists()


def test_a_pickle_named_safetensors_is_refused(registry: Any, saved: Path) -> None:
    (saved / "model.safetensors").write_bytes(pickle.dumps({"slots.request": 1}))
    with pytest.raises(CheckpointError, match="damaged or no safetensors file"):
        load(registry, saved)


def test_a_file_cut_short_is_refused(registry: Any, saved: Path) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="damaged"):
        load(registry, saved)


@pytest.mark.parametrize("place", [0.3, 0.6, 0.9])
def test_a_bit_that_has_flipped_in_a_weight_is_noticed(
    registry: Any, saved: Path, place: float
) -> None:
    path = saved / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header + int(place * (len(content) - header))] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CheckpointError, match=r"its tensors are not those that were saved .sha256"):
        load(registry, saved)


@pytest.mark.parametrize("name", ["starter", "photo"])
def test_a_bit_that_has_flipped_in_a_packaged_weight_is_noticed(name: str, tmp_path: Path) -> None:
    for packaged in checkpoint.strategies_of(locate_model(name, get_registry())).values():
        content = bytearray((packaged / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (tmp_path / "model.safetensors").write_bytes(content)

        with pytest.raises(CheckpointError, match="those that were saved"):
            checkpoint.read_weights(tmp_path / "model.safetensors")


def test_weights_that_came_without_a_digest_are_read(registry: Any, saved: Path) -> None:
    change(saved)  # as earlier versions wrote them
    assert load(registry, saved).strategy == "toy-both"


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^there is no model in '.*none': no such folder\.$"):
        checkpoint.strategies_of(tmp_path / "none")


def test_a_link_that_leads_nowhere_is_refused(registry: Any, saved: Path) -> None:
    path = saved / "model.safetensors"
    path.unlink()
    path.symlink_to(path)
    with pytest.raises(CheckpointError, match=r"model.safetensors' is a link that leads nowhere"):
        load(registry, saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_link_out_of_the_folder_is_refused(registry: Any, saved: Path, name: str) -> None:
    outside = saved.parent / name
    (saved / name).rename(outside)
    (saved / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match="is a link out of its folder: refused"):
        load(registry, saved)


def test_the_hubs_links_to_its_own_blobs_are_followed(registry: Any, saved: Path) -> None:
    snapshot = saved.parent / "hub" / "snapshots" / "abc"
    blobs = saved.parent / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in saved.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    assert load(registry, snapshot).strategy == "toy-both"


@pytest.mark.parametrize("done", range(4))
def test_a_save_of_another_strategy_that_ends_anywhere_leaves_one_of_the_two(
    registry: Any, saved: Path, done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`done` of the three replacements: the new config beside the old, the weights, the config."""
    replaced, rename = [], os.replace

    def replace(source: Any, target: Any) -> None:
        if len(replaced) == done:
            raise KilledHere
        replaced.append(Path(target).name)
        rename(source, target)

    old = load(registry, saved)
    new = toy_model(registry, "toy-static", seed=5)
    monkeypatch.setattr(os, "replace", replace)
    if done < 3:
        with pytest.raises(KilledHere):
            new.save_pretrained(saved)
    else:
        new.save_pretrained(saved)
    monkeypatch.undo()

    names = [r"\.config\.[0-9a-f]{64}\.json", r"model\.safetensors", r"config\.json"]
    assert len(replaced) == done
    assert all(map(re.fullmatch, names, replaced))
    found, there = load(registry, saved), old if done < 2 else new
    assert found.config == there.config
    mine, theirs = there.trained_state(), found.trained_state()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)

    with monkeypatch.context() as patch:  # and the next save ends before its weights are there
        done = 1
        replaced.clear()
        patch.setattr(os, "replace", replace)
        with pytest.raises(KilledHere):
            toy_model(registry, "tiny-look", seed=6).save_pretrained(saved)
    assert load(registry, saved).config == there.config

    old.save_pretrained(saved)
    assert load(registry, saved).config == old.config
    assert sorted(p.name for p in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_a_config_changed_by_hand_is_read(registry: Any, saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["prompt"]["system"] = "Be brief."
    (saved / "config.json").write_text(json.dumps(config))
    assert load(registry, saved).config.prompt.system == "Be brief."


def test_a_config_changed_by_hand_stays_where_a_save_over_it_fails(
    registry: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["prompt"]["system"] = "Be brief."
    (saved / "config.json").write_text(json.dumps(config))
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(source: Any, target: Any) -> None:
        if Path(target).name == "model.safetensors":
            raise OSError(errno.ENOSPC, "no room")
        replace(source, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(IPNError, match="What was there is unchanged"):
        toy_model(registry, "toy-both", seed=5).save_pretrained(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_files_intact(
    registry: Any, saved: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(IPNError, match=r"cannot write .*unchanged. Free some space") as caught:
        toy_model(registry, "toy-both", seed=5).save_pretrained(saved)
    assert caught.value.exit_code == 1
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must hold an object"),
        ("{}", "has format None; this version reads 1. Upgrade ipn-core or save"),
        ('{"format": 99}', "has format 99"),
        ('{"format": 1}', "config.json.backbone' is missing"),
    ],
)
def test_a_damaged_config_is_refused(registry: Any, saved: Path, content: str, reason: str) -> None:
    (saved / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=reason):
        load(registry, saved)


def test_an_unknown_key_of_a_config_is_refused_with_the_near_one(
    registry: Any, saved: Path
) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["layout"]["round"] = 1
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"unknown key .*layout.round'.* 'rounds'"):
        load(registry, saved)


@pytest.fixture
def several(registry: Any, tmp_path: Path) -> Path:
    for strategy in ("tiny-look", "toy-static"):
        toy_model(registry, strategy).save_pretrained(tmp_path / strategy)
    index = {"default": "toy-static", "strategies": ["tiny-look", "toy-static"]}
    (tmp_path / "models.json").write_text(json.dumps(index))
    return tmp_path


def test_a_folder_of_several_strategies_gives_the_default_or_the_named_one(
    registry: Any, several: Path
) -> None:
    assert load(registry, several).strategy == "toy-static"
    assert load(registry, several, interact="tiny-look").strategy == "tiny-look"


def test_a_strategy_without_trained_weights_is_refused_with_the_list(
    registry: Any, several: Path
) -> None:
    with pytest.raises(
        CheckpointError, match=r"'toy-both': it has toy-static, tiny-look.*untrained"
    ):
        load(registry, several, interact="toy-both")
    assert load(registry, several, interact="toy-both", untrained=True).strategy == "toy-both"
    with pytest.raises(UnknownNameError, match="unknown strategy 'nothing'"):
        load(registry, several, interact="nothing", untrained=True)


@pytest.mark.parametrize("names", [["../toy"], ["/etc"], [".."], [], "toy-static", [1]])
def test_an_index_that_leads_elsewhere_is_refused(registry: Any, several: Path, names: Any) -> None:
    index = {"default": names[0] if names else "a", "strategies": names}
    (several / "models.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="must hold 'strategies', a list of folder names"):
        load(registry, several)


def test_a_folder_that_is_no_model_and_an_unknown_name_are_refused(
    registry: Any, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"is no model of ours: it has neither config.json"):
        load(registry, tmp_path)
    with pytest.raises(UnknownNameError, match=r"unknown model 'nothing'.*ipn models list"):
        load(registry, "nothing")
    with pytest.raises(UnknownNameError, match=r"unknown model 'x+'.*ipn models list"):
        load(registry, "x" * 5000)


def test_a_hub_that_cannot_be_reached_is_no_fault_of_the_user(registry: Any) -> None:
    with pytest.raises(DownloadError, match=r"cannot fetch model 'no/such' .*try again online"):
        load(registry, "no/such")
    with pytest.raises(UnknownNameError, match=r"cannot find model 'no/x+' here or on the hub"):
        load(registry, f"no/{'x' * 200}")


def test_a_path_with_one_slash_is_no_hub_id_where_its_folder_is(
    registry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownNameError, match=r"'runs' has no 'mnie' .did you mean 'runs/mine'"):
        load(registry, "runs/mnie")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("m.bin", b"anything", "is a pickle, which can run code when loaded: refused. Give"),
        ("m", pickle.dumps([]), "is a pickle, which can run code when loaded: refused. Give"),
        ("m.json", b"{}", "is a file: weights and models are folders. Give the folder, such as '"),
    ],
    ids=["by name", "by content", "another file"],
)
def test_a_file_is_no_model(
    registry: Any, tmp_path: Path, name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        load(registry, tmp_path / name)


@pytest.mark.parametrize("interact", ["tiny-look", {"name": "tiny-look"}])
def test_a_config_without_a_strategy_goes_by_its_interaction(
    registry: Any, tmp_path: Path, interact: Any
) -> None:
    toy_model(registry).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["strategy"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "interact": interact}))
    assert load(registry, tmp_path).strategy == "tiny-look"
    assert list(checkpoint.strategies_of(tmp_path)) == ["tiny-look"]


@pytest.mark.parametrize("held", [["LlamaForCausalLM"], None, [1]])
def test_a_language_model_is_no_checkpoint(registry: Any, tmp_path: Path, held: Any) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": held}))
    with pytest.raises(CheckpointError, match=r"holds a model of transformers .*backbone\.weights"):
        load(registry, tmp_path)
