"""A model that looks again answers as if prompt, answer and looks were run anew for every token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import two_pass
from toys import picture, prompt_of, toy_model
from transformers import set_seed

from ipn_core.errors import ConfigError, GenerationOptionError, PromptError, UserError
from ipn_core.evaluation.evaluate import evaluate
from ipn_core.look_again import REFUSED_LOOKING
from ipn_core.model import IPN
from ipn_core.prompt import Prompt
from ipn_core.tasks import Example, Picture
from ipn_core.testing.tiny import tiny_backbone

PROMPTS = [prompt_of(row, images, turns=1 + row % 2) for row, images in enumerate((1, 2, 0, 1, 3))]
TOKENS = 8


def looker(registry: Any, family: str = "llama", again: int = 2, **more: Any) -> IPN:
    """A model whose head wants to look before some tokens and not before others."""
    layout = {"look_again": again, **more.pop("layout", {})}
    model = toy_model(registry, more.pop("strategy", "toy-both"), family, layout=layout, **more)
    with torch.no_grad():
        model.look_head.score.bias.zero_()
    return model


@pytest.mark.parametrize("again", [1, 2])
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("family", ["llama-gqa", "vicuna", "opt", "opt-projected"])
def test_a_batch_that_looks_again_equals_each_prompt_run_anew(
    registry: Any, family: str, rounds: int, again: int
) -> None:
    model = looker(registry, family, again, rounds=rounds)
    answers = model.generate(PROMPTS, max_new_tokens=TOKENS)
    expected = [two_pass.looking(model, prompt, TOKENS) for prompt in PROMPTS]
    assert [(a.ids, a.looked) for a in answers] == expected
    looks = [len(a.looked) for a in answers]
    assert looks[2] == 0, "without a picture there is nothing to look at"
    assert max(looks) == again
    for answer, prompt in zip(answers, PROMPTS, strict=True):
        if prompt.images:
            asked = rounds * sum(turn.role == "user" for turn in prompt.turns)
            assert answer.attentions.shape[0] == asked + len(answer.looked)


def test_rows_look_at_different_times(registry: Any) -> None:
    """Or the masks of rows that do not look would be tested by nothing above."""
    answers = looker(registry).generate(PROMPTS, max_new_tokens=TOKENS)
    assert len({a.looked for a in answers}) > 2
    assert any(place > 0 for a in answers for place in a.looked)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_scores_after_a_look_are_those_of_a_fresh_run(registry: Any, family: str) -> None:
    model = looker(registry, family, 1)
    raw: list[Any] = []
    keep = [lambda ids, scores: raw.append(scores.clone()) or scores]
    (answer,) = model.generate(PROMPTS[:1], max_new_tokens=TOKENS, logits_processor=keep)
    (place,) = answer.looked
    turn = PROMPTS[0].then_assistant(answer.ids[:place], looked=[place]).turns[-1]
    filled = two_pass.whole(model, PROMPTS[0], model.planner.said(turn, 1))
    expected = two_pass.forward(model, filled)[-1]
    # One more score than tokens: the one whose place the look took.
    assert len(raw) == len(answer.ids) + 1
    assert (raw[place + 1][0] - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("seed", range(4))
def test_sampling_draws_what_a_fresh_run_draws(registry: Any, seed: int) -> None:
    model = looker(registry)
    set_seed(seed)
    (answer,) = model.generate(PROMPTS[:1], max_new_tokens=TOKENS, do_sample=True, top_k=9)
    set_seed(seed)

    def draw(scores: Any, text: Any) -> Any:
        kept = scores.masked_fill(scores < scores.topk(9).values[-1], -torch.inf)
        return torch.multinomial(kept.softmax(-1)[None], 1).item()

    assert (answer.ids, answer.looked) == two_pass.looking(model, PROMPTS[0], TOKENS, draw)


def test_a_threshold_that_is_never_reached_changes_nothing(registry: Any) -> None:
    looks = looker(registry, layout={"look_threshold": 0.9999999})
    plain = toy_model(registry, "toy-both", layout={"look_again": 0})
    assert plain.look_head is None
    plain.load_state_dict(looks.state_dict(), strict=False)
    again = looks.generate(PROMPTS, max_new_tokens=TOKENS)
    assert all(not a.looked for a in again)
    assert [a.ids for a in again] == [a.ids for a in plain.generate(PROMPTS, max_new_tokens=TOKENS)]


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_a_look_is_none_of_the_new_tokens(registry: Any, limit: int) -> None:
    model = looker(registry)
    answers = model.generate(PROMPTS, max_new_tokens=limit)
    expected = [two_pass.looking(model, prompt, limit) for prompt in PROMPTS]
    assert [(a.ids, a.looked) for a in answers] == expected
    assert any(a.looked for a in answers)
    held = model.generate(PROMPTS[:1], max_new_tokens=1)[0]
    length = sum(n for kind, n in held.tokens.items() if kind != "generated")
    length -= len(held.looked) * (1 + model.config.layout.dynamic)
    by_length = model.generate(PROMPTS[:1], max_length=length + limit)
    assert (by_length[0].ids, by_length[0].looked) == expected[0]


def test_options_that_read_the_prompt_do_not_see_the_places_of_looks(registry: Any) -> None:
    model = looker(registry)

    def penalised(scores: Any, text: list[int]) -> Any:
        seen = torch.tensor(sorted(set(text)))
        scores = scores.clone()
        scores[seen] = torch.where(scores[seen] < 0, scores[seen] * 3, scores[seen] / 3)
        return scores.argmax()

    answers = model.generate(PROMPTS, max_new_tokens=TOKENS, repetition_penalty=3.0)
    expected = [two_pass.looking(model, prompt, TOKENS, penalised) for prompt in PROMPTS]
    assert [(a.ids, a.looked) for a in answers] == expected


def test_stop_strings_and_criteria_end_each_row_for_good(registry: Any) -> None:
    model = looker(registry)
    whole = model.generate(PROMPTS, max_new_tokens=TOKENS)
    # A letter that comes after a look, with more to come in its row.
    row, stop = next(
        (row, id_)
        for row, answer in enumerate(whole)
        for place, id_ in enumerate(answer.ids[:-1])
        if answer.looked and answer.looked[0] < place
        if model.backbone.tokenizer.decode([id_]).isascii()
    )
    criterion = [lambda ids, scores, **_: ids[:, -1] == stop]
    text = model.backbone.tokenizer.decode([stop])
    for option in ({"stopping_criteria": criterion}, {"stop_strings": [text]}):
        answers = model.generate(PROMPTS, max_new_tokens=TOKENS, **option)
        for answer, full in zip(answers, whole, strict=True):
            end = full.ids.index(stop) + 1 if stop in full.ids else len(full.ids)
            assert answer.ids == full.ids[:end]
            assert answer.looked == tuple(p for p in full.looked if p < end)
        assert len(answers[row].ids) < len(whole[row].ids)


class Recorder:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.prompts = self.ends = 0

    def put(self, value: Any) -> None:
        if value.ndim > 1:
            self.prompts += 1
        else:
            self.ids += value.tolist()

    def end(self) -> None:
        self.ends += 1


def test_a_streamer_gets_the_answer_and_nothing_else(registry: Any) -> None:
    model, streamer = looker(registry), Recorder()
    (answer,) = model.generate(PROMPTS[:1], max_new_tokens=TOKENS, streamer=streamer)
    assert answer.looked
    assert tuple(streamer.ids) == answer.ids
    assert (streamer.prompts, streamer.ends) == (1, 1)


@pytest.mark.parametrize("name", sorted(REFUSED_LOOKING))
def test_what_cannot_be_served_with_looks_is_refused_by_name(registry: Any, name: str) -> None:
    value = {"num_beams": 2, "num_return_sequences": 2}.get(name, 5)
    value = [3] if name == "begin_suppress_tokens" else value
    value = (1, 2.0) if name == "exponential_decay_length_penalty" else value
    with pytest.raises(GenerationOptionError, match=f"'{name}' cannot be served while .* again"):
        looker(registry).generate(PROMPTS[:1], **{name: value})
    neutral = {"num_beams": 1, "num_return_sequences": 1, "min_length": 0}.get(name)
    assert looker(registry).generate(PROMPTS[:1], max_new_tokens=1, **{name: neutral})


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_next_turn_of_a_dialogue_keeps_the_looks(registry: Any, family: str) -> None:
    model = looker(registry, family)
    dialogue = model.dialogue([picture()])
    prompt, held = Prompt.user(picture(), "What is it?"), 0
    for question in ("And where?", "Who?", "Why?"):
        answer = dialogue.ask(prompt.question, max_new_tokens=5)
        assert (answer.ids, answer.looked) == two_pass.looking(model, prompt, 5)
        assert dialogue.prefilled == held + sum(answer.tokens.values())
        held = dialogue.prefilled
        ended = answer.ids[-1] in model.backbone.eos_ids
        prompt = prompt.then_assistant(
            answer.ids[:-1] if ended else answer.ids, looked=answer.looked
        ).then_user(question)
    assert model.encoder.encoded > 0


def test_a_dialogue_feeds_no_token_twice(registry: Any) -> None:
    model = looker(registry)
    dialogue = model.dialogue([picture()])
    first = dialogue.ask("What is it?", max_new_tokens=5)
    second = dialogue.ask("What is it?", max_new_tokens=5)
    assert first.looked
    assert second.tokens["static"] == 0, "the first turn is in the cache"


def test_the_head_is_saved_and_loaded(registry: Any, tmp_path: Any) -> None:
    model = looker(registry)
    assert {"look_head.score.weight", "look_head.score.bias"} <= model.trained_state().keys()
    again = looker(registry, seed=5)
    again.load_state_dict(model.state_dict())
    answers = (m.generate(PROMPTS, max_new_tokens=4) for m in (model, again))
    first, second = ([(a.ids, a.looked) for a in found] for found in answers)
    assert first == second


def test_combinations_that_cannot_work_are_refused_when_the_model_is_built(registry: Any) -> None:
    with pytest.raises(ConfigError, match="look_again needs rounds of at least 1"):
        looker(registry, strategy="toy-static")
    with pytest.raises(ConfigError, match=r"layout\.look_again .* 'prefix-kv' .* fills no slot"):
        toy_model(registry, inject="prefix-kv", layout={"look_again": 1})
    with pytest.raises(ConfigError, match="look_threshold"):
        looker(registry, layout={"look_threshold": 1.5})


def test_an_answer_may_not_look_more_often_than_the_layout_says(registry: Any) -> None:
    model = looker(registry, again=1)
    prompt = Prompt.ask("What?", [picture()], answer="a", looks=2)
    with pytest.raises(PromptError, match=r"may 1 times \(layout\.look_again\)"):
        model([prompt])
    with pytest.raises(PromptError, match="after 0 pictures"):
        model([Prompt.ask("What?", [], answer="a", looks=1)])


def test_shuffled_requests_do_not_fit_looks_that_the_model_takes(registry: Any) -> None:
    example = Example("What?", ("a",), (Picture("p", picture),))
    with pytest.raises(UserError, match="decides for itself how often it looks"):
        evaluate(looker(registry), [example], task="t", split="s", shuffled=True)


def test_every_look_must_leave_room_in_the_context(registry: Any) -> None:
    backbone = tiny_backbone("llama", positions=96)
    model = looker(registry, backbone=backbone)
    (answer,) = model.generate(PROMPTS[:1], max_new_tokens=96, eos_token_id=[])
    assert len(answer.looked) == 2
    assert sum(answer.tokens.values()) <= 96


def test_the_loss_and_the_choices_of_answers_with_looks(registry: Any) -> None:
    model = looker(registry, again=2)
    prompts = [
        Prompt.ask("What is it?", [picture(row)], answer=answer, looks=looks)
        for row, (answer, looks) in enumerate((("yes", 0), ("a dog", 2), ("no", 1)))
    ]
    total, count = model(prompts)
    singly = [two_pass.loss(model, prompt) for prompt in prompts]
    assert count == sum(n for _, n in singly)
    torch.testing.assert_close(total, sum(loss for loss, _ in singly), rtol=1e-5, atol=0)
    plans = [model.planner.plan(prompt) for prompt in prompts]
    percept = model.perceive([p.images for p in plans], [p.question for p in plans])
    hidden, again = model.engine.decisions(plans, percept)
    assert len(hidden) == len(again) == count + 3
    expected = []
    for prompt, plan in zip(prompts, plans, strict=True):
        filled = two_pass.whole(model, prompt)
        states = two_pass.hidden_states(model, filled, -1)
        starts = [i for i, label in enumerate(filled.labels) if label != -100]
        rounds = [p.round for p in plan.pieces if hasattr(p, "images") and hasattr(p, "round")]
        before = [at - 2 for (at, _), r in zip(filled.looks, rounds, strict=True) if r >= 1]
        expected += [(states[i], True) for i in before] + [(states[i - 1], False) for i in starts]
    order = sorted(range(len(hidden)), key=lambda i: hidden[i].tolist())
    wanted = sorted(expected, key=lambda pair: pair[0].tolist())
    for i, (state, look) in zip(order, wanted, strict=True):
        torch.testing.assert_close(hidden[i], state, rtol=1e-4, atol=1e-5)
        assert bool(again[i]) == look
