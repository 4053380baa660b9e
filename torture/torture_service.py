"""200 clients at once for minutes, on the starter: every answer whole, its own, and no leak."""

from __future__ import annotations

import asyncio
import base64
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from torture.clients import ask, begin, leave, outcome, send_slowly, send_too_much

ROOT = Path(__file__).parents[1]
CLIENTS = 200
OPEN = 20
"""Requests that are open while the server is told to end; all of them may wait."""
STALLED = ((19_000_000, 19_900_000), (100, 200), (0, 0))
"""What is sent of a body, and announced, by those who stall while the server is told to end."""
AT_ONCE = 20
"""Bodies that stall at once; there is room for five of them."""
AT_ONCE_MIB = 200
SECONDS = 300.0
FLAT = 0.05
QUESTIONS = (
    "Is there a dog?", "Is there a cat?", "What is in row 3, column 3?", "Which row is the dog in?",
    "What is to the left of the dog?", "How many dogs are there?",
)  # fmt: skip
PICTURES = ("examples/scene.png", "docs/heatmap.png")
KINDS = ("whole", "stream", "slow reader", "slow sender", "left", "too much")
CODE = "import sys; from ipn_core.cli import main; sys.exit(main())"


@contextmanager
def served() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Serve the starter; yields the process and its port."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", CODE, "serve", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        yield process, next(int(m[1]) for line in lines if (m := re.search(r":(\d+)/v1", line)))
    finally:
        process.kill()


def body(picture: str, question: str, **more: Any) -> dict[str, Any]:
    """What asks a question about a picture."""
    data = base64.b64encode((ROOT / picture).read_bytes()).decode()
    shown = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    content = [shown, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 8, **more}


