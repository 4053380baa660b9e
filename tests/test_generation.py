"""Every transformers generation option has the effect it has there, or is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import two_pass
from toys import picture, prompt_of, toy_model
from transformers import GenerationConfig, StoppingCriteriaList, set_seed

from ipn_core.errors import GenerationOptionError, PromptError
from ipn_core.generation import REFUSED
from ipn_core.testing.tiny import tiny_backbone

SAMPLED = {"do_sample": True, "max_new_tokens": 6}
BEAMS = {"num_beams": 3, "max_new_tokens": 6}
TEXT = {"max_new_tokens": 12}
WATERMARK = {"greenlist_ratio": 0.5, "bias": 5.0, "hashing_key": 7}

PASSED: dict[str, list[dict[str, Any]]] = {
    "bad_words_ids": [{**TEXT, "bad_words_ids": [[70], [80], [90, 91]]}],
    "begin_suppress_tokens": [{**TEXT, "begin_suppress_tokens": list(range(40, 140))}],
    "bos_token_id": [{**TEXT, "bos_token_id": 1}],
    "do_sample": [SAMPLED],
    "early_stopping": [{**BEAMS, "early_stopping": True}, {**BEAMS, "early_stopping": "never"}],
    "eos_token_id": [{**TEXT, "eos_token_id": list(range(5, 100))}],
    "epsilon_cutoff": [{**SAMPLED, "epsilon_cutoff": 0.05}],
    "eta_cutoff": [{**SAMPLED, "eta_cutoff": 0.05}],
    "exponential_decay_length_penalty": [{**TEXT, "exponential_decay_length_penalty": (2, 5.0)}],
    "forced_eos_token_id": [{"max_new_tokens": 4, "forced_eos_token_id": 100}],
    "length_penalty": [{**BEAMS, "length_penalty": 3.0}],
    "max_new_tokens": [{"max_new_tokens": 3}],
    "max_time": [{**TEXT, "max_time": 1000.0}],
    "min_length": [{**TEXT, "min_length": 3, "eos_token_id": list(range(5, 150))}],
    "min_new_tokens": [{**TEXT, "min_new_tokens": 4, "eos_token_id": list(range(5, 150))}],
    "min_p": [{**SAMPLED, "min_p": 0.2}],
    "no_repeat_ngram_size": [{**TEXT, "no_repeat_ngram_size": 2}],
    "num_beams": [BEAMS],
    "num_return_sequences": [
        {**BEAMS, "num_return_sequences": 2},
        {**SAMPLED, "num_return_sequences": 3},
    ],
    "output_attentions": [{**TEXT, "output_attentions": True}],
    "output_hidden_states": [{**TEXT, "output_hidden_states": True}],
    "output_logits": [{**TEXT, "output_logits": True}],
    "output_scores": [{**TEXT, "output_scores": True}],
    "pad_token_id": [{**TEXT, "pad_token_id": 3}],
    "remove_invalid_values": [{**TEXT, "remove_invalid_values": True}],
    "renormalize_logits": [{**BEAMS, "renormalize_logits": True}],
    "repetition_penalty": [{**TEXT, "repetition_penalty": 3.0}],
    "sequence_bias": [{**TEXT, "sequence_bias": [[[70], 9.0], [[71], -9.0]]}],
    "stop_strings": [{**TEXT, "stop_strings": ["a", "e", "i", "o", "u", "t"]}],
    "suppress_tokens": [{**TEXT, "suppress_tokens": list(range(40, 140))}],
    "temperature": [{**SAMPLED, "temperature": 0.3}],
    "top_h": [{**SAMPLED, "top_h": 0.4}],
    "top_k": [{**SAMPLED, "top_k": 4}],
    "top_p": [{**SAMPLED, "top_p": 0.4}],
    "typical_p": [{**SAMPLED, "typical_p": 0.4}],
    "watermarking_config": [{**SAMPLED, "watermarking_config": WATERMARK}],
}
"""For each option, uses of it whose answers must equal transformers' own."""

SET_BY_ENGINE = {"return_dict_in_generate"}
WITHOUT_EFFECT = {"transformers_version", "compile_config", "disable_compile"}
"""About the compiled forwards of static caches, and a record of who wrote a config."""


def fields() -> list[str]:
    return sorted(name for name in GenerationConfig().to_dict() if not name.startswith("_"))


