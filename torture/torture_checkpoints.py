"""Checkpoints that are damaged or hostile: refused with the reason, or what was saved."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from toys import toy_model

from ipn_core import templates
from ipn_core.errors import CheckpointError, UserError
from ipn_core.model import IPN
from ipn_core.plugins import Registry
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig, tiny_backbone
from torture.damage import damages
from torture.tally import peak_mib, reset_peak
from torture.torture_inputs import generated

NAMES = ("config.json", "model.safetensors")


@pytest.fixture(scope="module")
def saved(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good checkpoint."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    toy_model(registry, "toy-both").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def load(registry: Registry) -> Any:
    """Load a folder over a small language model that is already there."""
    backbone, encoder = tiny_backbone(), TinyEncoder(TinyEncoderConfig())

    def load(folder: Path) -> IPN:
        return IPN.from_pretrained(folder, backbone=backbone, encoder=encoder, registry=registry)

    return load


def test_damaged_checkpoints(
    tally: Any, scaled: Any, saved: Path, load: Any, tmp_path: Path
) -> None:
    """Whatever is still taken must hold the weights that were saved, and the config.

    A config is text that people may edit by hand: where its damage leaves it valid, it is an edit,
    and is counted.
    """
    counts = tally("checkpoints with damage in either file")
    expected = load(saved)
    weights, config = expected.trained_state(), expected.config.model_dump()
    counts.more["another config"] = 0
    folder = tmp_path / "model"

    def same(name: str, model: IPN) -> bool:
        mine = model.trained_state()
        another = model.config.model_dump() != config
        counts.more["another config"] += another
        edited = another and name == "config.json"
        return list(mine) == list(weights) and (
            all(torch.equal(mine[k], weights[k]) for k in weights) and (edited or not another)
        )

    @generated(scaled(500))
    @given(st.sampled_from(NAMES), damages())
    def run(name: str, damage: Any) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, folder)
        path = folder / name
        path.write_bytes(damage(path.read_bytes(), (saved / NAMES[0]).read_bytes()))
        counts.attempt(f"{name}, {damage}", lambda: load(folder), good=partial(same, name))

    run()


def _header(values: Any, body: bytes = b"") -> bytes:
    text = values if isinstance(values, bytes) else json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text + body


class Bomb:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return (os.mkdir, ("pwned",))


def _hostile(folder: Path) -> dict[str, Any]:
    """Ways to make a folder hostile, by name."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    one = {"dtype": "F32", "shape": [1, 32], "data_offsets": [0, 128]}
    outside = folder.parent / "outside"

    def link(path: Path, target: Path) -> None:
        path.rename(outside)
        path.symlink_to(target)

    def edit(**changes: Any) -> None:
        config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))

    tensors: dict[str, torch.Tensor] = {"slots.request": torch.zeros(1, 32)}
    return {
        "a header of 2^63 bytes": lambda: weights.write_bytes(struct.pack("<Q", 2**63) + b"{}"),
        "a header of 100 MB": lambda: weights.write_bytes(_header(b" " * 100_000_000)),
        "a header that ends early": lambda: weights.write_bytes(_header(b'{"a": ')),
        "a header of deep lists": lambda: weights.write_bytes(_header(b'{"a":' + b"[" * 90_000)),
        "a tensor of 2^60 values": lambda: weights.write_bytes(
            _header({"slots.request": {**one, "shape": [2**30, 2**30]}}, bytes(128))
        ),
        "a tensor of negative size": lambda: weights.write_bytes(
            _header({"slots.request": {**one, "shape": [-1, 32]}}, bytes(128))
        ),
        "offsets outside": lambda: weights.write_bytes(
            _header({"slots.request": {**one, "data_offsets": [0, 2**40]}}, bytes(128))
        ),
        "offsets backwards": lambda: weights.write_bytes(
            _header({"slots.request": {**one, "data_offsets": [128, 0]}}, bytes(128))
        ),
        "tensors that overlap": lambda: weights.write_bytes(
            _header({"a": one, "b": one}, bytes(128))
        ),
        "one tensor": lambda: save_file(tensors, weights),
        "no tensors": lambda: save_file({}, weights),
        "a tensor too many": lambda: save_file({"os.system": torch.zeros(1)}, weights),
        "a pickle for weights": lambda: weights.write_bytes(pickle.dumps(Bomb())),
        "torch's own pickle": lambda: torch.save(Bomb(), weights),
        "a pickle for a config": lambda: config.write_bytes(pickle.dumps(Bomb())),
        "a pickle beside": lambda: (weights.unlink(), torch.save(Bomb(), folder / "model.pt")),
        "weights that are a folder": lambda: (weights.unlink(), weights.mkdir()),
        "weights that are a link out": lambda: link(weights, outside),
        "weights that link to nothing": lambda: link(weights, folder / "nothing"),
        "weights that link to themselves": lambda: link(weights, weights),
        "a config that is a link out": lambda: link(config, outside),
        "a config that is a device": lambda: link(config, Path("/dev/zero")),
        "a pipe for weights": lambda: (weights.unlink(), os.mkfifo(weights)),
        "a config of deep lists": lambda: config.write_text('{"a": ' + "[" * 200_000),
        "code for a stage": lambda: edit(interact="os:system"),
        "a module for a stage": lambda: edit(interact={"name": "tiny-look", "module": "os"}),
        "auto_map": lambda: edit(auto_map={"AutoModel": "evil.Model"}),
        "a template that runs": lambda: edit(prompt={"template": "{{ ''.__class__.__mro__ }}"}),
        "a template that loops": lambda: edit(
            prompt={"template": "{% for a in range(10**9) %}x{% endfor %}"}
        ),
        "a template of loops in loops": lambda: edit(
            prompt={
                "template": "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
            }
        ),
        "a template of a power that takes years": lambda: edit(
            prompt={"template": "{{ 10 ** (10 ** 12) }}"}
        ),
        "a template that writes 3 GB": lambda: edit(
            prompt={"template": "{{ 'x' * 3000000000 }}{{ messages[0]['content'] }}"}
        ),
        "an index out of the folder": lambda: (folder / "models.json").write_text(
            json.dumps({"default": "../outside", "strategies": ["../outside"]})
        ),
        "another format": lambda: edit(format=10**6),
        "no format": lambda: edit(format=None),
    }