def resident(pid: int) -> float:
    """MiB of memory that a process holds."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]


class Crowd:
    """Clients that go on until a time, and what became of them."""

    def __init__(self, port: int, alone: dict[tuple[str, str], str], tally: Any, full: Any) -> None:
        self.port, self.alone, self.tally, self.full = port, alone, tally, full
        self.kinds = dict.fromkeys((*KINDS, "cut off"), 0)

    async def client(self, number: int, until: float) -> None:
        """Do one thing after another."""
        rng = random.Random(number)
        while time.monotonic() < until:
            kind = rng.choices(KINDS, (50, 25, 8, 5, 10, 2))[0]
            which = rng.choice(tuple(self.alone))
            started = time.perf_counter()
            try:
                status, said = await self.do(kind, which)
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"
                self.tally.count(time.perf_counter() - started, False, fault, kind)
                continue
            if status == 429:
                self.full.count(time.perf_counter() - started, True, "", kind)
                await asyncio.sleep(rng.uniform(0.5, 1.5))
                continue
            if kind == "too much" and status == 0:
                self.kinds["cut off"] += 1
                self.tally.count(time.perf_counter() - started, True, "", kind)
                continue
            self.kinds[kind] += 1
            expected = {"left": (200, ""), "too much": (413, "")}.get(
                kind, (200, self.alone[which])
            )
            fault = "" if (status, said) == expected else f"{status}, {said!r} for {expected}"
            seconds = time.perf_counter() - started
            self.tally.count(seconds, kind == "too much", fault, f"{kind}, {which}")

    async def do(self, kind: str, which: tuple[str, str]) -> tuple[int, str]:
        """Do one thing; returns the status and the answer."""
        asked = body(*which)
        match kind:
            case "left":
                return await leave(self.port, {**asked, "max_tokens": 64}), ""
            case "too much":
                return await send_too_much(self.port, 25_000_000), ""
            case "slow sender":
                return await send_slowly(self.port, asked, 5)
            case "slow reader":
                return await ask(self.port, {**asked, "stream": True}, pause=3)
        return await ask(self.port, {**asked, "stream": kind == "stream"})


async def watch(pid: int, until: float, found: list[float]) -> None:
    """Look at the memory every second."""
    while time.monotonic() < until:
        found.append(resident(pid))
        await asyncio.sleep(1)


async def crowd_of(crowd: Crowd, pid: int, clients: int, seconds: float) -> list[float]:
    """Let clients at it; returns the memory of each second."""
    until, memory = time.monotonic() + seconds, list[float]()
    everyone = [crowd.client(number, until) for number in range(clients)]
    await asyncio.gather(watch(pid, until, memory), *everyone)
    return memory


async def stall_at_once(pid: int, port: int) -> tuple[list[int], float]:
    """Stall in the middle of many large bodies; returns what most were told, and the MiB taken."""
    before = resident(pid)
    held = await asyncio.gather(*(begin(port, *STALLED[0]) for _ in range(AT_ONCE)))
    told = {asyncio.create_task(outcome(one)) for one in held}
    until, sent_away = time.monotonic() + 45, set[Any]()
    while len(sent_away) < AT_ONCE - 5 and time.monotonic() < until:
        sent_away = {one for one in told if one.done()}
        await asyncio.sleep(0.1)
    taken = resident(pid) - before
    for one in told - sent_away:
        one.cancel()
    await asyncio.wait(told)
    return [one.result() for one in sent_away], taken


def count_the_stalled(pid: int, port: int, tally: Any) -> None:
    """Count who stalls at once and finds no room, and hold the memory of the others bounded."""
    stalled = tally(f"{AT_ONCE} large bodies that stall at once: those without room")
    started = time.perf_counter()
    found, stalled.more["MiB"] = asyncio.run(stall_at_once(pid, port))
    stalled.more["read why"] = found.count(429)
    for status in found:
        fault = "" if status in (0, 429) else f"it got {status}"
        stalled.count(time.perf_counter() - started, True, fault, "stalled")
    assert len(found) == AT_ONCE - 5, f"{len(found)} of {AT_ONCE} were sent away"
    assert stalled.more["MiB"] < AT_ONCE_MIB


async def last_questions(
    process: Any, port: int, which: Any, count: int
) -> tuple[list[tuple[int, str]], list[int]]:
    """Ask, and while questions are open and others stall tell the server to end.

    Returns:
        The status and answer of each question, and the status that each of the others got.
    """
    stalled = [await begin(port, *sizes) for sizes in STALLED]
    asked = [asyncio.create_task(ask(port, body(*which), gone=True)) for _ in range(count)]
    await asyncio.sleep(1)
    process.send_signal(signal.SIGTERM)
    answers = list(await asyncio.gather(*asked))
    return answers, list(await asyncio.gather(*map(outcome, stalled)))


def count_the_end(process: Any, port: int, which: Any, said: str, tally: Any) -> None:
    """Tell the server to end while questions are open and others stall, and count what they get."""
    ending = tally("requests open while the server is told to end")
    stalling = tally("clients that stall while the server is told to end")
    started = time.perf_counter()
    answers, sent_away = asyncio.run(last_questions(process, port, which, OPEN))
    seconds = time.perf_counter() - started
    for found in answers:
        # All were sent a second before, and nobody else asks: each was begun.
        ending.count(seconds, False, "" if found == (200, said) else str(found), "open")
    ending.more["answered"] = sum(status == 200 for status, _ in answers)
    for status, sizes in zip(sent_away, STALLED, strict=True):
        # Who has sent no whole header yet has asked nothing, and gets no answer.
        fault = "" if status == (503 if sizes[1] else 0) else f"it got {status}"
        stalling.count(seconds, True, fault, f"stalled after {sizes}")
    code = process.wait(timeout=120)
    rest = process.stderr.read()
    assert ending.more["answered"] == OPEN, "something that was begun was not finished"
    assert code in (0, -signal.SIGTERM), code
    assert "Traceback" not in rest, rest


@pytest.mark.weights
def test_a_crowd(tally: Any, scaled: Any, request: pytest.FixtureRequest) -> None:
    counts = tally("requests of 200 clients, against the answers alone")
    full = tally("requests of theirs that found the queue full (429)", needed=False)
    seconds = max(SECONDS * request.config.getoption("--scale"), 15)
    with served() as (process, port):
        alone = {}
        for picture in PICTURES:
            for question in QUESTIONS:
                status, said = asyncio.run(ask(port, body(picture, question)))
                assert status == 200
                alone[picture, question] = said
        assert len(set(alone.values())) > 2, "the answers are too alike to tell them apart"
        crowd = Crowd(port, alone, counts, full)
        memory = asyncio.run(crowd_of(crowd, process.pid, scaled(CLIENTS), seconds))
        quarter = len(memory) // 4
        early, late = (
            statistics.median(part) for part in (memory[quarter : 2 * quarter], memory[-quarter:])
        )
        counts.more.update(crowd.kinds)
        counts.more.update({"seconds": seconds, "MiB": late})
        counts.more["growth %"] = 100 * (late / early - 1)
        read, cut = crowd.kinds["too much"], crowd.kinds["cut off"]
        assert cut <= 0.2 * (read + cut), f"{cut} could not read why what they sent is too much"
        count_the_stalled(process.pid, port, tally)
        which = next(iter(alone))
        count_the_end(process, port, which, alone[which], tally)
    if seconds >= SECONDS:
        assert late <= early * (1 + FLAT), f"memory grew from {early:.0f} to {late:.0f} MiB"