@pytest.mark.parametrize("name", fields())
def test_every_field_of_transformers_is_served_or_refused(registry: Any, name: str) -> None:
    homes = [PASSED, {"max_length"}, SET_BY_ENGINE, WITHOUT_EFFECT, REFUSED]
    assert sum(name in home for home in homes) == 1
    if name in REFUSED:
        with pytest.raises(GenerationOptionError, match=f"'{name}' cannot be served: .*Leave it"):
            toy_model(registry).ask(picture(), "What?", **{name: 2})


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_refused_option_may_be_given_as_none(registry: Any, name: str) -> None:
    if name == "use_cache":
        pytest.skip("transformers takes no None for it")
    model = toy_model(registry)
    known = name in fields()
    answer = model.ask(picture(), "What?", max_new_tokens=2, **({name: None} if known else {}))
    assert answer.ids


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize(
    "options", [pytest.param(o, id=name) for name, uses in PASSED.items() for o in uses]
)
def test_an_option_has_the_effect_it_has_in_transformers(
    registry: Any, family: str, options: dict[str, Any]
) -> None:
    model = toy_model(registry, family=family)
    prompt = prompt_of(0, 1)
    expected = expect(model, prompt, options)
    set_seed(3)
    answers = model.generate([prompt], **options)
    assert [a.ids for a in answers] == expected


def expect(model: Any, prompt: Any, options: dict[str, Any]) -> list[tuple[int, ...]]:
    """What transformers makes of the whole prompt; options that read its ids see its text."""
    options = dict(options)
    if "stop_strings" in options:
        options["tokenizer"] = model.backbone.tokenizer
    served = {"repetition_penalty", "no_repeat_ngram_size"} & set(options)
    if not served:
        set_seed(3)
        options.pop("pad_token_id", None)
        options.update(return_dict_in_generate=False)
        ends = options.get("eos_token_id")
        found = two_pass.generate(model, prompt, **options)
        return [two_pass.trimmed(list(row), tuple(ends or ())) for row in found]
    (name,) = served
    value = options.pop(name)
    return [by_hand(model, prompt, name, value, options["max_new_tokens"])]


@torch.no_grad()
def by_hand(model: Any, prompt: Any, name: str, value: Any, tokens: int) -> tuple[int, ...]:
    """Greedy decoding with the option applied over the prompt's ids and the generated ones."""
    filled = two_pass.whole(model, prompt)
    embeds, ids, made = filled.embeds, list(filled.ids), []
    for _ in range(tokens):
        scores = model.backbone.lm(inputs_embeds=embeds[None], use_cache=False)["logits"][0, -1]
        if name == "repetition_penalty":
            for seen in set(ids):
                scores[seen] = scores[seen] * value if scores[seen] < 0 else scores[seen] / value
        else:
            for i in range(len(ids) - 1):
                if ids[i] == ids[-1]:
                    scores[ids[i + 1]] = float("-inf")
        made.append(int(scores.argmax()))
        if made[-1] in model.backbone.eos_ids:
            break
        ids.append(made[-1])
        embeds = torch.cat([embeds, model.backbone.embed(torch.tensor(made[-1:]))])
    return tuple(made)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, **SAMPLED}])
def test_a_processor_that_knows_the_prompt_works_in_a_ragged_batch(
    registry: Any, options: dict[str, Any]
) -> None:
    model = toy_model(registry)
    prompts = [prompt_of(row, n) for row, n in enumerate((1, 0, 2))]
    together = {
        "repetition_penalty": 2.0,
        "no_repeat_ngram_size": 3,
        "max_new_tokens": 5,
        **options,
    }
    returned = options.get("num_return_sequences", 1)
    answers = model.generate(prompts, **together)
    assert len(answers) == 3 * returned
    if returned == 1:
        alone = [model.generate([p], **together)[0] for p in prompts]
        assert [a.ids for a in answers] == [a.ids for a in alone]


def test_max_length_counts_the_prompt_as_in_transformers(registry: Any) -> None:
    model = toy_model(registry)
    prompt = prompt_of(0, 1)
    options = {"max_length": len(two_pass.whole(model, prompt).embeds) + 3, "eos_token_id": -1}
    (answer,) = model.generate([prompt], **options)
    assert [answer.ids] == two_pass.generate(model, prompt, **options)
    assert len(answer.ids) == 3


def test_max_length_ends_where_the_context_does(registry: Any) -> None:
    model = toy_model(registry, family="opt", backbone=tiny_backbone("opt", positions=64))
    answer = model.ask(picture(), "Is it?", max_length=500, eos_token_id=-1)
    assert 0 < sum(answer.tokens.values()) <= 64


def test_rows_that_a_stop_string_ends_early_carry_no_padding(registry: Any) -> None:
    model = toy_model(registry)
    prompts = [prompt_of(row, n) for row, n in enumerate((1, 0, 2))]
    options = {"stop_strings": list("aeioust"), "max_new_tokens": 12}
    together = model.generate(prompts, **options)
    assert [a.ids for a in together] == [model.generate([p], **options)[0].ids for p in prompts]


def test_a_ready_generation_config_is_used(registry: Any) -> None:
    model = toy_model(registry)
    config = GenerationConfig(num_beams=3, max_new_tokens=4, num_return_sequences=2)
    answers = model.generate([prompt_of(0, 1)], generation_config=config)
    expected = two_pass.generate(
        model, prompt_of(0, 1), num_beams=3, max_new_tokens=4, num_return_sequences=2
    )
    assert [a.ids for a in answers] == expected


