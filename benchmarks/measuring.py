"""What benchmarks share: the LLM, the shape of a picture's features, and timing rows in turn."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ipn_core.plugins import get_registry
from ipn_core.testing.tiny import tiny_tokenizer

GRID = (8, 8)
WIDTH = 1280
SMOLLM2_SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
INTERACT = {
    "name": "rvii",
    "width": 256,
    "depth": 2,
    "heads": 8,
    "mlp_ratio": 2,
    "guide": {"width": 128, "tallies": 8},
}

Timed = dict[str, float]


def backbone() -> tuple[Any, str]:
    """Return SmolLM2 where its weights are present, else a random LLaMA of its shape; and which."""
    from ipn_starter.weights import SMOLLM2
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    adapter = get_registry().get("backbone", "llama").load()
    if SMOLLM2.present():
        folder = SMOLLM2.folder()
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return adapter(lm, AutoTokenizer.from_pretrained(folder)), "SmolLM2-135M-Instruct"
    torch.manual_seed(0)
    return adapter(
        LlamaForCausalLM(LlamaConfig(**SMOLLM2_SHAPE)), tiny_tokenizer()
    ), "a random LLaMA of SmolLM2-135M's shape"


def machine() -> str:
    """Say on what a benchmark runs."""
    return (
        f"float32, {torch.get_num_threads()} threads of "
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    )


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Let so many threads work inside the block, by default one a core."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def timing(into: Timed, name: str) -> Iterator[None]:
    """Count the seconds of the block."""
    started = time.perf_counter()
    yield
    into[name] = time.perf_counter() - started


def in_turn(
    rows: Mapping[str, Callable[[], Any]], repeats: int, warm_up: int = 2
) -> Iterator[tuple[Timed, dict[str, Any]]]:
    """Run all rows, again and again; yields the seconds and the results of each repetition.

    Args:
        rows: by name; no row is always the one after another.
        repeats: how often.
        warm_up: further repetitions before them, which are not yielded.
    """
    names = list(rows)
    for repeat in range(-warm_up, repeats):
        shift = repeat % len(names)
        timed: Timed = {}
        results = {}
        for name in names[shift:] + names[:shift]:
            with timing(timed, name):
                results[name] = rows[name]()
        if repeat >= 0:
            yield timed, results


def collected(repetitions: Iterator[tuple[Timed, Any]]) -> dict[str, list[float]]:
    """Return the seconds of each row."""
    found: dict[str, list[float]] = {}
    for timed, _ in repetitions:
        for name, seconds in timed.items():
            found.setdefault(name, []).append(seconds)
    return found


def ratio(over: Sequence[float], under: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, p20 and p80 of ratios that are taken within each repetition."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def spread(values: list[float]) -> tuple[float, float, float]:
    """Return the median, p20 and p80."""
    low, *_, high = statistics.quantiles(values, n=5)
    return statistics.median(values), low, high


def seconds(names: Mapping[str, str], found: Mapping[str, list[float]]) -> list[str]:
    """Lay out what rows took, under a head."""
    head = f"{'':34}{'median':>11}{'p20':>11}{'p80':>11}"
    cells = {
        name: "".join(f"{1000 * value:8.0f} ms" for value in spread(taken))
        for name, taken in found.items()
    }
    return [head, *(f"{names[name]:34}{row}" for name, row in cells.items())]


def ratio_line(name: str, values: tuple[float, float, float]) -> str:
    """Lay out the median, p20 and p80 of a ratio."""
    middle, low, high = values
    return f"{name:34}{middle:8.3f}   ({low:.3f} to {high:.3f})"
