"""Trainings that are started by `accelerate launch`, and a folder that is kept to one of them."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lessons import furthest, lesson, noiseless, stage, training, two_colours, weights

from ipn_core.errors import ConfigError
from ipn_core.files import claim
from ipn_core.training.loop import StageRun

pytestmark = pytest.mark.usefixtures("own_training")

FSDP = "--use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP"
LINES = {
    "processes": ["--multi_gpu --num_processes 2"],
    "fsdp": [f"{FSDP} --num_processes 2"],
    "machines": [
        f"--multi_gpu --num_machines 2 --num_processes 2 --machine_rank {rank} "
        "--main_process_ip 127.0.0.1"
        for rank in (0, 1)
    ],
}
"""What each machine is told."""


def installed(llm: Path, folder: Path) -> Path:
    """A config whose components are installed, on data from a file."""
    rows = []
    for left, right in (("red", "tan"), ("tan", "sky"), ("sky", "ink"), ("ink", "red")):
        two_colours((left, right)).save(folder / f"{left}.png")
        for side, colour in (("left", left), ("right", right)):
            rows.append({"image": f"{left}.png", "question": f"Colour {side}?", "answer": colour})
    (folder / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [{"task": str(folder / "some.jsonl")}]
    values = noiseless(llm, stage("s", "language", steps=2), data=data)
    values["model"]["encoder"] = {"name": "efficientnet-lite0", "size": 64}
    config = folder / "config.yaml"
    config.write_text(json.dumps(values))
    return config


def launch(line: str, config: Path, out: Path, port: int = 0, **more: str) -> subprocess.Popen[str]:
    """Type the line on a machine; `port` is where the processes meet."""
    accelerate = str(Path(sys.executable).parent / "accelerate")
    words = ["launch", *line.split(), "--main_process_port", str(port)]
    own = {"OMP_NUM_THREADS": "1", **more}
    return subprocess.Popen(
        [accelerate, *words, "-m", "ipn_core.training", str(config), "--out", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **own},
    )


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("lines", LINES)
def test_accelerate_launch_gives_the_weights_of_one_process(
    llm: Path, tmp_path: Path, lines: str
) -> None:
    config = installed(llm, tmp_path)
    training(json.loads(config.read_text()), tmp_path / "one").run()
    port = free_port()
    every = [
        launch(line, config, tmp_path / "two", port, ACCELERATE_USE_CPU="true")
        for line in LINES[lines]
    ]
    said = [one.communicate()[1] for one in every]
    assert [one.returncode for one in every] == [0] * len(every), "\n".join(said)
    assert furthest(tmp_path / "one", tmp_path / "two") <= 1e-5
    assert weights(tmp_path / "one") != weights(tmp_path / "two")  # sums in another order


@pytest.mark.slow
def test_a_launcher_that_starts_one_process_instead_of_two_is_noticed(
    llm: Path, tmp_path: Path
) -> None:
    config = installed(llm, tmp_path)
    one = launch("--cpu --num_processes 2", config, tmp_path / "run")
    said = one.communicate()[1]
    assert one.returncode != 0
    assert "ipn: a launcher was told to start several processes, and this one knows of no" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("own", "refused"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "here"}, True),
        ({"WORLD_SIZE": "2"}, True),
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "here", "WORLD_SIZE": "1"}, False),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, False),
        ({"MASTER_ADDR": "here"}, False),
    ],
)
def test_a_process_that_should_have_others_does_not_train_alone(
    llm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own: dict[str, str],
    refused: bool,
) -> None:
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    run = training(lesson(llm, stage("s", "language", steps=1)), tmp_path / "run")
    if not refused:
        assert run._accelerator().num_processes == 1
        return
    with pytest.raises(
        ConfigError, match=r"a launcher was told to start .* 'accelerate launch --multi_gpu'"
    ):
        run.run()
    assert not (tmp_path / "run").exists()


# -- one training in a folder ----------------------------------------------------------------------


def test_a_folder_in_which_a_training_runs_is_refused(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = lesson(llm, stage("s", "language", steps=3))
    advance = StageRun.advance
    tried: list[Any] = []

    def while_it_runs(run: StageRun) -> dict[str, float]:
        if not tried:
            tried.append("")
            with pytest.raises(ConfigError) as raised:
                training(values, tmp_path / "run", resume=True).run()
            tried[0] = str(raised.value)
        return advance(run)

    monkeypatch.setattr(StageRun, "advance", while_it_runs)
    training(values, tmp_path / "run").run()
    assert tried == [
        f"another process trains in '{tmp_path / 'run'}' at this moment. Wait for it, end it, or "
        "choose another folder with --out."
    ]
    with claim(tmp_path / "run" / "lock") as free:
        assert free


def test_where_a_file_system_keeps_no_locks_it_trains_all_the_same(
    llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = lesson(llm, stage("s", "language", steps=1))
    locked: list[Path] = []

    def without(errno_: int) -> None:
        def claimed(path: Path) -> None:
            locked.append(path)
            raise OSError(errno_, os.strerror(errno_))

        monkeypatch.setattr("ipn_core.training.processes.claim", claimed)

    without(errno.ENOLCK)
    training(values, tmp_path / "run").run()
    assert locked == [tmp_path / "run" / "lock"]
    assert weights(tmp_path / "run")
    without(errno.EACCES)
    with pytest.raises(OSError, match="Permission denied"):
        training(values, tmp_path / "other").run()


def test_a_training_that_came_between_is_noticed(llm: Path, tmp_path: Path) -> None:
    values = lesson(llm, stage("s", "language", steps=2))
    late = training(values, tmp_path / "run")
    training(values, tmp_path / "run").run()
    before = weights(tmp_path / "run")
    with pytest.raises(
        ConfigError,
        match=r"another process has trained in .* since this one looked\. Go on .* --resume\.",
    ):
        late.run()
    assert weights(tmp_path / "run") == before
