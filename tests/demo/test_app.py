"""The page as a web application: its limits, and that it tells nobody anything."""

from __future__ import annotations

import io
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.testclient import TestClient
from toys import picture

from ipn_core import IPN
from ipn_core.checkpoint import open_source
from ipn_core.demo.app import create_app
from ipn_core.demo.page import _path
from ipn_core.demo.strategies import Strategies
from ipn_core.demo.visits import Visits
from ipn_core.plugins import get_registry
from ipn_core.serving.sockets import hosts_of
from ipn_core.testing.checkpoints import save_tiny_model

UPLOAD = 50_000
pytestmark = pytest.mark.slow  # Gradio alone takes seconds to be imported


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    registry = get_registry()
    strategies = Strategies(IPN.from_pretrained(folder), open_source(folder, registry), registry)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        yield create_app(Visits(strategies), upload=UPLOAD, hosts=hosts_of("::1"))


@pytest.fixture
def client(app: Any) -> Iterator[TestClient]:
    with TestClient(app, base_url="http://127.0.0.1") as found:
        yield found


def upload(client: TestClient, content: bytes, name: str = "a.png") -> Any:
    return client.post("/gradio_api/upload", files={"files": (name, io.BytesIO(content))})


def test_the_page_is_there_and_asks_browsers_for_nothing_elsewhere(client: TestClient) -> None:
    response = client.get("/")
    assert response.status_code == 200
    assert "Ask a picture" in response.text
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'self'")
    assert "http" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"


def test_making_the_page_calls_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, app: Any
) -> None:
    called: list[Any] = []

    def connect(self: socket.socket, address: Any) -> None:
        called.append(address)
        raise OSError("no calls here")

    monkeypatch.setattr(socket.socket, "connect", connect)
    strategies = SimpleNamespace(name="toy", names=("one",))
    create_app(Visits(strategies))  # type: ignore[arg-type]
    assert not [a for a in called if not isinstance(a, str)], called


def test_a_page_elsewhere_cannot_reach_it_by_another_name(client: TestClient) -> None:
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/", headers={"host": "[::1]:7860"}).status_code == 200


def test_pictures_up_to_the_limit_are_taken(client: TestClient) -> None:
    out = io.BytesIO()
    picture().save(out, "PNG")
    assert upload(client, out.getvalue()).status_code == 200


def test_larger_ones_are_refused_whatever_their_header_says(client: TestClient) -> None:
    assert upload(client, b"x" * (UPLOAD + 1)).status_code == 413
    assert upload(client, b"x" * (UPLOAD * 10)).status_code == 413

    def endless() -> Iterator[bytes]:
        for _ in range(1000):
            yield b"x" * 1000

    response = client.post(
        "/gradio_api/upload",
        content=endless(),
        headers={"content-type": "multipart/form-data; boundary=x"},
    )
    assert response.status_code == 413


def test_files_of_the_machine_cannot_be_read(client: TestClient) -> None:
    for path in ("/etc/passwd", "/etc/hostname", __file__):
        assert client.get(f"/gradio_api/file={path}").status_code in (403, 404)


def ask(client: TestClient, path: str) -> str:
    """Ask about a picture as a page might that is not ours; returns what came back."""
    config = client.get("/config").json()
    number = next(f["id"] for f in config["dependencies"] if len(f["targets"]) == 2)
    picture = {"path": path, "meta": {"_type": "gradio.FileData"}}
    data = [picture, "Is it?", "tiny-look", "nothing", False]
    body = {"data": data, "fn_index": number, "session_hash": "somebody"}
    assert client.post("/gradio_api/queue/join", json=body).status_code == 200
    return client.get("/gradio_api/queue/data", params={"session_hash": "somebody"}).text


def test_an_uploaded_picture_is_asked_and_nothing_else_is_read_or_fetched(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from gradio import processing_utils

    fetched: list[str] = []

    async def fetch(url: str, *_: Any, **__: Any) -> str:
        fetched.append(url)
        return str(tmp_path / "fetched.png")

    monkeypatch.setattr(processing_utils, "async_ssrf_protected_download", fetch)
    out = io.BytesIO()
    picture().save(out, "PNG")
    (path,) = upload(client, out.getvalue()).json()
    assert "data-state" in ask(client, path)
    picture().save(tmp_path / "private.png")
    for other in (str(tmp_path / "private.png"), "/etc/passwd", "https://example.org/a.png"):
        came = ask(client, other)
        assert '"success":false' in came.replace(" ", ""), other
        assert "data-state" not in came
    assert fetched == []


def test_a_picture_is_its_file_alone() -> None:
    assert _path(None) is None
    data = SimpleNamespace(path=None, url="data:image/png;base64,AAAA")
    assert _path(data) is None
    assert _path(SimpleNamespace(path="folder/a.png", url=None)) == "folder/a.png"
