from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from command_line import Run, assert_refused, tree
from huggingface_hub import HfApi, ModelCard, RepoUrl
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

from ipn_core import IPN
from ipn_core.checkpoint import strategies_of


class Hub:
    """A hub in a folder: what `HfApi` is told to commit lies there as a download would."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.private: list[bool] = []

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> RepoUrl:
        assert exist_ok
        validate_repo_id(repo_id)
        self.private.append(private)
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id: str, operations: list[Any], *, commit_message: str) -> None:
        assert commit_message
        for one in operations:
            target = self.folder / repo_id / one.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            with one.as_file() as file:
                target.write_bytes(file.read())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setenv("HF_TOKEN", "hf_for_a_test")
    monkeypatch.setattr(HfApi, "create_repo", lambda _, *a, **k: hub.create_repo(*a, **k))
    monkeypatch.setattr(HfApi, "create_commit", lambda _, *a, **k: hub.create_commit(*a, **k))
    return hub


@pytest.fixture
def trained(home: Path, tmp_path: Path) -> Path:
    """The checkpoint of a training, with a score and what nobody should publish."""
    folder = tmp_path / "run" / "model"
    shutil.copytree(home / "model" / "tiny-look", folder)
    (folder.parent / "train.json").write_text('{"seed": 7}')
    (folder.parent / "state.safetensors").write_bytes(b"not for others")
    (folder / ".model.0123abcd.tmp.safetensors").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    score = {"task": "emoji-scenes", "split": "new", "n": 1200, "accuracy": 0.8125}
    score |= {"ci95": [0.7894, 0.8335], "by_type": {}, "seconds": 1.0}
    (folder / "eval-new.json").write_text(json.dumps(score))
    return folder


def test_a_pushed_model_is_loaded_again(
    hub: Hub, trained: Path, ipn: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(trained)
    run = ipn("push", trained, "me/asks")
    assert (run.code, run.out) == (0, "https://huggingface.co/me/asks\n")
    assert hub.private == [False]
    assert tree(trained) == before
    there = {path.name for path in (hub.folder / "me/asks").iterdir()}
    files = {"config.json", "model.safetensors", "eval-new.json"}
    assert there == {*files, "README.md", "train.json"}

    wanted: list[list[str]] = []

    def fetched(name: str, allow_patterns: list[str]) -> str:
        wanted.append(allow_patterns)
        return str(hub.folder / name)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    again, mine = IPN.from_pretrained("me/asks"), IPN.from_pretrained(trained)
    weights = mine.trained_state()
    assert weights
    # Its weights once it is known to be one of ours.
    assert [any(Path("x.safetensors").match(p) for p in some) for some in wanted] == [False, True]
    for path in (hub.folder / "me/asks").iterdir():
        assert any(path.match(p) for p in wanted[-1])
    assert all(bool((v == weights[k]).all()) for k, v in again.trained_state().items())


def test_a_model_whose_save_was_killed_is_pushed_as_it_is_loaded(
    hub: Hub, trained: Path, ipn: Callable[..., Run]
) -> None:
    """Its weights are the new ones, and their config still waits for its name."""
    model = IPN.from_pretrained(trained)
    model.save_pretrained(trained)
    with safe_open(trained / "model.safetensors", "pt") as file:
        digest = file.metadata()["sha256"]
    config = (trained / "config.json").read_text()
    (trained / f".config.{digest}.json").write_text(config)
    (trained / "config.json").write_text('{"format": 1, "of": "the model before"}')
    assert ipn("push", trained, "me/asks").code == 0
    assert (hub.folder / "me/asks" / "config.json").read_text() == config
    assert not list((hub.folder / "me/asks").glob(".config*"))


def test_the_card_tells_scores_command_config_and_versions(
    hub: Hub, trained: Path, ipn: Callable[..., Run]
) -> None:
    assert ipn("push", trained, "me/asks", "--private").code == 0
    assert hub.private == [True]
    card = ModelCard((hub.folder / "me/asks/README.md").read_text())
    assert card.data.library_name == "ipn-core"
    text = card.text
    assert "| emoji-scenes | new | 1,200 | 81.2 % | 78.9–83.4 % |" in text
    assert "ipn train train.json" in text
    assert 'IPN.from_pretrained("me/asks")' in text
    config = text.split("```json\n")[1].split("\n```")[0]
    assert json.loads(config) == json.loads((trained / "config.json").read_text())
    assert f"ipn-core {version('ipn-core')}, torch {version('torch')}" in text


def test_the_card_tells_what_the_training_validated(
    hub: Hub, trained: Path, ipn: Callable[..., Run]
) -> None:
    """Of `best` the best validation of its last stage, of `model` the last one."""
    lines = [
        {"stage": "align", "stage_index": 0, "step": 9, "accuracy": 0.99, "by_type": {}},
        {"stage": "join", "stage_index": 1, "step": 2, "loss": 1.0},
        *(
            {"stage": "join", "stage_index": 1, "step": step, "accuracy": accuracy}
            | {"by_type": {"emoji-scenes/val/count": accuracy / 2}}
            for step, accuracy in ((2, 0.5), (4, 0.75), (6, 0.625))
        ),
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (trained.parent / "metrics.jsonl").write_text(text + '{"half')
    shutil.copytree(trained, trained.parent / "best")
    for name, step, rows in (("best", 4, ("75.0", "37.5")), ("model", 6, ("62.5", "31.2"))):
        assert ipn("push", trained.parent / name, f"me/{name}").code == 0
        card = (hub.folder / "me" / name / "README.md").read_text()
        assert f"| all, after stage join, step {step} | {rows[0]} % |" in card
        assert f"| emoji-scenes/val/count | {rows[1]} % |" in card
        assert card.count("| all, after") == 1


def test_an_index_is_pushed_with_every_strategy(
    hub: Hub, home: Path, ipn: Callable[..., Run]
) -> None:
    assert ipn("push", home / "model", "me/several").code == 0
    names = sorted(strategies_of(home / "model"))
    assert len(names) > 1
    assert sorted(strategies_of(hub.folder / "me/several")) == names


def test_a_card_that_is_there_is_kept(hub: Hub, trained: Path, ipn: Callable[..., Run]) -> None:
    (trained / "README.md").write_text("# Mine\n")
    assert ipn("push", trained, "me/asks").code == 0
    assert (hub.folder / "me/asks/README.md").read_text() == "# Mine\n"


def test_what_cannot_be_pushed_is_refused(
    hub: Hub, trained: Path, ipn: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_refused(
        ipn("push", trained / "none", "me/asks"), "none' is no folder. Give a checkpoint"
    )
    run = trained.parent
    refused = ipn("push", run, "me/asks")
    assert_refused(refused, f"'{run}' is a training. Push", f"'{trained}'.")
    shutil.copytree(trained, run / "best")
    refused = ipn("push", run, "me/asks")
    assert_refused(refused, f"'{trained}', or '{run / 'best'}' for the best one on its validation")
    (run / "empty").mkdir()
    assert_refused(ipn("push", run / "empty", "me/asks"), "is no model of ours")
    assert_refused(ipn("push", trained, "a/b/c"), "'a/b/c' is no name for a repository")
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert_refused(
        ipn("push", trained, "me/asks"), "there is no token for the hub", "hf auth login"
    )
    assert not hub.folder.exists()


def test_without_a_hub_one_line_says_so(
    trained: Path, ipn: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_for_a_test")
    monkeypatch.setattr(
        HfApi,
        "create_repo",
        lambda *_, **__: (_ for _ in ()).throw(ConnectionError("no route to host")),
    )
    run = ipn("push", trained, "me/asks")
    assert run.code == 1
    assert run.err == (
        "ipn: cannot push to 'me/asks': no route to host. Nothing was published; try again where "
        "the hub can be reached.\n"
    )
