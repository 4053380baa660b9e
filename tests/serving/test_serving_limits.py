"""The server under too much, too large, too slow, and at its end."""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from servers import Served, post, serving, shown
from toys import toy_model

from ipn_core.model import IPN
from ipn_core.plugins import Registry
from ipn_core.serving.protocol import Limits


@pytest.fixture(scope="module")
def model(registry: Registry) -> IPN:
    return toy_model(registry, "tiny-look").eval()


def body(**more: Any) -> dict[str, Any]:
    return {"model": "toy", "messages": shown(0, "What?"), "max_tokens": 4, **more}


@contextmanager
def gate(model: IPN) -> Iterator[threading.Event]:
    """Keep the model from its next step until the event is set."""
    opened = threading.Event()
    handle = model.backbone.lm.register_forward_pre_hook(lambda *_: opened.wait(30) and None)
    try:
        yield opened
    finally:
        opened.set()
        handle.remove()


def waiting(served: Served, count: int) -> None:
    """Wait until so many requests wait."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        with urllib.request.urlopen(f"{served.address}/healthz") as response:
            if json.loads(response.read())["waiting"] == count:
                return
        time.sleep(0.02)
    pytest.fail(f"there were never {count} requests waiting")


def test_more_than_may_wait_are_told_to_come_back(model: IPN) -> None:
    with serving(model, batch=1, waiting=2) as served, ThreadPoolExecutor(3) as pool:
        with gate(model) as opened:
            asked = [pool.submit(post, served.address, body())]
            waiting(served, 0)
            time.sleep(0.2)  # the first one is with the model now
            asked += [pool.submit(post, served.address, body()) for _ in range(2)]
            waiting(served, 2)
            status, answer = post(served.address, body())
            assert status == 429
            assert answer["error"]["type"] == "rate_limit_error"
            opened.set()
        assert [one.result()[0] for one in asked] == [200, 200, 200]


def test_a_large_body_is_refused_before_it_is_read(model: IPN) -> None:
    with serving(model, limits=Limits(body=10_000)) as served:
        status, answer = post(served.address, body(user="x" * 20_000))
        assert status == 413
        assert "more than 10,000 bytes" in answer["error"]["message"]


def test_pictures_are_limited_in_number_and_size(model: IPN) -> None:
    with serving(model, limits=Limits(pictures=1, pixels=100)) as served:
        status, answer = post(served.address, body())
        assert (status, "at most 100 are accepted" in answer["error"]["message"]) == (400, True)
        both = shown(0, "a") + shown(1, "b")
        status, answer = post(served.address, body(messages=both))
        assert (status, "at most 1 are accepted" in answer["error"]["message"]) == (400, True)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"{", "the body is no JSON"),
        (b"\xff\xfe", "the body is no JSON"),
        (b"[" * 100_000, "the body is no JSON"),
        (b"[]", "must be a JSON object, got a list"),
        (b"null", "must be a JSON object, got null"),
        (b"3", "must be a JSON object, got a number"),
    ],
)
def test_a_body_that_is_no_object_is_refused(model: IPN, data: bytes, text: str) -> None:
    with serving(model) as served:
        status, answer = post(served.address, data)
        assert (status, text in answer["error"]["message"]) == (400, True), answer


def test_pages_of_other_sites_are_kept_out(model: IPN) -> None:
    with serving(model, hosts=["127.0.0.1"]) as served:
        assert post(served.address, body())[0] == 200
        assert post(served.address, body(), host="evil.example")[0] == 400
        assert post(served.address, body(), content_type="text/plain")[0] == 415


def test_a_key_is_asked_for_if_there_is_one(model: IPN) -> None:
    with serving(model, key="secret") as served:
        assert post(served.address, body())[0] == 401
        assert post(served.address, body(), authorization="Bearer secret")[0] == 200


def test_a_reader_who_goes_away_frees_the_model(model: IPN) -> None:
    with serving(model, batch=1, limits=Limits(tokens=150)) as served:
        connection = http.client.HTTPConnection(served.address.removeprefix("http://"))
        steps: list[int] = []
        handle = model.backbone.lm.register_forward_hook(
            lambda *_: steps.append(1) or time.sleep(0.02)
        )
        connection.request(
            "POST",
            "/v1/chat/completions",
            json.dumps(body(stream=True, max_tokens=150)),
            {"content-type": "application/json"},
        )
        assert connection.getresponse().read(20)
        connection.close()
        status, answer = post(served.address, body())
        handle.remove()
        assert (status, answer["usage"]["completion_tokens"]) == (200, 4)
        assert len(steps) < 100, "the answer went on with nobody to read it"


def test_a_fault_while_answering_is_a_500_and_the_next_answer_comes(model: IPN) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of luck")

    with serving(model) as served:
        handle = model.interaction.register_forward_hook(fail)  # type: ignore[union-attr]
        status, answer = post(served.address, body())
        handle.remove()
        assert status == 500
        assert "out of luck" in answer["error"]["message"]
        assert post(served.address, body())[0] == 200


def test_shutting_down_finishes_what_was_begun(model: IPN) -> None:
    with ThreadPoolExecutor(3) as pool, serving(model, batch=1) as served, gate(model) as opened:
        asked = [pool.submit(post, served.address, body()) for _ in range(3)]
        waiting(served, 2)
        served.server.should_exit = True
        time.sleep(0.3)
        opened.set()
        found = [one.result() for one in asked]
    assert [status for status, _ in found] == [200, 200, 200]
    assert all(answer["usage"]["completion_tokens"] == 4 for _, answer in found)


def test_metrics_count_what_happened(model: IPN) -> None:
    with serving(model) as served:
        post(served.address, body())
        post(served.address, body(n=2))
        with urllib.request.urlopen(f"{served.address}/metrics") as response:
            text = response.read().decode()
    assert 'ipn_requests_total{status="200"} 1.0' in text
    assert 'ipn_requests_total{status="400"} 1.0' in text
    assert 'ipn_tokens_total{kind="completion"} 4.0' in text
    assert "ipn_waiting 0.0" in text


def test_random_state_outside_is_untouched_by_a_seed(model: IPN) -> None:
    with serving(model) as served:
        torch.manual_seed(0)
        expected = torch.rand(3)
        torch.manual_seed(0)
        post(served.address, body(seed=5, temperature=1.0))
        assert torch.equal(torch.rand(3), expected)
