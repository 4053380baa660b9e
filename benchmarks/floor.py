"""How far the floor of a first token can be lowered, and by what.

    python -m benchmarks.floor [--repeats N] [--threads N] [--compile]

Each way is timed in turn against the plain forward, over the same prefix and the same few tokens
after it, and its result is held against it:

    packed   every linear layer through oneDNN, with its weights laid out for it beforehand
    bf16     the whole model in bfloat16
    early    the request read from an inner layer: the layers above it run once, over prefix and
             new tokens together
    compiled the forward over the new tokens through torch.compile (minutes of compiling)
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.alone import run_alone
from benchmarks.results import Row
from ipn_core.benchmarking.engine.table import Found, took
from ipn_core.benchmarking.engine.timing import Timed, collected, in_turn, ratios, timing

PREFIX, NEW = 128, 11
EARLY = (15, 26)
"""Layers that a request is read from: half way up, and where the starter reads its own."""


class Floor:
    """One prefix and the few tokens after it, run in different ways."""

    def __init__(self, lm: Any) -> None:
        self.lm = lm
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(0, lm.config.vocab_size, (1, PREFIX + NEW), generator=draw)
        with torch.no_grad():
            self.embeds = lm.get_input_embeddings()(ids)

    @torch.no_grad()
    def plain(self, lm: Any = None, small: Any = None) -> tuple[Tensor, Timed]:
        """Run prefix, then new tokens; returns the last logits, and the seconds of both."""
        from transformers import DynamicCache

        lm = self.lm if lm is None else lm
        small = lm.base_model if small is None else small
        embeds, timed = self.embeds.to(lm.dtype), Timed()
        cache = DynamicCache(config=lm.config)
        with timing(timed, "prefix"):
            lm.base_model(inputs_embeds=embeds[:, :PREFIX], past_key_values=cache, use_cache=True)
        with timing(timed, "rest"):
            new = embeds[:, PREFIX:]
            out = small(inputs_embeds=new, past_key_values=cache, use_cache=True)
            logits = lm.lm_head(out.last_hidden_state[:, -1])
        return logits.float(), timed

    @torch.no_grad()
    def early(self, layer: int) -> tuple[Tensor, Timed]:
        """Run the layers below `layer` twice, as for a request there, and those above it once."""
        from transformers import DynamicCache

        base, timed = self.lm.base_model, Timed()
        cache = DynamicCache(config=self.lm.config)
        with timing(timed, "prefix"):
            below = self._through(self.embeds[:, :PREFIX], cache, 0, layer, 0)
        with timing(timed, "rest"):
            new = self._through(self.embeds[:, PREFIX:], cache, 0, layer, PREFIX)
            both = torch.cat([below, new], dim=1)
            whole = self._through(both, cache, layer, len(base.layers), 0)
            logits = self.lm.lm_head(base.norm(whole[:, -1]))
        return logits, timed

    def _through(self, hidden: Tensor, cache: Any, first: int, last: int, start: int) -> Tensor:
        from transformers.masking_utils import create_causal_mask

        base, length = self.lm.base_model, hidden.shape[1]
        positions = torch.arange(start, start + length)[None]
        mask = None
        if start:
            mask = create_causal_mask(
                config=base.config,
                inputs_embeds=hidden,
                attention_mask=torch.ones(1, start + length, dtype=torch.long),
                past_key_values=cache,
                position_ids=positions,
            )
        rotary = base.rotary_emb(hidden, positions)
        for layer in base.layers[first:last]:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                position_embeddings=rotary,
            )
        return hidden


@contextmanager
def packed(lm: nn.Module) -> Iterator[None]:
    """Run linear layers through oneDNN inside the block; their weights are there twice."""
    ops = torch.ops.mkldnn
    layers = [m for m in lm.modules() if isinstance(m, nn.Linear)]
    for layer in layers:
        weight = ops._reorder_linear_weight(layer.weight.detach(), None)
        bias = layer.bias

        def run(x: Tensor, weight: Tensor = weight, bias: Tensor | None = bias) -> Tensor:
            return ops._linear_pointwise(x, weight, bias, "none", [], "")

        layer.forward = run
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def measure(llm: Any, repeats: int, compiles: bool) -> Found:
    """Time all ways against the plain one."""
    lm = llm.lm
    floor = Floor(lm)
    expected, _ = floor.plain()
    ways: dict[str, Callable[[], tuple[Tensor, Timed]]] = {"plain": floor.plain}
    notes = []
    low = copy.deepcopy(lm).to(torch.bfloat16)
    ways["bf16"] = lambda: floor.plain(low)
    twin = copy.deepcopy(lm)
    started = time.perf_counter()
    with packed(twin):
        notes.append(f"laying the weights out took {time.perf_counter() - started:.2f} s")
        ways["packed"] = lambda: floor.plain(twin)
        for layer in EARLY:
            if layer < len(lm.base_model.layers):
                ways[f"early {layer}"] = lambda layer=layer: floor.early(layer)
        if compiles:
            small = torch.compile(lm.base_model, dynamic=True)
            started = time.perf_counter()
            floor.plain(small=small)
            floor.plain(small=small)
            notes.append(f"compiling took {time.perf_counter() - started:.0f} s")
            ways["compiled"] = lambda: floor.plain(small=small)
        errors = {name: _off(run()[0], expected) for name, run in ways.items()}
        parts: dict[str, list[float]] = {}

        def timed() -> Iterator[tuple[Timed, Any]]:
            for whole, results in in_turn(ways, repeats):
                for name, (_, seconds) in results.items():
                    parts.setdefault(f"{name}, the rest", []).append(seconds["rest"])
                yield whole, results

        found = collected(timed())
    rows = took("floor", {**found, **parts})
    for name, error in errors.items():
        if name == "plain":
            continue
        for one, plain in ((found, "plain"), (parts, "plain, the rest")):
            mine = name if one is found else f"{name}, the rest"
            ratio = ratios(one[mine], one[plain])
            rows.append(Row.of(f"floor/{mine} : {plain}", ratio, unit="ratio", error=error))
    title = f"prefill of {PREFIX} tokens, then {NEW} more, without the interaction"
    return Found("floor", title, rows, notes=notes)


def _off(got: Tensor, expected: Tensor) -> float:
    off = float((got - expected).abs().max() / expected.abs().max())
    assert math.isfinite(off)
    return off


if __name__ == "__main__":
    run_alone("floor", __doc__ or "", measure)
