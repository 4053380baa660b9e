"""The deployment file of examples/, on a Ray cluster of this machine."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import yaml
from layered import Environment, environment_with
from PIL import Image
from servers import png, post, shown

from ipn_core.model import IPN
from ipn_core.testing.checkpoints import save_tiny_model

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray-serve.yaml"
TOKENS = 8


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    folder = tmp_path_factory.mktemp("ray")
    with environment_with(folder / "venv", "ray.serve", ["ray[serve]>=2.46"]) as made:
        made.declare("ipn-tiny", "tiny = ipn_core.testing.plugin")
        made.settings |= {"HOME": str(folder), "OMP_NUM_THREADS": "1"}
        made.settings["RAY_USAGE_STATS_ENABLED"] = "0"
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    save_tiny_model(made)
    return made / "model"


@pytest.fixture(scope="module")
def address(environment: Environment, folder: Path) -> Iterator[str]:
    deployed = yaml.safe_load(EXAMPLE.read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        deployed["http_options"]["port"] = free.getsockname()[1]
    (application,) = deployed["applications"]
    application["args"]["model"] = str(folder)
    (one,) = application["deployments"]
    one["autoscaling_config"]["min_replicas"] = 2
    file = folder.parent / "deployed.yaml"
    file.write_text(yaml.safe_dump(deployed))
    process = subprocess.Popen(
        [environment.python, "-m", "ray.serve.scripts", "run", str(file)],
        env={**os.environ, **environment.settings},
        stdout=(folder.parent / "log").open("w"),
        stderr=subprocess.STDOUT,
    )
    found = f"http://127.0.0.1:{deployed['http_options']['port']}"
    try:
        until = time.monotonic() + 240
        while not (healthy := _healthy(found)) and time.monotonic() < until:
            assert process.poll() is None, (folder.parent / "log").read_text()[-2000:]
            time.sleep(0.5)
        assert healthy, (folder.parent / "log").read_text()[-2000:]
        yield found
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=240)  # a cluster ends slowly beside other work


def _healthy(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/healthz", timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_replicas_answer_as_the_model_does(address: str, folder: Path) -> None:
    model = IPN.from_pretrained(folder)
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

    def ask(seed: int) -> str | None:
        said = client.chat.completions.create(
            model=model.name, messages=shown(seed, f"What {seed}?"), max_tokens=TOKENS
        )
        return said.choices[0].message.content

    with ThreadPoolExecutor(6) as pool:
        said = list(pool.map(ask, range(6)))
    alone = [
        model.ask(Image.open(io.BytesIO(png(seed))), f"What {seed}?", max_new_tokens=TOKENS).text
        for seed in range(6)
    ]
    assert said == alone
    stream = client.chat.completions.create(
        model=model.name, messages=shown(1, "What 1?"), max_tokens=TOKENS, stream=True
    )
    assert "".join(piece.choices[0].delta.content or "" for piece in stream) == alone[1]


def test_what_is_wrong_is_refused_there_too(address: str, folder: Path) -> None:
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="other", messages=shown(1, "What?"))


def test_pages_of_other_sites_are_kept_out_there_too(address: str) -> None:
    assert post(address, {"messages": []}, host="evil.example") == (400, "Invalid host header")
