"""The server under too much, too large, too slow, and at its end."""

from __future__ import annotations

import http.client
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from PIL import Image
from servers import Served, connection, gate, head, post, reply, serving, shown, wait_for
from toys import toy_model

from ipn_core.model import IPN
from ipn_core.plugins import Registry
from ipn_core.serving import app, intake, protocol
from ipn_core.serving.protocol import Limits, read_request
from ipn_core.serving.sockets import hosts_of


@pytest.fixture(scope="module")
def model(registry: Registry) -> IPN:
    return toy_model(registry, "tiny-look").eval()


def body(**more: Any) -> dict[str, Any]:
    return {"model": "toy", "messages": shown(0, "What?"), "max_tokens": 4, **more}


def waiting(served: Served, count: int) -> None:
    """Wait until so many requests wait."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        with urllib.request.urlopen(f"{served.address}/healthz") as response:
            if json.loads(response.read())["waiting"] == count:
                return
        time.sleep(0.02)
    pytest.fail(f"there were never {count} requests waiting")


def with_the_model(served: Served) -> None:
    """Wait until the one request is with the model."""
    wait_for(lambda: served.service.batcher.busy and served.service.batcher.depth == 0)


def test_more_than_may_wait_are_told_to_come_back(model: IPN) -> None:
    with serving(model, batch=1, waiting=2) as served, ThreadPoolExecutor(3) as pool:
        with gate(model) as opened:
            asked = [pool.submit(post, served.address, body())]
            with_the_model(served)
            asked += [pool.submit(post, served.address, body()) for _ in range(2)]
            waiting(served, 2)
            status, answer = post(served.address, body())
            assert status == 429
            assert answer["error"]["type"] == "rate_limit_error"
            assert answer["error"]["message"] == ("2 requests wait already. Try again in a moment.")
            opened.set()
        assert [one.result()[0] for one in asked] == [200, 200, 200]


def test_nobodys_pictures_are_decoded_who_is_then_sent_away(
    model: IPN, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[Any] = []

    def read(*given: Any) -> Any:
        reads.append(given)
        return read_request(*given)

    monkeypatch.setattr(app, "read_request", read)
    with serving(model, batch=1, waiting=1) as served, ThreadPoolExecutor(2) as pool:
        with gate(model) as opened:
            asked = [pool.submit(post, served.address, body())]
            with_the_model(served)
            asked += [pool.submit(post, served.address, body())]
            waiting(served, 1)
            assert post(served.address, body())[0] == 429
            opened.set()
        assert [one.result()[0] for one in asked] == [200, 200]
        assert len(reads) == 2
        # A request that turns out wrong gives its place back.
        assert [post(served.address, body(n=2))[0] for _ in range(3)] == [400] * 3
        assert post(served.address, body())[0] == 200


def test_a_request_that_is_being_read_has_its_place_and_few_are_read_at_once(
    model: IPN, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, most, go = [0], [0], threading.Event()

    def read(*given: Any) -> Any:
        now[0] += 1
        most[0] = max(most[0], now[0])
        assert go.wait(30)
        now[0] -= 1
        return read_request(*given)

    monkeypatch.setattr(app, "read_request", read)
    with serving(model, waiting=6) as served, ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(post, served.address, body()) for _ in range(6)]
        waiting(served, 6)
        assert post(served.address, body())[0] == 429
        go.set()
        assert [one.result()[0] for one in asked] == [200] * 6
    assert most == [2]


TOO_LARGE = "the body has more than 10,000 bytes."


def test_a_large_body_is_refused_before_it_is_read(model: IPN) -> None:
    with serving(model, limits=Limits(body=10_000)) as served, connection(served) as one:
        one.sendall(head(20_000_000_000))  # and not a byte of it
        status, answer = reply(one)
        assert (status, answer["error"]["message"]) == (413, TOO_LARGE)


@pytest.mark.parametrize("how", ["of a known length", "chunked", "chunked, once told to go on"])
def test_who_sends_all_of_a_large_body_can_read_why_it_is_refused(model: IPN, how: str) -> None:
    limit = 2_000_000
    pieces = [b"x" * 100_000] * 70  # more than the system keeps for a reader who does not read
    with serving(model, limits=Limits(body=limit)) as served:
        for _ in range(3):
            with connection(served) as one:
                if how == "of a known length":
                    one.sendall(head(7_000_000, connection="close") + b"".join(pieces))
                else:
                    asks = {"expect": "100-continue"} if "told" in how else {}
                    one.sendall(head(connection="close", transfer_encoding="chunked", **asks))
                    if asks:
                        told = b""
                        while not told.endswith(b"\r\n\r\n"):
                            told += one.recv(1)
                        assert told.startswith(b"HTTP/1.1 100 ")
                    one.sendall(b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in pieces))
                    one.sendall(b"0\r\n\r\n")
                status, answer = reply(one)
                assert status == 413
                assert answer["error"]["message"] == "the body has more than 2,000,000 bytes."
        assert post(served.address, body())[0] == 200


def test_who_asks_before_sending_is_refused_at_once(
    model: IPN, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "_SILENT_S", 15.0)
    with serving(model, limits=Limits(body=10_000)) as served, connection(served) as one:
        one.sendall(head(20_000, expect="100-continue"))
        assert reply(one)[0] == 413
        one.settimeout(10)
        assert one.recv(1) == b"", "it is not closed"


def test_what_is_sent_after_a_refusal_is_not_heard_for_ever(model: IPN) -> None:
    with serving(model, limits=Limits(body=10_000)) as served, connection(served) as one:
        one.sendall(head(20_000_000_000))
        with pytest.raises(ConnectionError):
            one.sendall(b"x" * 100_000_000)


@pytest.mark.parametrize("length", [{"length": 10_000}, {"transfer_encoding": "chunked"}])
def test_bodies_that_come_in_have_bounded_room_together(model: IPN, length: dict[str, Any]) -> None:
    small = json.dumps(body(messages=[{"role": "user", "content": "What?"}])).encode()
    with serving(model, limits=Limits(body=10_000)) as served:
        with ExitStack() as stack:
            stalled = [stack.enter_context(connection(served)) for _ in range(5)]
            for one in stalled:
                one.sendall(head(**length) + b"1\r\n{\r\n")
            wait_for(lambda: served.service.intake.free == 0)
            with connection(served) as refused:
                refused.sendall(head(len(small)) + small)
                status, answer = reply(refused)
            assert status == 429
            assert answer["error"]["message"] == (
                "the requests that are coming in take all the room there is. Try again in a moment."
            )
        wait_for(lambda: served.service.intake.free == 50_000)
        assert post(served.address, small)[0] == 200


def test_a_length_beside_chunks_takes_no_less_room(model: IPN) -> None:
    with serving(model, limits=Limits(body=10_000)) as served, connection(served) as one:
        one.sendall(head(1, transfer_encoding="chunked") + b"1\r\n{\r\n")
        wait_for(lambda: served.service.intake.busy)
        assert served.service.intake.free == 40_000


def test_who_is_told_to_come_back_is_told_when(model: IPN) -> None:
    with serving(model, batch=1, waiting=1) as served, ThreadPoolExecutor(2) as pool:
        with gate(model) as opened:
            asked = [pool.submit(post, served.address, body())]
            with_the_model(served)
            asked += [pool.submit(post, served.address, body())]
            waiting(served, 1)
            one = http.client.HTTPConnection(served.address.removeprefix("http://"), timeout=25)
            kind = {"content-type": "application/json"}
            one.request("POST", "/v1/chat/completions", json.dumps(body()), kind)
            refused = one.getresponse()
            assert (refused.status, refused.headers["retry-after"]) == (429, "1")
            opened.set()
        assert [one.result()[0] for one in asked] == [200, 200]


def test_pictures_are_limited_in_number_and_size(model: IPN) -> None:
    with serving(model, limits=Limits(pictures=1, pixels=100)) as served:
        status, answer = post(served.address, body())
        assert (status, "at most 100 are accepted" in answer["error"]["message"]) == (400, True)
        both = shown(0, "a") + shown(1, "b")
        status, answer = post(served.address, body(messages=both))
        assert status == 400
        assert answer["error"]["message"] == (
            "the messages show 2 pictures; at most 1 are accepted."
        )


def plain(width: int, height: int, mode: str = "1") -> bytes:
    """A picture of one colour, as a file that is far smaller than its pixels."""
    out = io.BytesIO()
    Image.new(mode, (width, height)).save(out, "PNG")
    return out.getvalue()


def test_pictures_are_limited_together_before_any_is_decoded(
    model: IPN, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "load_image", lambda *_, **__: pytest.fail("it was decoded"))
    eight = shown(0, "What?", *[plain(7071, 7071)] * 8)
    assert len(json.dumps(eight)) < 70_000
    with serving(model) as served:
        status, answer = post(served.address, body(messages=eight))
        said = answer["error"]["message"]
    assert status == 400
    assert "have 399,992,328 pixels together; at most 50,000,000 are accepted" in said


def test_pictures_are_kept_no_larger_than_any_encoder_looks_at() -> None:
    messages = shown(0, "What?", plain(4096, 1000), plain(30, 5000), plain(2048, 7), plain(9, 9))
    asked = read_request({"messages": messages}, "toy", Limits())
    sizes = [image.size for image in asked.prompt.images]
    assert sizes == [(2048, 500), (12, 2048), (2048, 7), (9, 9)]


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
        status, answer = post(served.address, body(), content_type="text/plain")
        assert status == 415
        assert answer["error"]["message"] == (
            "the body must be sent as application/json, got 'text/plain'."
        )


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_a_local_server_is_reached_by_each_of_its_names(model: IPN, host: str) -> None:
    if host == "::1":
        with socket.socket(socket.AF_INET6) as one:
            try:
                one.bind((host, 0))
            except OSError:
                pytest.skip("this machine has no IPv6")
    with serving(model, host=host, hosts=hosts_of(host)) as served:
        assert post(served.address, body())[0] == 200
        for name in ("127.0.0.1:8000", "localhost", "[::1]:8000", "[::1]"):
            assert post(served.address, body(), host=name)[0] == 200, name
        for name in ("evil.example", "[::2]:8000", "::1", "127.0.0.1.evil.example"):
            assert post(served.address, body(), host=name)[0] == 400, name


def test_only_an_address_of_this_machine_alone_is_asked_by_its_names() -> None:
    local = ("127.0.0.1", "localhost", "[::1]")
    assert hosts_of("::1") == hosts_of("0:0:0:0:0:0:0:1") == hosts_of("Localhost") == local
    assert hosts_of("127.0.0.2") == (*local, "127.0.0.2")
    assert hosts_of("0.0.0.0") == hosts_of("::") == hosts_of("192.0.2.1") == ()


def test_a_key_is_asked_for_if_there_is_one(model: IPN) -> None:
    with serving(model, key="secret") as served:
        assert post(served.address, body())[0] == 401
        assert post(served.address, body(), authorization="Bearer secret")[0] == 200
        with urllib.request.urlopen(f"{served.address}/healthz") as response:
            assert response.status == 200
        for page in ("/metrics", "/v1/models"):
            asked = urllib.request.Request(f"{served.address}{page}")
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(asked)
            asked.add_header("authorization", "Bearer secret")
            with urllib.request.urlopen(asked) as response:
                assert response.status == 200


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


@pytest.mark.parametrize("stream", [True, False])
def test_a_reader_who_goes_before_the_first_piece_is_noticed(model: IPN, stream: bool) -> None:
    asked = json.dumps(body(stream=stream)).encode()
    with serving(model, batch=1) as served, gate(model) as opened:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(post, served.address, body())
            with_the_model(served)
            with connection(served) as gone:
                gone.sendall(head(len(asked)) + asked)
                waiting(served, 1)
            counted = served.service.metrics.cancelled
            wait_for(lambda: counted.collect()[0].samples[0].value == 1)
            opened.set()
            assert first.result()[0] == 200
        wait_for(lambda: not served.service.batcher.busy)
        with urllib.request.urlopen(f"{served.address}/metrics") as response:
            text = response.read().decode()
    assert 'ipn_requests_total{status="499"} 1.0' in text
    assert "ipn_batch_size_count 1.0" in text, "it was answered with nobody to read it"


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


def test_a_fault_while_reading_is_a_500_that_is_counted_and_tells_no_traceback(
    model: IPN, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(model) as served:
        with monkeypatch.context() as patch:
            patch.setattr(app, "read_request", lambda *_: {}["nothing"])
            status, answer = post(served.address, body())
        assert status == 500
        assert answer["error"] == {
            "message": "answering failed: KeyError: 'nothing'",
            "type": "server_error",
            "param": None,
            "code": None,
        }
        with urllib.request.urlopen(f"{served.address}/metrics") as response:
            assert 'ipn_requests_total{status="500"} 1.0' in response.read().decode()
        assert post(served.address, body())[0] == 200
    assert "KeyError: 'nothing'" in caplog.text, "who runs the server is told where it came from"


def test_json_of_any_depth_is_refused_by_name(model: IPN) -> None:
    with serving(model) as served:
        for depth in range(100, 1_100, 20):
            deep = "[" * depth + "]" * depth
            status, answer = post(served.address, f'{{"temperature": {deep}}}'.encode())
            assert status == 400, (depth, answer)


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