def test_hostile_checkpoints(
    tally: Any, saved: Path, load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = tally("hostile checkpoints: headers, pickles, links, code", limit_s=20)
    monkeypatch.chdir(tmp_path)
    # The bound is the same, and the wait for it shorter.
    templates._PROCESS.end()
    monkeypatch.setattr(templates, "LIMIT_S", 1.0)
    folder = tmp_path / "inner" / "model"
    reset_peak()
    before = peak_mib()
    for name in _hostile(folder):
        shutil.rmtree(tmp_path / "inner", ignore_errors=True)
        shutil.copytree(saved, folder)
        _hostile(folder)[name]()
        counts.attempt(
            name,
            lambda: load(folder),
            good=lambda _: False,
            refusal=UserError,
            holds=lambda: "it ran code" if (tmp_path / "pwned").exists() else "",
        )
    counts.more["MiB"] = peak_mib() - before
    assert counts.more["MiB"] < 1024
    templates._PROCESS.end()


def test_wrong_shapes(tally: Any, scaled: Any, saved: Path, load: Any, tmp_path: Path) -> None:
    counts = tally("tensors renamed, reshaped, recast or not finite")
    from safetensors.torch import load_file

    folder = tmp_path / "model"
    state = load_file(saved / NAMES[1])

    def change(key: str, kind: str) -> dict[str, torch.Tensor]:
        changed, value = dict(state), state[key]
        match kind:
            case "gone":
                del changed[key]
            case "renamed":
                changed[key + "_"] = changed.pop(key)
            case "wider":
                changed[key] = torch.cat([value, value])
            case "flat" if value.ndim > 1:
                changed[key] = value.reshape(-1).clone()
            case "nan" | "inf":
                changed[key] = value.clone()
                changed[key].view(-1)[-1] = float(kind)
            case _:
                changed[key] = torch.cat([value.reshape(-1), value.reshape(-1)[:1]])
        return changed

    kinds = ("gone", "renamed", "wider", "flat", "nan", "inf", "longer")

    @generated(scaled(150))
    @given(st.sampled_from(sorted(state)), st.sampled_from(kinds))
    def run(key: str, kind: str) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved, folder)
        save_file(change(key, kind), folder / NAMES[1])
        counts.attempt(
            f"{key} {kind}", lambda: load(folder), good=lambda _: False, refusal=CheckpointError
        )

    run()
