"""What is measured by a program of its own runs on toys, and stores its section."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ipn_core import shared_cache
from ipn_core.benchmarking import Results
from ipn_core.benchmarking.engine import subjects
from ipn_core.testing.tiny import tiny_backbone

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch, small_interaction: None) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A toy in the language model's place."""
    toy = tiny_backbone("llama-gqa", positions=2048)
    monkeypatch.setattr(subjects, "backbone", lambda device: (toy.to(device), "a toy"))
    return toy


def alone(module: Any, folder: Path, *words: str, **settings: Any) -> Any:
    """Run a program as its command line does; returns the section that it stored."""
    from benchmarks.alone import run_alone

    name = module.__name__.rpartition(".")[2]
    options = ("--threads", "1", "--results", str(folder), *words)
    run_alone(name, module.__doc__, module.measure, words=options, **settings)
    (path,) = folder.glob("*-1-threads.json")
    sections = Results.read(path).sections
    assert [*sections] == [name]
    return sections[name]


def test_decoding_in_every_way_is_measured_and_kept(llm: Any, tmp_path: Path) -> None:
    from benchmarks import decoding

    section = alone(decoding, tmp_path, "--repeats", "2")
    assert {row.name: row.samples for row in section.rows} == {
        "decoding/dynamic": 2,
        "decoding/static": 2,
        "decoding/static : dynamic": 2,
    }
    assert section.about["command"] == ".venv/bin/python -m benchmarks.decoding"
    assert section.notes[:2] == ("language model: a toy", "32 tokens after 139")


def test_a_way_that_decodes_other_tokens_is_not_timed(
    llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import decoding

    monkeypatch.setattr(decoding.Decoding, "static", lambda self: [0])
    with pytest.raises(AssertionError, match=r"'static' finds \[0\], not "):
        decoding.measure(llm, 1, compiles=False)


def test_what_is_only_printed_is_not_kept(
    llm: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import decoding
    from benchmarks.alone import run_alone

    words = ("--repeats", "1", "--threads", "1", "--no-store", "--results", str(tmp_path))
    run_alone("decoding", decoding.__doc__ or "", decoding.measure, words=words)
    assert "decoding/" not in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_profiles_are_measured_and_kept(
    llm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks import profiles

    monkeypatch.setattr(profiles, "QUESTIONS", profiles.QUESTIONS[::4])
    monkeypatch.setattr(profiles, "PREFIXES", (40, 80))
    monkeypatch.setattr(profiles.decoding, "NEW", 4)
    before, worth = shared_cache.WORTH_STORING_ONCE, []
    batch = profiles.Album._our_batch

    def watched(album: Any, count: int) -> Any:
        worth.append(shared_cache.WORTH_STORING_ONCE)
        return batch(album, count)

    monkeypatch.setattr(profiles.Album, "_our_batch", watched)
    with torch.no_grad():
        section = alone(profiles, tmp_path, "--repeats", "1", compiles=False)
    assert worth == [profiles.NEVER] * 3 + [1] * 3
    assert before == shared_cache.WORTH_STORING_ONCE
    shares: dict[str, dict[str, float]] = {}
    for row in section.rows:
        run, _, kind = row.name.removeprefix("profiles/").partition(": ")
        if row.unit == "ratio":
            shares.setdefault(run, {})[kind] = row.median or 0.0
    assert len(shares) == 6
    for found in shares.values():
        assert found.keys() == {*profiles.KINDS, profiles.REST}
        assert min(found.values()) > 0
        assert sum(found.values()) == pytest.approx(1, abs=1e-4)


def test_what_is_written_in_place_counts_as_a_copy() -> None:
    from benchmarks.profiles import shares

    held, other, new = (torch.rand(64, 1 << 15) for _ in range(3))
    at = torch.arange(64)

    def sliced() -> None:
        held[:, 64:] = new[:, 64:]

    def put() -> None:
        held.index_put_((at,), other)

    for run in (
        sliced,
        put,
        lambda: held.index_copy_(0, at, other),
        lambda: torch.cat([held, new], 1),
    ):
        run()
        assert shares(run)["copies"] > 0.5
    assert shares(lambda: held @ held.T)["matrix products"] > 0.5
