"""The server answers as the model does, through the official client, whoever else asks."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from PIL import Image
from servers import Served, png, post, serving, shown, url_of
from toys import toy_model

from ipn_core.model import IPN
from ipn_core.plugins import Registry

TOKENS = 12


@pytest.fixture(scope="module")
def model(registry: Registry) -> IPN:
    return toy_model(registry, "tiny-look").eval()


@pytest.fixture(scope="module")
def served(model: IPN) -> Iterator[Served]:
    with serving(model) as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0)


def alone(model: IPN, seed: int, question: str, tokens: int = TOKENS) -> str:
    return model.ask(Image.open(io.BytesIO(png(seed))), question, max_new_tokens=tokens).text


def test_the_official_client_gets_what_the_model_says(client: openai.OpenAI, model: IPN) -> None:
    said = client.chat.completions.create(
        model="toy", messages=shown(1, "What is it?"), max_tokens=TOKENS
    )
    (choice,) = said.choices
    assert choice.message.content == alone(model, 1, "What is it?")
    assert choice.finish_reason == "length"
    assert said.usage is not None
    assert said.usage.completion_tokens == TOKENS
    answer = model.ask(Image.open(io.BytesIO(png(1))), "What is it?", max_new_tokens=TOKENS)
    prompt = sum(n for kind, n in answer.tokens.items() if kind != "generated")
    assert said.usage.prompt_tokens == prompt
    assert said.usage.total_tokens == prompt + TOKENS


def test_a_stream_adds_up_to_the_answer(client: openai.OpenAI, model: IPN) -> None:
    pieces = list(
        client.chat.completions.create(
            model="toy",
            messages=shown(2, "What is it?"),
            max_tokens=TOKENS,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert text == alone(model, 2, "What is it?")
    assert len([p for p in pieces if p.choices and p.choices[0].delta.content]) > 1
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == "length"
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == TOKENS


def test_no_answer_is_mixed_between_requests_of_one_batch(
    client: openai.OpenAI, model: IPN, served: Served
) -> None:
    def ask(seed: int) -> str:
        said = client.chat.completions.create(
            model="toy", messages=shown(seed, f"What is {seed}?"), max_tokens=2 + seed % 5
        )
        return said.choices[0].message.content or ""

    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(ask, range(24)))
    expected = [alone(model, seed, f"What is {seed}?", 2 + seed % 5) for seed in range(24)]
    assert found == expected
    assert len(set(expected)) > 12
    metrics = client.get("/../metrics", cast_to=str)
    sizes = {
        line.split("le=")[1].split('"')[1]: float(line.rsplit(" ", 1)[1])
        for line in metrics.splitlines()
        if line.startswith("ipn_batch_size_bucket")
    }
    assert sizes["+Inf"] > sizes["1.0"], "nothing was answered together"


def test_a_seed_gives_the_same_sample_again(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str | None:
        said = client.chat.completions.create(
            model="toy",
            messages=shown(3, "Tell me."),
            max_tokens=TOKENS,
            temperature=1.5,
            seed=seed,
        )
        return said.choices[0].message.content

    with ThreadPoolExecutor(4) as pool:
        first, again, other, _ = pool.map(ask, (7, 7, 8, 9))
    assert first == again
    assert first != other


def test_a_stop_ends_the_answer_and_is_left_out(client: openai.OpenAI, model: IPN) -> None:
    whole = alone(model, 4, "What is it?", 24)
    stop = next(c for c in whole[1:] if c.isprintable() and c not in " \ufffd")
    assert whole.find(stop) > 0
    said = client.chat.completions.create(
        model="toy", messages=shown(4, "What is it?"), max_tokens=24, stop=[stop]
    )
    assert said.choices[0].message.content == whole[: whole.find(stop)].rstrip()
    assert said.choices[0].finish_reason == "stop"
    pieces = client.chat.completions.create(
        model="toy", messages=shown(4, "What is it?"), max_tokens=24, stop=[stop], stream=True
    )
    text = "".join(p.choices[0].delta.content or "" for p in pieces)
    assert text == whole[: whole.find(stop)].rstrip()


def test_turns_and_a_system_message_reach_the_model(client: openai.OpenAI) -> None:
    first = shown(5, "What is it?")
    more = [*first, {"role": "assistant", "content": "a dog"}, {"role": "user", "content": "Why?"}]
    told = [{"role": "system", "content": "Be brief."}, *first]
    found = {
        client.chat.completions.create(model="toy", messages=messages, max_tokens=TOKENS)
        .choices[0]
        .message.content
        for messages in (first, more, told)
    }
    assert len(found) == 3


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["toy"]


def told_of(url: str) -> list[object]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


MANY = (
    "the conversation has 1,001 messages; at most 1,000 are accepted. Leave out the earliest ones."
)
REFUSED = [
    ({"messages": []}, 400, "at least one message"),
    ({"messages": [{"role": "user", "content": "  "}]}, 400, "with some text"),
    ({"messages": [{"role": "robot", "content": "x"}]}, 400, "'role' is one of"),
    ({"messages": [{"role": [], "content": "x"}]}, 400, "'role' is one of"),
    ({"messages": [{"role": {}, "content": "x"}]}, 400, "'role' is one of"),
    ({"messages": [{"role": "user", "content": "\ud800?"}]}, 400, ""),
    ({"messages": told_of("\ud800")}, 400, "addresses are not fetched. Got '\\ud800'"),
    ({"\ud800": 1}, 400, "'\\ud800' is not served. Served are"),
    ({"x" * 100_000: 1}, 400, f"'{'x' * 40}…' is not served. Served are"),
    ({"\ud800" * 100_000: 1}, 400, "\\ud800" * 40 + "…' is not served. Served are"),
    ({"messages": [{"role": "user", "content": "a"}] * 1_001}, 400, MANY),
    ({"messages": [{"role": "user", "content": "a"}] * 20_000}, 400, "has 20,000 messages"),
    ({"model": "x" * 100_000}, 404, "unknown model 'xxx"),
    ({"max_completion_tokens": 0}, 400, "'max_completion_tokens' must be a whole number from 1"),
    ({"messages": [{"role": "user", "content": 3}]}, 400, "a text or a list of parts"),
    ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, 400, "must be {"),
    (
        {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
        400,
        "the last message must be a user's, with some text",
    ),
    (
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "system", "content": "b"},
                {"role": "user", "content": "c"},
            ]
        },
        400,
        "a system message must come first.",
    ),
    (
        {"messages": [{**shown(0, "a")[0], "role": "assistant"}, *shown(0, "b")]},
        400,
        "messages[0]: only a user's message may show pictures.",
    ),
    ({"temperature": 3}, 400, "'temperature' must be a number from 0 to 2"),
    ({"temperature": float("nan")}, 400, "'temperature' must be a number"),
    ({"top_p": "x"}, 400, "'top_p' must be a number"),
    ({"max_tokens": 0}, 400, "'max_tokens' must be a whole number from 1 to 256"),
    ({"max_tokens": True}, 400, "'max_tokens' must be a whole number"),
    ({"n": 2}, 400, "'n' must be 1"),
    ({"stop": ["a"] * 5}, 400, "at most 4"),
    ({"stop": [""]}, 400, "none empty"),
    ({"stream": "yes"}, 400, "'stream' must be true or false"),
    ({"stream_options": []}, 200, ""),
    ({"stream_options": [1]}, 400, "'stream_options' must be an object"),
    ({"logprobs": True}, 400, "'logprobs' is not served"),
    ({"tempurature": 1}, 400, "did you mean 'temperature'?"),
    ({"model": "gpt"}, 404, "unknown model 'gpt': 'toy' is served here"),
]


@pytest.mark.parametrize(("change", "status", "text"), REFUSED)
def test_what_is_wrong_is_refused_by_name(
    served: Served, change: dict[str, object], status: int, text: str
) -> None:
    body = {"model": "toy", "messages": shown(0, "What?"), "max_tokens": 2, **change}
    found, answer = post(served.address, body)
    assert found == status, answer
    if status != 200:
        assert text in answer["error"]["message"]
        assert len(answer["error"]["message"]) < 1_100
        assert len(answer["error"]["param"] or "") < 1_100
        assert answer["error"]["type"] == "invalid_request_error"


PICTURES = [
    ("http://somewhere/cat.png", "addresses are not fetched"),
    ("file:///etc/passwd", "addresses are not fetched"),
    ("data:image/png;base64,???", "this is no base64"),
    (url_of(b"no picture"), "is not an image of a kind that is read"),
    (url_of(png()[:-60]), "is damaged or cut short"),
]


@pytest.mark.parametrize(("url", "text"), PICTURES)
def test_a_picture_that_is_none_is_refused(client: openai.OpenAI, url: str, text: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    content = [part, {"type": "text", "text": "What?"}]
    with pytest.raises(openai.BadRequestError, match=text):
        client.chat.completions.create(
            model="toy",
            messages=[{"role": "user", "content": content}],  # type: ignore[list-item, misc]
        )


def test_a_prompt_beyond_the_context_is_refused_and_hurts_no_other(
    client: openai.OpenAI, model: IPN
) -> None:
    def ask(question: str) -> str:
        try:
            said = client.chat.completions.create(
                model="toy", messages=shown(6, question), max_tokens=TOKENS
            )
        except openai.BadRequestError as error:
            return str(error)
        return said.choices[0].message.content or ""

    with ThreadPoolExecutor(3) as pool:
        fine, long, other = pool.map(ask, ("Who?", "word " * 5000, "Where?"))
    assert fine == alone(model, 6, "Who?")
    assert other == alone(model, 6, "Where?")
    assert "fit into the context" in long