def test_a_ready_generation_config_cannot_smuggle_in_what_is_refused(registry: Any) -> None:
    config = GenerationConfig(cache_implementation="static")
    with pytest.raises(GenerationOptionError, match="'cache_implementation' cannot be served"):
        toy_model(registry).ask(picture(), "What?", generation_config=config)


def test_a_ready_generation_config_may_ask_for_what_knows_the_prompt(registry: Any) -> None:
    model = toy_model(registry)
    config = GenerationConfig(repetition_penalty=3.0, max_new_tokens=6)
    by_config = model.ask(picture(), "What?", generation_config=config)
    by_option = model.ask(picture(), "What?", repetition_penalty=3.0, max_new_tokens=6)
    assert by_config.ids == by_option.ids


def test_what_the_language_models_own_config_asks_for_knows_the_prompt_too(registry: Any) -> None:
    model = toy_model(registry)
    by_option = model.ask(picture(), "What?", repetition_penalty=3.0, max_new_tokens=6)
    model.backbone.lm.generation_config.repetition_penalty = 3.0
    assert model.ask(picture(), "What?", max_new_tokens=6).ids == by_option.ids
    plain = toy_model(registry).ask(picture(), "What?", max_new_tokens=6)
    assert model.ask(picture(), "What?", max_new_tokens=6, repetition_penalty=1.0).ids == plain.ids


class Streamer:
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_receives_every_id_and_the_end(registry: Any) -> None:
    streamer = Streamer()
    answer = toy_model(registry).ask(picture(), "What?", streamer=streamer, max_new_tokens=5)
    assert tuple(streamer.ids[-len(answer.ids) :]) == answer.ids
    assert streamer.ended


def test_stopping_criteria_stop(registry: Any) -> None:
    def two(ids: torch.Tensor, *_: Any) -> torch.Tensor:
        return torch.full((ids.shape[0],), ids.shape[1] >= 2)

    answer = toy_model(registry).ask(
        picture(), "What?", stopping_criteria=StoppingCriteriaList([two]), eos_token_id=-1
    )
    assert len(answer.ids) == 2


def test_a_prefix_function_limits_the_tokens(registry: Any) -> None:
    answer = toy_model(registry).ask(
        picture(), "What?", prefix_allowed_tokens_fn=lambda *_: [80, 81], max_new_tokens=4
    )
    assert set(answer.ids) <= {80, 81}


def test_raw_output_carries_the_scores_that_were_asked_for(registry: Any) -> None:
    answers = toy_model(registry).generate([prompt_of(0, 1)], output_scores=True, max_new_tokens=3)
    assert len(answers.raw.scores) == len(answers[0].ids)


def test_several_sequences_of_a_prompt_stand_side_by_side(registry: Any) -> None:
    model = toy_model(registry)
    prompts = [prompt_of(0, 1), prompt_of(1, 2)]
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 4}
    answers = model.generate(prompts, **options)
    expected = [ids for p in prompts for ids in two_pass.generate(model, p, **options)]
    assert [a.ids for a in answers] == expected
    assert answers[0].grids == answers[1].grids != answers[2].grids


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("max_new_token", r"unknown generation option .*did you mean 'max_new_tokens'"),
        ("input_ids", "is set by the engine itself"),
        ("past_key_values", "is set by the engine itself"),
    ],
)
def test_options_that_are_unknown_or_the_engines_own_are_refused(
    registry: Any, option: str, text: str
) -> None:
    with pytest.raises(GenerationOptionError, match=text):
        toy_model(registry).ask(picture(), "What?", **{option: 3})


@pytest.mark.parametrize("name", ["max_length", "max_new_tokens", "num_beams"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "3", True])
def test_what_is_counted_must_be_at_least_one(registry: Any, name: str, value: Any) -> None:
    text = rf"'{name}' must be a whole number of at least 1, got {value!r}\. Raise it, or leave"
    with pytest.raises(GenerationOptionError, match=text):
        toy_model(registry).ask(picture(), "What?", **{name: value})


def test_a_max_length_within_the_prompt_is_refused(registry: Any) -> None:
    model = toy_model(registry)
    prompt = prompt_of(0, 1)
    held = len(two_pass.whole(model, prompt).embeds)
    with pytest.raises(
        GenerationOptionError,
        match=rf"generation option 'max_length' counts the prompt, which has {held} tokens, so it "
        rf"must be at least {held + 1}, got {held}\. Give 'max_new",
    ):
        model.generate([prompt], max_length=held)
    # Where both are given, transformers goes by max_new_tokens, and so do we.
    assert len(model.generate([prompt], max_length=held, max_new_tokens=2)[0].ids) <= 2


def test_no_prompts_are_refused(registry: Any) -> None:
    with pytest.raises(PromptError, match=r"there is no prompt to answer. Give at least one"):
        toy_model(registry).generate([])
