"""Which of transformers' generation options pass through, and which are refused and why.

Decoding is transformers': greedy, sampling, beams, several sequences, streamers and stopping
rules are its own. Only options that bring a cache of their own, or that read the ids of a prompt
which has none (it is made of embeddings), cannot be served; they are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ipn_core.errors import GenerationOptionError, near

__all__ = [
    "REFUSED",
    "SERVED_BY_CALL",
    "WITH_PROMPT_IDS",
    "check_options",
    "prompt_processors",
    "repeats_of",
    "with_config",
]

_OWN_CACHE = "it brings a cache of its own, while the prompt is already in the engine's"
_PROMPT_IDS = "it reads the ids of the prompt, which is made of embeddings and has none"
_SECOND_MODEL = "it drafts with a second model that cannot see the picture"
_ENCODER = "it is for encoder-decoder models"
_REMOVED = "it loads and runs code from outside"
_REPEATS_PREFILL = "it runs the prompt again from the start"

_GONE = "transformers 5 no longer has it and would load and run code from outside"
_OWN_BATCHING = "it schedules prompts itself, which needs ids instead of embeddings"

REFUSED: dict[str, str] = {
    "assistant_confidence_threshold": _SECOND_MODEL,
    "assistant_early_exit": _SECOND_MODEL,
    "assistant_ensemble_weight": _SECOND_MODEL,
    "assistant_lookbehind": _SECOND_MODEL,
    "assistant_model": _SECOND_MODEL,
    "assistant_tokenizer": _SECOND_MODEL,
    "cache_config": _OWN_CACHE,
    "cache_implementation": _OWN_CACHE,
    "constraints": _GONE,
    "continuous_batching_config": _OWN_BATCHING,
    "custom_generate": _REMOVED,
    "decoder_start_token_id": _ENCODER,
    "diversity_penalty": _GONE,
    "dola_layers": _GONE,
    "encoder_no_repeat_ngram_size": _PROMPT_IDS,
    "encoder_repetition_penalty": _PROMPT_IDS,
    "force_words_ids": _GONE,
    "forced_bos_token_id": _ENCODER,
    "guidance_scale": _REPEATS_PREFILL,
    "is_assistant": _SECOND_MODEL,
    "low_memory": _GONE,
    "max_cache_len": _OWN_CACHE,
    "max_matching_ngram_size": _PROMPT_IDS,
    "negative_prompt_attention_mask": _REPEATS_PREFILL,
    "negative_prompt_ids": _REPEATS_PREFILL,
    "num_assistant_tokens": _SECOND_MODEL,
    "num_assistant_tokens_schedule": _SECOND_MODEL,
    "num_beam_groups": _GONE,
    "penalty_alpha": _GONE,
    "prefill_chunk_size": _OWN_CACHE,
    "prompt_lookup_num_tokens": _PROMPT_IDS,
    "speculation_type": _SECOND_MODEL,
    "target_lookbehind": _SECOND_MODEL,
    "token_healing": _PROMPT_IDS,
    "trust_remote_code": _REMOVED,
    "use_cache": _OWN_CACHE,
    "use_mtp": _SECOND_MODEL,
}
"""Option names that are refused, with the reason."""

SERVED_BY_CALL = (
    "generation_config",
    "logits_processor",
    "prefix_allowed_tokens_fn",
    "stopping_criteria",
    "streamer",
    "synced_gpus",
)
"""Arguments of `generate` itself, outside its config, that pass through."""

_OURS = (
    "attention_mask",
    "input_ids",
    "inputs",
    "inputs_embeds",
    "past_key_values",
    "position_ids",
    "return_dict_in_generate",
    "tokenizer",
)


def with_config(options: Mapping[str, Any]) -> dict[str, Any]:
    """Lay options over those that a ready `generation_config` among them sets."""
    given = dict(options)
    config = given.pop("generation_config", None)
    if config is None:
        return given
    written = (name for name in config.to_diff_dict() if name != "transformers_version")
    return {**{name: getattr(config, name) for name in written}, **given}


COUNTS = ("max_length", "max_new_tokens", "num_beams", "num_return_sequences")
"""Options that count something of which there must be at least one."""


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse what cannot be served.

    Raises:
        GenerationOptionError: an option is unknown, is the engine's own, is in `REFUSED`, or
            counts less than one.
    """
    from transformers import GenerationConfig

    known = (
        {name for name in GenerationConfig().to_dict() if not name.startswith("_")}
        | set(SERVED_BY_CALL)
        | set(REFUSED)
    )
    for name, value in options.items():
        if name in _OURS:
            raise GenerationOptionError(
                f"generation option '{name}' is set by the engine itself. Leave it out."
            )
        if name in REFUSED and value is not None and value is not False:
            raise GenerationOptionError(
                f"generation option '{name}' cannot be served: {REFUSED[name]}. Leave it out."
            )
        if name not in known:
            raise GenerationOptionError(
                f"unknown generation option '{name}'{near(name, known)}. "
                "See transformers' GenerationConfig."
            )
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if name in COUNTS and value is not None and not (whole and value >= 1):
            raise GenerationOptionError(
                f"generation option '{name}' must be a whole number of at least 1, got {value!r}. "
                "Raise it, or leave it out."
            )


