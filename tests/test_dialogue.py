"""A dialogue answers as a fresh start with the same turns would, and pays for new tokens only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import two_pass
from toys import FAMILIES, picture, toy_model

from ipn_core.errors import GenerationOptionError, ImageError, PromptError, UserError
from ipn_core.model import IPN
from ipn_core.prompt import Prompt

QUESTIONS = ("What is it?", "And where?", "Who?")
WIDE = picture(1, (48, 24))


def fresh(model: IPN, turns: list[tuple[list[Any], str]], answers: list[Any]) -> Prompt:
    """The whole conversation so far as one prompt, its answers as the ids that were generated."""
    prompt = Prompt(())
    for index, (images, question) in enumerate(turns):
        prompt = prompt.then_user(*images, question)
        if index < len(answers):
            ids = answers[index].ids
            ended = ids[-1] in model.backbone.eos_ids
            prompt = prompt.then_assistant(ids[:-1] if ended else ids)
    return prompt


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("strategy", ["tiny-look", "toy-both", "toy-static"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dialogue_equals_a_fresh_start_with_the_same_turns(
    registry: Any, family: str, strategy: str, beams: int
) -> None:
    model = toy_model(registry, strategy, family)
    dialogue = model.dialogue([picture()])
    turns: list[tuple[list[Any], str]] = []
    answers: list[Any] = []
    for question, further in zip(QUESTIONS, ([], [WIDE], []), strict=True):
        turns.append(([] if turns else [picture()], question))
        turns[-1][0].extend(further)
        answer = dialogue.ask(question, further, num_beams=beams, max_new_tokens=4)
        again = fresh(model, turns, answers)
        assert answer.ids == two_pass.generate(model, again, num_beams=beams, max_new_tokens=4)[0]
        answers.append(answer)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_logits_of_a_later_turn_equal_a_fresh_start(registry: Any, family: str) -> None:
    model = toy_model(registry, family=family)
    dialogue = model.dialogue([picture()])
    first = dialogue.ask("What is it?", max_new_tokens=4)
    raw: list[Any] = []
    dialogue.ask("And where?", max_new_tokens=1, logits_processor=[lambda _, s: raw.append(s) or s])
    again = fresh(model, [([picture()], "What is it?"), ([], "And where?")], [first])
    expected = two_pass.logits(model, again)[-1]
    assert (raw[0][0] - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_options_that_read_the_prompt_see_the_earlier_turns_too(registry: Any) -> None:
    model = toy_model(registry)
    dialogue = model.dialogue([picture()])
    first = dialogue.ask("What is it?", max_new_tokens=4)
    options = {"repetition_penalty": 3.0, "max_new_tokens": 6}
    second = dialogue.ask("And where?", **options)
    again = fresh(model, [([picture()], "What is it?"), ([], "And where?")], [first])
    assert second.ids == model.generate([again], **options)[0].ids


def test_each_picture_is_encoded_once(registry: Any) -> None:
    model = toy_model(registry)
    dialogue = model.dialogue([picture()])
    for question in QUESTIONS:
        dialogue.ask(question, max_new_tokens=2)
    dialogue.ask("More?", [WIDE], max_new_tokens=2)
    assert model.encoder.encoded == 2


def test_the_next_question_costs_only_its_own_tokens(registry: Any) -> None:
    model = toy_model(registry)
    dialogue = model.dialogue([picture()])
    first = dialogue.ask("What is it? " * 8, max_new_tokens=3)
    assert dialogue.prefilled == sum(first.tokens.values())
    second = dialogue.ask("And?", max_new_tokens=3)
    assert sum(second.tokens.values()) < sum(first.tokens.values()) / 2
    assert dialogue.prefilled == sum(first.tokens.values()) + sum(second.tokens.values())


def test_a_later_turn_returns_only_its_own_maps(registry: Any) -> None:
    dialogue = toy_model(registry, rounds=2).dialogue([picture()])
    assert dialogue.ask("What?", max_new_tokens=2).attentions.shape[0] == 2
    assert dialogue.ask("Who?", [WIDE], max_new_tokens=2).attentions.shape[0] == 2


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        (("",), {}, PromptError),
        (("What?", ["missing.png"]), {}, ImageError),
        (("What?",), {"dola_layers": "low"}, GenerationOptionError),
        (("What? " * 200,), {}, PromptError),
    ],
)
def test_an_error_in_a_turn_leaves_the_dialogue_unchanged(
    registry: Any, arguments: Any, options: Any, error: type[UserError]
) -> None:
    model = toy_model(registry)
    broken, untouched = model.dialogue([picture()]), model.dialogue([picture()])
    for dialogue in (broken, untouched):
        dialogue.ask("What is it?", max_new_tokens=3)
    with pytest.raises(error):
        broken.ask(*arguments, **options)
    after = [d.ask("And where?", [WIDE], max_new_tokens=4) for d in (broken, untouched)]
    assert after[0].ids == after[1].ids
    assert after[0].tokens == after[1].tokens
    assert broken.prompt.turns[-1] == untouched.prompt.turns[-1]


def test_an_interruption_while_decoding_leaves_the_dialogue_unchanged(registry: Any) -> None:
    model = toy_model(registry)
    broken, untouched = model.dialogue([picture()]), model.dialogue([picture()])
    for dialogue in (broken, untouched):
        dialogue.ask("What is it?", max_new_tokens=3)

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken.ask("And where?", logits_processor=[interrupt])
    after = [d.ask("And where?", max_new_tokens=4) for d in (broken, untouched)]
    assert after[0].ids == after[1].ids


def test_several_sequences_in_a_dialogue_are_refused_or_kept_apart(registry: Any) -> None:
    dialogue = toy_model(registry).dialogue([picture()])
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 3}
    assert dialogue.ask("What?", **options).ids
    assert dialogue.ask("Who?", max_new_tokens=3).ids


def test_a_dialogue_may_start_without_a_picture(registry: Any) -> None:
    model = toy_model(registry)
    dialogue = model.dialogue()
    first = dialogue.ask("What?", max_new_tokens=3)
    second = dialogue.ask("Who?", [picture()], max_new_tokens=3)
    again = fresh(model, [([], "What?"), ([picture()], "Who?")], [first])
    assert second.ids == two_pass.generate(model, again, max_new_tokens=3)[0]
    assert second.attention is not None


def test_asking_does_not_record_gradients(registry: Any) -> None:
    model = toy_model(registry)
    model.dialogue([picture()]).ask("What?", max_new_tokens=2)
    assert torch.is_grad_enabled()
