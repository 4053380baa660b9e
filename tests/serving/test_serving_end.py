"""Nobody keeps the server: not by a body that never comes, nor by an answer that is never read."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from servers import connection, gate, head, post, reply, serving, shown, wait_for
from toys import toy_model

from ipn_core.model import IPN
from ipn_core.plugins import Registry
from ipn_core.serving.protocol import Limits


@pytest.fixture(scope="module")
def model(registry: Registry) -> IPN:
    return toy_model(registry, "tiny-look").eval()


def body(**more: Any) -> dict[str, Any]:
    return {"model": "toy", "messages": shown(0, "What?"), "max_tokens": 4, **more}


def test_a_body_that_does_not_come_is_not_waited_for(model: IPN) -> None:
    with serving(model, limits=Limits(seconds=0.3)) as served:
        with connection(served) as slow:
            slow.sendall(head(10_000) + b'{"messages": ')
            status, answer = reply(slow)
        assert status == 408
        assert answer["error"]["message"] == (
            "the body had not come whole after 0.3 s; so far it has 13 bytes."
        )
        assert post(served.address, body(), connection="close")[0] == 200


def test_a_body_that_does_not_come_does_not_keep_the_server_from_ending(model: IPN) -> None:
    with (
        ThreadPoolExecutor(1) as pool,
        serving(model) as served,
        gate(model) as opened,
        connection(served) as stalled,
        connection(served) as silent,
    ):
        stalled.sendall(head(19_900_000) + b"x" * 1_000_000)
        silent.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: ")
        wait_for(lambda: served.service.intake.busy)
        asked = pool.submit(post, served.address, body())
        wait_for(lambda: served.service.batcher.busy)
        served.server.should_exit = True
        status, answer = reply(stalled)
        assert (status, answer["error"]["message"]) == (503, "the server is shutting down.")
        assert silent.recv(100) == b""
        assert not asked.done()
        opened.set()
        assert asked.result()[0] == 200, "what was begun was not finished"
        served.ended()


def test_a_body_that_comes_in_the_last_moment_is_answered(model: IPN) -> None:
    content = json.dumps(body()).encode()
    with serving(model) as served, connection(served) as late:
        late.sendall(head(len(content)) + content[:100])
        wait_for(lambda: served.service.intake.busy)
        served.server.should_exit = True
        wait_for(lambda: served.service.intake.closed)
        late.sendall(content[100:])
        assert reply(late)[0] == 200


def test_who_does_not_read_the_answer_does_not_keep_the_server_from_ending(model: IPN) -> None:
    tokens = 150
    with serving(model, limits=Limits(tokens=tokens)) as served:
        (listening,) = served.server.servers[0].sockets
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1024)
        content = json.dumps(body(stream=True, max_tokens=tokens)).encode()
        served.server.grace_s = 1.0
        with connection(served, buffer=1024) as deaf:
            deaf.sendall(head(len(content)) + content)
            wait_for(lambda: served.service.batcher.busy)
            wait_for(lambda: not served.service.batcher.busy)
            served.server.should_exit = True
            wait_for(lambda: served.service.intake.closed)
            time.sleep(0.4)
            assert served.server.server_state.connections, "it has all of the answer"
            served.ended()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("where", ["_answer", "_note", "_take"])
def test_a_thread_that_has_died_does_not_keep_the_server_from_ending(
    model: IPN, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def die(*_: object) -> None:
        raise ZeroDivisionError

    content = json.dumps(body()).encode()
    with serving(model) as served, connection(served) as one:
        served.server.grace_s = 0.2
        batcher = served.service.batcher
        monkeypatch.setattr(batcher, where, die)
        one.sendall(head(len(content)) + content)
        wait_for(lambda: not batcher.alive)
        assert not batcher.busy
        served.server.should_exit = True
        served.ended()
