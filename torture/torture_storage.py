"""Disks that are full, folders that are read-only, processes killed anywhere, several at once."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import pictures, toy_model

from ipn_core.errors import IPNError
from ipn_core.model import IPN
from ipn_core.plugins import Registry
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig, tiny_backbone
from ipn_core.training.features import FeatureCache

REFUSED, FAILED = 7, 8
"""How a child ends that was refused, and one that met any other error."""
SYSTEM = {"posix", "nt", "_io", "io", "fcntl"}
NOBODY = 65534


def child(run: Callable[[], object]) -> int:
    """Run something in a fork of this process; returns its exit code, or minus its signal."""
    pid = os.fork()
    if pid == 0:
        code = 0
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            run()
        except IPNError as error:
            code = REFUSED if str(error).strip() else FAILED
        except BaseException:
            code = FAILED
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def dies_at(number: int, run: Callable[[], object]) -> Callable[[], None]:
    """Wrap something so that its process is killed around its system call of that number.

    Every call of a C function of the modules that talk to the system counts twice: right before it
    begins, and right after it has ended.
    """

    def wrapped() -> None:
        seen = 0

        def watch(frame: Any, event: str, function: Any) -> None:
            nonlocal seen
            if event not in ("c_call", "c_return"):
                return
            owner = type(getattr(function, "__self__", None)).__module__
            if {getattr(function, "__module__", None), owner} & SYSTEM:
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        sys.setprofile(watch)
        run()
        sys.setprofile(None)

    return wrapped


class Saves:
    """A model that was saved, and another one that is saved over it."""

    def __init__(self, registry: Registry, folder: Path, strategy: str = "toy-both") -> None:
        self.registry, self.folder = registry, folder
        self.backbone, self.encoder = tiny_backbone(), TinyEncoder(TinyEncoderConfig())
        self.old = toy_model(registry, "toy-both", seed=1)
        self.new = toy_model(registry, strategy, seed=2)

    def save(self) -> None:
        """Save the new one over what is there."""
        self.new.save_pretrained(self.folder)

    def reset(self) -> None:
        """Have the old one there, and nothing else."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.old.save_pretrained(self.folder)

    def which(self) -> str:
        """Say which one is there: "old", "new", or what is wrong."""
        try:
            found = IPN.from_pretrained(
                self.folder, backbone=self.backbone, encoder=self.encoder, registry=self.registry
            ).trained_state()
        except IPNError as error:
            return f"neither: {error}"
        for name, model in (("old", self.old), ("new", self.new)):
            mine = model.trained_state()
            if list(mine) == list(found) and all(torch.equal(found[k], mine[k]) for k in mine):
                return name
        return "neither: the weights of both are mixed"


@pytest.fixture
def saves(registry: Registry, tmp_path: Path) -> Saves:
    """Saves into a folder of their own."""
    return Saves(registry, tmp_path / "model")


@pytest.mark.parametrize("strategy", ["toy-both", "toy-static"])
def test_killed_at_every_system_call_of_a_save(
    tally: Any, registry: Registry, tmp_path: Path, strategy: str
) -> None:
    saves = Saves(registry, tmp_path / "model", strategy)
    over = "" if strategy == "toy-both" else " of another strategy"
    counts = tally(f"a save{over} killed before and after each of its system calls")
    found = {"old": 0, "new": 0}
    for number in range(1_000):
        saves.reset()
        started = time.perf_counter()
        code = child(dies_at(number, saves.save))
        which = saves.which()
        known = which in found and code in (0, -signal.SIGKILL)
        counts.count(
            time.perf_counter() - started, False, "" if known else f"{which} ({code})", f"{number}"
        )
        found[which] = found.get(which, 0) + 1
        if code == 0:
            break
    counts.more.update(old=found["old"], new=found["new"])
    assert code == 0, "it never came to its end"
    assert which == "new"
    assert found["old"] > 5
    assert found["new"] > 5


def limited(size: int, run: Callable[[], object]) -> Callable[[], None]:
    """Wrap something so that the system refuses to make any file larger."""

    def wrapped() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        run()

    return wrapped


def test_a_disk_that_is_full(tally: Any, scaled: Any, saves: Saves) -> None:
    """The system itself refuses each byte beyond a size, as a full disk does."""
    counts = tally("a save that finds no room after so many bytes")
    saves.reset()
    before = {p.name: p.read_bytes() for p in saves.folder.iterdir()}
    largest = max(map(len, before.values()))
    for step in range(scaled(60)):
        size = int(largest * step / scaled(60))
        started = time.perf_counter()
        code = child(limited(size, saves.save))
        after = {p.name: p.read_bytes() for p in saves.folder.iterdir()}
        fault = "" if (code, after) == (REFUSED, before) else f"{code}, {sorted(after)}"
        counts.count(time.perf_counter() - started, True, fault, f"{size} bytes")


def test_a_folder_that_is_read_only(tally: Any, saves: Saves) -> None:
    counts = tally("a save where nothing may be written")
    saves.reset()
    before = {p.name: p.read_bytes() for p in saves.folder.iterdir()}
    for path in (saves.folder, *saves.folder.parents[:3]):
        path.chmod(path.stat().st_mode | 0o055)

    def save() -> None:
        if os.geteuid() == 0:  # whom no permission stops
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        saves.save()

    for target in (saves.folder, saves.folder / "new", Path("/proc/model"), Path("/sys/model")):
        place, saves.folder = saves.folder, target
        started = time.perf_counter()
        code = child(save)
        saves.folder = place
        after = {p.name: p.read_bytes() for p in saves.folder.iterdir()}
        fault = "" if (code, after) == (REFUSED, before) else f"{code}, {sorted(after)}"
        counts.count(time.perf_counter() - started, True, fault, str(target))


def test_processes_that_fill_the_cache_of_features(tally: Any, scaled: Any, tmp_path: Path) -> None:
    """Three at once, some killed: what is kept is right, and the next one encodes only the rest."""
    counts = tally("processes filling the cache of features at once", limit_s=120)
    some = pictures(200)
    expected = TinyEncoder(TinyEncoderConfig()).encode([p.load() for p in some])
    rng = random.Random(0)

    def fill(folder: Path) -> None:
        FeatureCache(TinyEncoder(TinyEncoderConfig()), folder).add(some)

    for number in range(scaled(20)):
        folder = tmp_path / str(number)
        started = time.perf_counter()
        pids = []
        for _ in range(3):
            pids.append(os.fork())
            if pids[-1] == 0:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                try:
                    fill(folder)
                except BaseException:
                    os._exit(FAILED)
                os._exit(0)
        time.sleep(rng.uniform(0, 0.4))
        os.kill(pids[0], signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        cache = FeatureCache(TinyEncoder(TinyEncoderConfig()), folder)
        keys = cache.add(some)
        features = cache.get([[keys[p.name]] for p in some])
        wrong = sum(
            not torch.equal(
                features.values[span.offset : span.offset + span.length],
                one.values.to(torch.bfloat16).float(),
            )
            for span, one in zip(features.images, expected, strict=True)
        )
        fault = "" if not wrong and codes[1:] == [0, 0] else f"{wrong} wrong, {codes}"
        if cache.encoder.encoded:
            fault = fault or f"{cache.encoder.encoded} were encoded again"
        counts.count(time.perf_counter() - started, False, fault, f"round {number}")
        shutil.rmtree(folder)
