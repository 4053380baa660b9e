"""Files are whole or absent, and one process at a time holds a lock."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ipn_core.errors import IPNError
from ipn_core.files import (
    atomic_folder,
    atomic_write,
    atomic_writes,
    lock,
    make_folder,
    remove_unfinished,
    sha256_of,
)


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("content", [b"new", lambda to: to.write_bytes(b"new")])
def test_a_written_file_is_whole_and_alone(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"old")
    atomic_write(path, content)
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.txt"]


def test_a_function_receives_a_path_of_the_same_suffix_in_the_same_folder(tmp_path: Path) -> None:
    seen: list[Path] = []

    def write(to: Path) -> None:
        seen.append(to)
        to.write_bytes(b"x")

    atomic_write(tmp_path / "a.png", write)
    assert seen[0].suffix == ".png"
    assert seen[0].parent == tmp_path


def test_a_link_is_followed_and_the_mode_of_the_old_file_kept(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.write_bytes(b"old")
    real.chmod(0o640)
    (tmp_path / "link").symlink_to(real)
    atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert real.read_bytes() == b"new"
    assert real.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_refusal_of_the_system_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(IPNError, match=r"cannot write .*No space left.*Free some space") as caught:
        atomic_write(path, b"new")
    assert caught.value.exit_code == 1
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_of_several_files_none_is_written_where_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(IPNError, match=r"cannot write .*none/b': No such file"):
        atomic_writes({tmp_path / "a": b"new", tmp_path / "none" / "b": b"new"})
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]
    with pytest.raises(IPNError, match=r"cannot write .*a/b': Not a directory"):
        atomic_write(tmp_path / "a" / "b", b"new")
    atomic_writes({tmp_path / "a": b"new", tmp_path / "b": lambda to: to.write_bytes(b"two")})
    assert [(tmp_path / name).read_bytes() for name in names(tmp_path)] == [b"new", b"two"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interruption_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: Any) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def interrupted(to: Path) -> None:
        to.write_bytes(b"half")
        raise error

    with pytest.raises(error):
        atomic_write(path, interrupted)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(IPNError, match="Choose a folder that exists"):
        atomic_write(tmp_path / "none" / "a", b"x")


def fill_half(target: Path) -> None:
    with atomic_folder(target) as building:
        (building / "a").write_bytes(b"x")
        raise ValueError("half")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "f"
    with pytest.raises(ValueError, match="half"):
        fill_half(target)
    assert names(tmp_path) == []
    with atomic_folder(target) as building:
        (building / "a").write_bytes(b"x")
        assert not target.exists()
    assert names(target) == ["a"]
    with pytest.raises(FileExistsError), atomic_folder(target):
        pass


def test_what_a_killed_write_left_can_be_removed(tmp_path: Path) -> None:
    script = f"""
import os
from pathlib import Path
from ipn_core.files import atomic_write

def die(to):
    to.write_bytes(b"half")
    os._exit(9)

atomic_write(Path({str(tmp_path)!r}) / "state.safetensors", die)
"""
    (tmp_path / ".hidden.tmp").touch()
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    assert len(names(tmp_path)) == 2
    remove_unfinished(tmp_path)
    assert names(tmp_path) == [".hidden.tmp"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "f") as building:
        left = building
    left.mkdir()
    (left / "old").write_bytes(b"x")
    (tmp_path / "f").rename(tmp_path / "g")
    with atomic_folder(tmp_path / "f") as building:
        assert names(building) == []


def test_a_lock_excludes_other_processes_and_dies_with_its_holder(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom ipn_core.files import lock\n"
        f"with lock({str(tmp_path / 'l')!r}):\n    print('held', flush=True)\n    sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    waited: list[int] = []

    def kill() -> None:
        waited.append(1)
        holder.kill()

    with lock(tmp_path / "l", kill):
        assert waited == [1]
    holder.communicate()
    with lock(tmp_path / "l", lambda: pytest.fail("nobody holds it")):
        pass


def test_the_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_text("")
    with pytest.raises(IPNError, match=r"cannot write '.*c': Not a directory.*you may write to"):
        make_folder(tmp_path / "file" / "c")
