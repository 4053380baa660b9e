"""Bad inputs: pictures, files of text, prompts. No traceback, no hang, no partial output."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from toys import picture, toy_model

from ipn_core.cli import main
from ipn_core.config import load_yaml, set_by_path
from ipn_core.errors import PromptError, UserError
from ipn_core.images import MAX_PIXELS, check_image, load_image
from ipn_core.model import IPN
from ipn_core.plan import Tokens
from ipn_core.plugins import Registry
from ipn_core.prompt import Prompt
from ipn_core.serving.app import create_app
from ipn_core.serving.protocol import Limits
from ipn_core.tasks import open_task
from ipn_core.testing.checkpoints import save_tiny_model
from torture.clients import through
from torture.damage import CORPUS, ODD, damages
from torture.tally import Tally, peak_mib, reset_peak

MEMORY_MIB = 1024
"""What decoding one picture may need: 50 million pixels of four bytes, held four times over."""


def generated(count: int) -> Callable[[Any], Any]:
    """Run a function on so many cases, the same ones each time."""

    def wrap(test: Any) -> Any:
        checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
        checks += [HealthCheck.large_base_example]
        some = settings(max_examples=count, database=None, deadline=None)
        return seed(0)(settings(some, suppress_health_check=checks)(test))

    return wrap


def is_upright(image: Any) -> bool:
    """Whether it is what `load_image` promises."""
    return (
        isinstance(image, Image.Image)
        and image.mode == "RGB"
        and 0 < image.width * image.height <= MAX_PIXELS
    )


# -- pictures --------------------------------------------------------------------------------------


def test_damaged_pictures(tally: Any, scaled: Any, tmp_path: Path) -> None:
    counts = tally("pictures with damage, as bytes and as files")
    names = sorted(CORPUS)
    path = tmp_path / "picture"
    reset_peak()
    before = peak_mib()

    @generated(scaled(1200))
    @given(st.sampled_from(names), st.sampled_from(names), damages(), st.sampled_from([0, 1]))
    def run(name: str, other: str, damage: Any, as_file: int) -> None:
        content: Any = damage(CORPUS[name], CORPUS[other])
        if as_file:
            path.write_bytes(content)
        source = path if as_file else content
        counts.attempt(f"{name}, {damage}", lambda: load_image(source), good=is_upright)

    run()
    counts.more["MiB"] = peak_mib() - before
    assert counts.more["MiB"] < MEMORY_MIB


def test_odd_pictures(tally: Any, tmp_path: Path) -> None:
    """What is no picture, bombs, and every good file under every extension."""
    counts = tally("bombs, headers that lie, and what is no picture")
    reset_peak()
    before = peak_mib()
    for name, content in ODD.items():
        counts.attempt(name, lambda c=content: load_image(c), good=is_upright)
        counts.attempt(f"{name}, a glance", lambda c=content: check_image(c))
    counts.more["MiB"] = peak_mib() - before
    assert counts.more["MiB"] < MEMORY_MIB
    good = tally("good pictures under any extension")
    for name, content in CORPUS.items():
        for ending in (".jpg", ".png", ".gif", ".webp", ".tif", ".txt", ""):
            path = tmp_path / f"a{ending}"
            path.write_bytes(content)
            good.attempt(f"{name} as '{ending}'", lambda p=path: load_image(p), good=is_upright)
    assert not good.refused


def test_the_largest_pictures(tally: Any) -> None:
    """As many pixels as may be, in the modes that need the most memory."""
    counts = tally("pictures of 50 million pixels", limit_s=60)
    side = math.isqrt(MAX_PIXELS)
    for mode in ("RGBA", "CMYK", "1", "I;16"):
        reset_peak()
        image = Image.new(mode, (side, side))
        before = peak_mib("VmRSS")
        counts.attempt(mode, lambda i=image: load_image(i), good=is_upright)
        counts.more["MiB"] = max(counts.more.get("MiB", 0), peak_mib() - before)
    assert counts.more["MiB"] < MEMORY_MIB


def test_damaged_pictures_that_are_asked_about(tally: Any, scaled: Any, tmp_path: Path) -> None:
    """`ipn ask` itself, with the files that it writes: both are there, or nothing is."""
    counts = tally("damaged pictures given to `ipn ask --heatmap --trace`")
    folder = tmp_path / "given"
    folder.mkdir()
    model = save_tiny_model(tmp_path / "models")
    picture, written = folder / "picture", ("map.png", "trace.html")
    options = ["-m", str(model)]
    for option, name in zip(("--heatmap", "--trace"), written, strict=True):
        options += [option, str(folder / name)]
    made = {"picture", *written}

    def ask(content: bytes) -> None:
        for path in folder.iterdir():
            path.unlink()
        picture.write_bytes(content)
        out, told = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(told):
            code = main(["ask", str(picture), "What is it?", *options])
        left = {path.name for path in folder.iterdir()}
        assert "Traceback" not in told.getvalue()
        if code == 2:
            assert (left, out.getvalue()) == ({"picture"}, "")
            assert str(picture) in told.getvalue()
            assert told.getvalue().count("\n") == 1
            raise UserError(told.getvalue())
        assert (code, left) == (0, made), (code, left, told.getvalue())

    @generated(scaled(200))
    @given(st.sampled_from(sorted(CORPUS)), st.sampled_from(sorted(CORPUS)), damages())
    def run(name: str, other: str, damage: Any) -> None:
        content = damage(CORPUS[name], CORPUS[other])
        counts.attempt(f"{name}, {damage}", lambda: ask(content))

    run()
    for name in sorted(ODD)[: scaled(len(ODD))]:
        counts.attempt(name, lambda c=ODD[name]: ask(c))


# -- files of text ---------------------------------------------------------------------------------

GOOD_YAML = Path(__file__).parents[1] / "examples" / "compare.yaml"
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.binary(max_size=9),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=12,
)


def test_broken_yaml(tally: Any, scaled: Any, tmp_path: Path) -> None:
    counts = tally("YAML configs: damaged, invalid UTF-8, and arbitrary trees")
    path = tmp_path / "config.yaml"
    good = GOOD_YAML.read_bytes()

    @generated(scaled(300))
    @given(
        st.one_of(
            damages().map(lambda d: d(good, b"&a [*a, *a]")),
            st.binary(max_size=60),
            TREES.map(lambda tree: yaml.safe_dump(tree).encode("utf-8", "replace")),
        )
    )
    def run(content: bytes) -> None:
        path.write_bytes(content)
        counts.attempt(
            repr(content[:80]), lambda: load_yaml(path), good=lambda v: isinstance(v, dict)
        )

    run()
    for name, text in {
        "aliases": "a: &a [1]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(40)),
        "deep": "a: " + "[" * 3_000,
        "deep maps": "{a: " * 3_000,
        "tag": "a: !!python/object/apply:os.system ['true']",
        "tag of a name": "a: !!python/name:os.system",
        "anchor to itself": "a: &a\n  b: *a",
        "key twice": "a: 1\na: 2",
        "long line": "a: '" + "x" * 2_000_000 + "'",
    }.items():
        path.write_text(text)
        counts.attempt(name, lambda: load_yaml(path), good=lambda v: isinstance(v, dict))


def test_assignments(tally: Any, scaled: Any) -> None:
    counts = tally("key=value of the command line")
    base = yaml.safe_load(GOOD_YAML.read_text())

    @generated(scaled(200))
    @given(
        st.one_of(
            st.text(max_size=30),
            st.tuples(
                st.sampled_from(
                    [
                        "model",
                        "model.strategy",
                        "stages.0.lr",
                        "stages.align.steps",
                        "arms",
                        "data.9.task",
                        "a.b",
                    ]
                ),
                st.text(max_size=12),
            ).map("=".join),
        )
    )
    def run(text: str) -> None:
        counts.attempt(repr(text), lambda: set_by_path(json.loads(json.dumps(base)), text))

    run()


def _records() -> list[dict[str, Any]]:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]
    return [
        {"image": "a.png", "question": "What?", "answer": "dog"},
        {"image": ["a.png", "a.png"], "question": "What?", "answer": ["dog", "a dog"], "looks": 1},
        {"id": 7, "image": "a.png", "conversations": turns},
        {"images": ["a.png", None], "texts": [None, "A dog."]},
        {"text_list": ["a"], "image_info": [{"image_name": "a.png", "matched_text_index": 0}]},
    ]


KEYS = sorted({key for record in _records() for key in record} | {"id", "type", "hops", "metadata"})


def _changed(record: dict[str, Any], key: str, value: Any, inner: bool) -> dict[str, Any]:
    """Put a value in the place of another, in the record or in a list of it."""
    changed = json.loads(json.dumps(record))
    if inner and isinstance(changed.get(key), list) and changed[key]:
        changed[key][0] = value
    else:
        changed[key] = value
    return changed


def test_broken_records(tally: Any, scaled: Any, tmp_path: Path) -> None:
    counts = tally("JSONL and JSON: wrong values, damaged bytes, invalid UTF-8")
    picture(1).save(tmp_path / "a.png")
    values = st.recursive(
        st.one_of(SCALARS.filter(lambda v: not isinstance(v, bytes)), st.just("a.png")),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
        max_leaves=5,
    )
    wrong = st.builds(
        _changed, st.sampled_from(_records()), st.sampled_from(KEYS), values, st.booleans()
    )

    def read(name: str, content: bytes) -> Any:
        (tmp_path / name).write_bytes(content)
        examples = open_task(str(tmp_path / name)).examples("all")
        return [[p.load() for p in e.images] for e in examples]

    @generated(scaled(400))
    @given(st.lists(wrong, min_size=1, max_size=3), st.booleans(), st.none() | damages())
    def run(rows: list[Any], lines: bool, damage: Any) -> None:
        text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
        content = text.encode() if damage is None else damage(text.encode(), b"\xff\xfe\x00")
        name = "some.jsonl" if lines else "some.json"
        counts.attempt(repr(content[:200]), lambda: read(name, content))

    run()


# -- prompts ---------------------------------------------------------------------------------------

MARKERS = [
    "<img>",
    "<img-q>",
    "<img-d>",
    "<image>",
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "<pad>",
    "{{ x }}",
    "{% for %}",
    "\x00",
    "\u202e",
    "\ufffd",
    "😀",
    "\r\n",
    "<think>",
]


@pytest.fixture(scope="module")
def model(registry: Registry) -> IPN:
    """A small model that looks."""
    return toy_model(registry, "tiny-look").eval()


def is_text(model: IPN, question: str) -> Callable[[Any], bool]:
    """Whether a question became the ids of its characters and nothing else."""
    tokenizer = model.backbone.tokenizer
    special = set(tokenizer.all_special_ids)
    plain = model.planner.plan(Prompt.user("x", picture()))
    usual = [type(piece) for piece in plain.pieces]

    def check(plan: Any) -> bool:
        ids = [i for piece in plan.pieces if isinstance(piece, Tokens) for i in piece.ids]
        slots = [type(piece) for piece in plan.pieces if not isinstance(piece, Tokens)]
        template = sum(i in special for p in plain.pieces if isinstance(p, Tokens) for i in p.ids)
        return (
            slots == [kind for kind in usual if kind is not Tokens]
            and sum(i in special for i in ids) == template
            and question in tokenizer.decode(ids)
        )

    return check


def test_questions(tally: Any, scaled: Any, model: IPN) -> None:
    counts: Tally = tally("questions: slot-like text, control characters, halves of characters")
    parts = st.one_of(st.sampled_from(MARKERS), st.text(max_size=8), st.characters())

    @generated(scaled(400))
    @given(st.lists(parts, max_size=6).map("".join))
    def run(question: str) -> None:
        counts.attempt(
            repr(question),
            lambda: model.planner.plan(Prompt.user(question, picture())),
            good=is_text(model, question),
            refusal=PromptError,
        )

    run()


def test_answers(tally: Any, scaled: Any, model: IPN) -> None:
    counts = tally("questions that are answered", limit_s=30)

    @generated(scaled(60))
    @given(st.lists(st.sampled_from(MARKERS) | st.text(max_size=8), max_size=5).map("".join))
    def run(question: str) -> None:
        counts.attempt(repr(question), lambda: model.ask(picture(), question, max_new_tokens=2))

    run()
    for length in (500, 5_000, 200_000):
        counts.attempt(f"{length} characters", lambda n=length: model.ask(picture(), "x" * n))


# -- requests --------------------------------------------------------------------------------------

OPTIONS = (
    "max_completion_tokens", "max_tokens", "messages", "model", "n", "seed", "stop", "stream",
    "stream_options", "temperature", "top_p", "user", "tools",
)  # fmt: skip
WITHIN = (
    (0,), (0, "role"), (0, "content"), (0, "content", 0), (0, "content", 0, "type"),
    (0, "content", 0, "image_url"), (0, "content", 0, "image_url", "url"),
    (0, "content", 1, "text"), (1,),
)  # fmt: skip
PLACES = [(name,) for name in OPTIONS] + [("messages", *path) for path in WITHIN]
HALVES = st.text(st.characters(), max_size=9) | st.sampled_from(["\ud800", "data:a;base64,\udfff"])
VALUES = st.recursive(
    SCALARS.filter(lambda v: not isinstance(v, bytes))
    | HALVES
    | st.sampled_from(["", "user", "system", "text", "image_url", -1, 2**70, 1e308, "x" * 9_999]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(HALVES, inner, max_size=3),
    max_leaves=6,
)


def _request(place: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A good request with another value in one place."""
    url = "data:image/png;base64," + base64.b64encode(CORPUS[min(CORPUS)]).decode()
    shown = {"type": "image_url", "image_url": {"url": url}}
    content = [shown, {"type": "text", "text": "What?"}]
    made: dict[str, Any] = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
    *path, last = place
    inner: Any = made
    for key in path:
        inner = inner[key]
    if isinstance(inner, list) and last == len(inner):
        inner.append(value)
    else:
        inner[last] = value
    return made


def test_requests_of_json(tally: Any, scaled: Any, model: IPN) -> None:
    """The whole application of `ipn serve`: a refusal in the protocol's form, or an answer."""
    counts = tally("JSON sent to `ipn serve`: arbitrary trees, and requests with one odd value")
    app = create_app(model, limits=Limits(tokens=4))

    def ask(content: bytes) -> None:
        status, said = runner.run(through(app, content))
        if 400 <= status < 500:
            raise UserError(json.loads(said)["error"]["message"])
        assert status == 200, (status, said[:200])

    @generated(scaled(600))
    @given(st.builds(_request, st.sampled_from(PLACES), VALUES) | VALUES)
    def run(tree: Any) -> None:
        content = json.dumps(tree).encode()
        counts.attempt(repr(content[-200:]), lambda: ask(content))

    with asyncio.Runner() as runner:
        ask(json.dumps(_request(("n",), 1)).encode())
        run()
        for depth in (50, 500, 900, 960, 5_000):
            deep = b'{"temperature": ' + b"[" * depth + b"]" * depth + b"}"
            counts.attempt(f"{depth} lists in one another", lambda d=deep: ask(d))
        app.state.service.batcher.close()
    assert counts.refused > counts.tried // 2