WITH_PROMPT_IDS = ("no_repeat_ngram_size", "repetition_penalty")
"""Options that read the prompt's ids and are served by a processor that knows them."""


def prompt_processors(
    options: dict[str, Any],
    defaults: Any,
    prompt: Sequence[Sequence[int]],
    looked: Sequence[Sequence[int]] = (),
) -> list[Any]:
    """Return logits processors for the options of `WITH_PROMPT_IDS`, and switch these off.

    Args:
        options: generation options; those served here are set to their neutral values.
        defaults: the generation config of the language model, which may ask for them too.
        prompt: the text ids of each row, slots left out.
        looked: for each row, the places among the generated ids that are looks.
    """
    from transformers.generation.logits_process import (
        NoRepeatNGramLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
    )

    makers: dict[str, tuple[Any, float]] = {
        "no_repeat_ngram_size": (NoRepeatNGramLogitsProcessor, 0),
        "repetition_penalty": (RepetitionPenaltyLogitsProcessor, 1.0),
    }
    processors = []
    for name in WITH_PROMPT_IDS:
        make, neutral = makers[name]
        value = options.get(name)
        value = getattr(defaults, name, None) if value is None else value
        if value is not None:
            options[name] = neutral
            if value != neutral:
                processors.append(_WithPrompt(make(value), prompt, looked))
    return processors


class _WithPrompt:
    """Shows a logits processor the prompt's ids before the generated ones."""

    def __init__(
        self, inner: Any, prompt: Sequence[Sequence[int]], looked: Sequence[Sequence[int]]
    ) -> None:
        self.inner = inner
        self.prompt = prompt
        self.looked = looked

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Process (rows, generated) ids and (rows, vocabulary) scores; rows may be repeated."""
        repeats = input_ids.shape[0] // len(self.prompt)
        parts = []
        for row in range(input_ids.shape[0]):
            known = torch.tensor(self.prompt[row // repeats], device=input_ids.device)
            own = input_ids[row]
            if self.looked:
                kept = torch.ones_like(own, dtype=torch.bool)
                kept[list(self.looked[row])] = False
                own = own[kept]
            whole = torch.cat([known.to(input_ids.dtype), own])[None]
            parts.append(self.inner(whole, scores[row : row + 1]))
        return torch.cat(parts)


def repeats_of(options: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many rows each prompt becomes while decoding, and how many are returned."""
    config = options.get("generation_config")

    def value(name: str) -> int:
        found = options.get(name, getattr(config, name, None))
        return int(found) if found is not None else 1

    returned = value("num_return_sequences")
    return max(value("num_beams"), returned), returned
