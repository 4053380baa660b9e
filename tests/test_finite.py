"""An answer made of numbers that are none is refused, and where they began is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from toys import picture, prompt_of, toy_model

from ipn_core.attention import attend
from ipn_core.errors import StageError
from ipn_core.finite import FiniteLogits
from ipn_core.model import IPN
from ipn_core.plugins import Registry
from ipn_core.testing.tiny import tiny_backbone

OPTIONS = {"max_new_tokens": 3}


def make_bad(module: Any, value: float = float("nan")) -> None:
    """Let a module put such a number into the last place of what it gives."""

    def spoil(module: Any, inputs: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        values = first if isinstance(first, torch.Tensor) else first.values
        values.view(-1)[-1] = value
        return output

    module.register_forward_hook(spoil)


CASES: list[tuple[Callable[[IPN], Any], str]] = [
    (lambda m: m.encoder, "what the encoder 'tiny' sees in a picture"),
    (lambda m: m.backbone.layers[0], "a key or value of layer 1 of the language model"),
    (lambda m: m.backbone.layers[-1], "the request"),
    (lambda m: m.interaction, "the message of '{interact}'"),
]


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=str)
@pytest.mark.parametrize("case", range(len(CASES)))
@pytest.mark.parametrize("family", ["llama-gqa", "opt"])
def test_where_the_first_bad_number_was_is_named(
    registry: Registry, family: str, case: int, options: dict[str, Any]
) -> None:
    model = toy_model(registry, "toy-both", family)
    module, named = CASES[case]
    if case:
        make_bad(module(model))
    else:
        spoil_encoder(model)
    assert model.config.interact is not None
    named = named.format(interact=model.config.interact.name)
    with pytest.raises(StageError) as caught:
        model.ask(picture(1), "What?", **OPTIONS, **options)
    said = f"there is no answer: {named} holds NaN or infinity, in float32. Check the weights of '"
    assert str(caught.value).startswith(said)


def test_the_output_of_the_language_model_is_named_where_nothing_asks(registry: Registry) -> None:
    model = toy_model(registry, "toy-static")
    make_bad(model.backbone.layers[-1])
    with pytest.raises(StageError, match=r"no answer: the output of the language model holds NaN"):
        model.ask(picture(1), "What?", **OPTIONS)


def spoil_encoder(model: IPN) -> None:
    encode = model.encoder.encode

    def bad(images: Any) -> Any:
        found = encode(images)
        found[0].values[0, 0] = float("inf")
        return found

    model.encoder.encode = bad  # type: ignore[method-assign]


def test_a_batch_and_questions_about_a_picture_are_refused_too(registry: Registry) -> None:
    model = toy_model(registry, "toy-both", layout={"order": ["images", "text", "look"]})
    about = model.about([picture(1)])
    about.ask("What?", **OPTIONS)
    make_bad(model.backbone.layers[0])
    with pytest.raises(StageError, match="a key or value of layer 1"):
        about.ask("And where?", **OPTIONS)
    with pytest.raises(StageError, match="a key or value of layer 1"):
        model.dialogue([picture(1)]).ask("What?", **OPTIONS)
    with pytest.raises(StageError, match="a key or value of layer 1"):
        model.generate([prompt_of(row, 1) for row in range(3)], **OPTIONS)


def test_an_overflow_of_float16_says_what_to_do(registry: Registry) -> None:
    backbone = tiny_backbone()
    model = toy_model(registry, "toy-both", backbone=backbone).to(torch.float16)
    assert model.ask(picture(1), "What?", **OPTIONS).ids
    with torch.no_grad():
        model.backbone.layers[0].mlp.down_proj.weight.mul_(3e4).clamp_(-6e4, 6e4)
        model.backbone.layers[0].mlp.up_proj.weight.mul_(3e4).clamp_(-6e4, 6e4)
    with pytest.raises(StageError) as caught:
        model.ask(picture(1), "What?", **OPTIONS)
    assert "a key or value of layer 1 of the language model holds NaN or infinity" in str(
        caught.value
    )
    assert str(caught.value).endswith(
        "in float16, whose largest number is 65,504. Choose --dtype bfloat16 or float32."
    )


@pytest.mark.parametrize(
    ("backend", "return_map"),
    [("eager", False), ("eager", True), ("sdpa", False), ("sdpa-flash", False), ("auto", False)],
)
def test_a_query_that_overflows_is_no_query_that_may_look_at_nothing(
    backend: str, return_map: bool
) -> None:
    q, k, v = (torch.rand(2, 3, 2, 8).to(torch.float16) + 0.1 for _ in range(3))
    expected = attend(q, k, v, backend=backend)
    q[1, 2, 0] = float("-inf")  # All its logits are -inf.
    found = attend(q, k, v, backend=backend, return_map=return_map)
    out = found[0] if isinstance(found, tuple) else found
    assert out[1, 2, 0].isnan().all()
    there = torch.ones(2, 3, 2, dtype=torch.bool)
    there[1, 2, 0] = False
    torch.testing.assert_close(out[there], expected[there])


def test_an_overflow_of_what_an_interaction_asks_with_is_named(registry: Registry) -> None:
    model = toy_model(registry, "rvii").to(torch.float16)
    assert model.ask(picture(1), "What?", **OPTIONS).ids
    attention = model.get_submodule("interaction.blocks.0.cross_attention.q")
    attention.register_forward_hook(lambda module, inputs, output: output.mul_(1e6))
    with pytest.raises(StageError, match="the message of 'rvii' holds NaN or infinity, in float16"):
        model.ask(picture(1), "What?", **OPTIONS)


class Heard:
    """A streamer."""

    def __init__(self) -> None:
        self.put_s: list[Any] = []

    def put(self, value: Any) -> None:
        self.put_s += value.reshape(-1).tolist()

    def end(self) -> None:
        raise AssertionError("an answer that is refused does not end")


def test_nothing_is_streamed_of_what_is_refused(registry: Registry) -> None:
    model = toy_model(registry, "toy-both")
    make_bad(model.backbone.layers[0])
    heard = Heard()
    with pytest.raises(StageError):
        model.ask(picture(1), "What?", streamer=heard, **OPTIONS)
    assert heard.put_s == []


def test_one_row_that_is_bad_refuses_the_batch_and_the_others_answer_without_it(
    registry: Registry,
) -> None:
    model = toy_model(registry, "toy-both")
    prompts = [prompt_of(row, 1) for row in range(3)]
    expected = [answer.ids for answer in model.generate(prompts, **OPTIONS)]

    def spoil(module: Any, inputs: Any, output: Any) -> Any:
        if len(output) != 2:
            output[1 if len(output) == 3 else 0, -1, -1] = float("nan")
        return output

    handle = model.backbone.lm.get_output_embeddings().register_forward_hook(spoil)
    with pytest.raises(StageError, match="no answer: the output of the language model"):
        model.generate(prompts, **OPTIONS)
    rest = [answer.ids for answer in model.generate([prompts[0], prompts[2]], **OPTIONS)]
    handle.remove()
    assert rest == [expected[0], expected[2]]


def test_a_mask_is_no_overflow() -> None:
    ids = torch.zeros(2, 1, dtype=torch.long)
    finite = FiniteLogits(lambda: "here.")
    masked = torch.tensor([[0.0, float("-inf")], [1.0, 2.0]])
    assert finite(ids, masked) is masked
    for bad in (float("nan"), float("inf")):
        with pytest.raises(StageError, match=r"there is no answer: here\."):
            finite(ids, torch.tensor([[0.0, bad], [1.0, 2.0]]))
