"""Whether a static cache, or a compiled step, makes decoding faster here.

    python -m benchmarks.decoding [--repeats N] [--threads N] [--compile]

All ways decode the same tokens greedily after the same prefix, and must find the same ones:

    dynamic   the cache that grows, as the engine has it
    static    transformers' StaticCache, allocated beforehand
    compiled  the same, its step through torch.compile (a minute or more of compiling)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.alone import run_alone
from benchmarks.results import Row
from ipn_core.benchmarking.engine.table import Found, took
from ipn_core.benchmarking.engine.timing import collected, in_turn, ratios

PREFIX, NEW = 139, 32


class Decoding:
    """A prefix, and greedy decoding after it."""

    def __init__(self, lm: Any) -> None:
        self.lm = lm
        draw = torch.Generator().manual_seed(0)
        self.prefix = torch.randint(0, lm.config.vocab_size, (1, PREFIX), generator=draw)

    def dynamic(self) -> list[int]:
        """Decode with the cache that grows."""
        from transformers import DynamicCache

        return self._decode(DynamicCache(config=self.lm.config), self.lm)

    def static(self, step: Callable[..., Any] | None = None) -> list[int]:
        """Decode with a cache that is as large as it will get."""
        from transformers import StaticCache

        return self._decode(
            StaticCache(config=self.lm.config, max_cache_len=PREFIX + NEW),
            self.lm if step is None else step,
        )

    @torch.no_grad()
    def _decode(self, cache: Any, step: Callable[..., Any]) -> list[int]:
        logits = self.lm(self.prefix, past_key_values=cache, logits_to_keep=1).logits
        tokens: list[Tensor] = [logits[:, -1].argmax(-1, keepdim=True)]
        for number in range(NEW - 1):
            at = torch.tensor([[PREFIX + number]])
            logits = step(tokens[-1], past_key_values=cache, position_ids=at).logits
            tokens.append(logits[:, -1].argmax(-1, keepdim=True))
        return torch.cat(tokens, dim=1)[0].tolist()


def measure(llm: Any, repeats: int, compiles: bool) -> Found:
    """Time all ways against the cache that grows."""
    lm = llm.lm
    decoding = Decoding(lm)
    ways: dict[str, Callable[[], list[int]]] = {
        "dynamic": decoding.dynamic,
        "static": decoding.static,
    }
    notes = ["the prefix is run within each way, so that ratios are a little too near to 1"]
    if compiles:
        step = torch.compile(lm, dynamic=False)
        started = time.perf_counter()
        decoding.static(step)
        notes.append(f"compiling took {time.perf_counter() - started:.0f} s")
        ways["compiled"] = lambda: decoding.static(step)
    expected = ways["dynamic"]()
    for name, run in ways.items():
        if (got := run()) != expected:
            raise AssertionError(f"'{name}' finds {got}, not {expected}")
    found = collected(in_turn(ways, repeats))
    rows = took("decoding", found)
    rows += [
        Row.of(f"decoding/{name} : dynamic", ratios(found[name], found["dynamic"]), unit="ratio")
        for name in ways
        if name != "dynamic"
    ]
    return Found("decoding", f"{NEW} tokens after {PREFIX}", rows, notes=notes)


if __name__ == "__main__":
    run_alone("decoding", __doc__ or "", measure)
