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

from torture.clients import ask, leave, send_slowly, send_too_much

ROOT = Path(__file__).parents[1]
CLIENTS = 200
SECONDS = 300.0
FLAT = 0.05
QUESTIONS = (
    "Is there a dog?", "Is there a cat?", "What is in row 3, column 3?", "Which row is the dog in?",
    "What is to the left of the dog?", "How many dogs are there?",
)  # fmt: skip
PICTURES = ("examples/scene.png", "docs/heatmap.png")
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

    def __init__(self, port: int, alone: dict[tuple[str, str], str], tally: Any) -> None:
        self.port, self.alone, self.tally = port, alone, tally
        self.busy = 0
        self.kinds = dict.fromkeys(("whole", "stream", "slow reader", "slow sender", "left"), 0)
        self.kinds["too much"] = 0

    async def client(self, number: int, until: float) -> None:
        """Do one thing after another."""
        rng = random.Random(number)
        while time.monotonic() < until:
            kind = rng.choices(tuple(self.kinds), (50, 25, 8, 5, 10, 2))[0]
            which = rng.choice(tuple(self.alone))
            started = time.perf_counter()
            try:
                status, said = await self.do(kind, which)
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"
                self.tally.count(time.perf_counter() - started, False, fault, kind)
                continue
            if status == 429:
                self.busy += 1
                await asyncio.sleep(rng.uniform(0.5, 1.5))
                continue
            self.kinds[kind] += 1
            expected = {"left": (0, ""), "too much": (413, "")}.get(kind, (200, self.alone[which]))
            fault = "" if (status, said) == expected else f"{status}, {said!r} for {expected}"
            seconds = time.perf_counter() - started
            self.tally.count(seconds, kind == "too much", fault, f"{kind}, {which}")

    async def do(self, kind: str, which: tuple[str, str]) -> tuple[int, str]:
        """Do one thing; returns the status and the answer."""
        asked = body(*which)
        match kind:
            case "left":
                await leave(self.port, {**asked, "max_tokens": 64})
                return 0, ""
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


async def last_questions(process: Any, port: int, which: Any, count: int) -> list[tuple[int, str]]:
    """Ask, and while they are open tell the server to end."""
    asked = [asyncio.create_task(ask(port, body(*which), gone=True)) for _ in range(count)]
    await asyncio.sleep(1)
    process.send_signal(signal.SIGTERM)
    return list(await asyncio.gather(*asked))


@pytest.mark.weights
def test_a_crowd(tally: Any, scaled: Any, request: pytest.FixtureRequest) -> None:
    counts = tally("requests of 200 clients, against the answers alone")
    ending = tally("requests open while the server is told to end")
    seconds = max(SECONDS * request.config.getoption("--scale"), 15)
    with served() as (process, port):
        alone = {}
        for picture in PICTURES:
            for question in QUESTIONS:
                status, said = asyncio.run(ask(port, body(picture, question)))
                assert status == 200
                alone[picture, question] = said
        assert len(set(alone.values())) > 2, "the answers are too alike to tell them apart"
        crowd = Crowd(port, alone, counts)
        memory = asyncio.run(crowd_of(crowd, process.pid, scaled(CLIENTS), seconds))
        quarter = len(memory) // 4
        early, late = (
            statistics.median(part) for part in (memory[quarter : 2 * quarter], memory[-quarter:])
        )
        counts.more.update(crowd.kinds)
        counts.more.update({"told 429": crowd.busy, "seconds": seconds, "MiB": late})
        counts.more["growth %"] = 100 * (late / early - 1)
        which = next(iter(alone))
        started = time.perf_counter()
        found = asyncio.run(last_questions(process, port, which, 20))
        code = process.wait(timeout=120)
        assert process.stderr is not None
        rest = process.stderr.read()
        for status, said in found:
            good = (status, said) == (200, alone[which]) or status in (0, 429, 503)
            fault = "" if good else f"{status}, {said!r}"
            ending.count(time.perf_counter() - started, status != 200, fault, "open")
        ending.more["answered"] = sum(status == 200 for status, _ in found)
    assert ending.more["answered"] > 0, "nothing that was begun was finished"
    assert code in (0, -signal.SIGTERM), code
    assert "Traceback" not in rest, rest
    if seconds >= SECONDS:
        assert late <= early * (1 + FLAT), f"memory grew from {early:.0f} to {late:.0f} MiB"
