"""Naming a published checkpoint: what it may be called, and what is said of wrong names."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from ipn_core.checkpoint import load, open_source
from ipn_core.errors import CheckpointError, UnknownNameError, UserError
from ipn_core.importing import find_import, readers
from ipn_core.model import IPN
from ipn_core.plugins import Registry, discover, get_registry
from ipn_core.testing.checkpoints import save_tiny_model


@pytest.fixture(scope="module")
def registry() -> Registry:
    return discover()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with no more than the config of a published model."""
    write(tmp_path / "published", "LlavaForConditionalGeneration", "llava")
    return tmp_path / "published"


def write(folder: Path, architecture: str, kind: str) -> None:
    folder.mkdir()
    config = {"architectures": [architecture], "model_type": kind}
    (folder / "config.json").write_text(json.dumps(config))


def test_what_is_no_name_of_an_import_is_left_to_others(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "a:b").mkdir()
    for name in ("starter", "owner/name", tmp_path, str(tmp_path / "a:b"), "https://host/x", "C:x"):
        assert find_import(name, registry) is None


def test_a_source_that_is_missing_is_asked_for(registry: Registry) -> None:
    with pytest.raises(
        UserError, match=r"^'llava:' names no checkpoint: .*, such as 'llava:owner/name'\.$"
    ):
        find_import("llava:", registry)


@pytest.mark.parametrize("name", ["LLaVA:x", "lava:x", "Llava:x"])
def test_a_misspelt_importer_gets_the_near_one(registry: Registry, name: str) -> None:
    prefix = name.partition(":")[0]
    with pytest.raises(UnknownNameError, match=rf"^unknown importer '{prefix}'.*mean 'llava'\?"):
        find_import(name, registry)


def test_every_published_architecture_has_its_reader(registry: Registry) -> None:
    kinds = ("llava", "blip-2", "instructblip", "idefics", "llama", None)
    found = [readers(kind, registry) for kind in kinds]
    assert found == [["llava"], ["blip2"], ["instructblip"], ["idefics"], [], []]


@pytest.mark.parametrize(
    ("kind", "hint"),
    [("llava", "'llava:{}' does."), ("mllama", "No importer that is installed does")],
)
def test_another_architecture_is_told_what_reads_it(
    registry: Registry, tmp_path: Path, kind: str, hint: str
) -> None:
    write(tmp_path / "it", "Some", kind)
    imported = find_import(f"blip2:{tmp_path / 'it'}", registry)
    assert imported is not None
    said = f"holds a model of type '{kind}', which blip2 does not read"
    with pytest.raises(CheckpointError, match=f"{said}.*{re.escape(hint.format(tmp_path / 'it'))}"):
        _ = imported.whole


def test_a_folder_without_a_config_says_so(registry: Registry, tmp_path: Path) -> None:
    imported = find_import(f"llava:{tmp_path}", registry)
    assert imported is not None
    with pytest.raises(CheckpointError, match=rf"no config\.json: there is none in '{tmp_path}'"):
        _ = imported.whole


def test_a_checkpoint_whose_language_model_is_none_says_so(
    registry: Registry, folder: Path
) -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "t5"}}
    (folder / "config.json").write_text(json.dumps(config))
    imported = find_import(f"llava:{folder}", registry)
    assert imported is not None
    with pytest.raises(CheckpointError) as raised:
        imported.language_model("auto")
    assert str(raised.value) == (
        f"the language model in '{folder}' is a T5Config, for which transformers has no "
        "causal language model. Import a checkpoint on LLaMA, Vicuna or OPT."
    )


def test_a_published_checkpoint_under_its_bare_name_is_told_its_importer(
    registry: Registry, folder: Path
) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_source(folder, registry)
    assert str(caught.value) == (
        f"'{folder}' holds a published model (LlavaForConditionalGeneration) in the format of "
        f"transformers, which an importer reads: name it 'llava:{folder}'."
    )


def test_a_hubs_weights_are_not_fetched_for_a_model_that_is_none_of_ours(
    registry: Registry, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[list[str]] = []

    def fetched(name: str, allow_patterns: list[str]) -> str:
        wanted.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    with pytest.raises(CheckpointError, match="name it 'llava:some/body'"):
        open_source("some/body", registry)
    assert wanted == [["*.json", "*.md"]]


def test_a_source_that_was_found_is_not_looked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.move(save_tiny_model(tmp_path), tmp_path / "moved")
    found = open_source(tmp_path / "moved", get_registry())
    monkeypatch.setattr("ipn_core.checkpoint.open_source", lambda *_: pytest.fail("looked again"))
    model = load(IPN, found)
    assert (model.name, model.strategy) == (str(tmp_path / "moved"), "tiny-look")
