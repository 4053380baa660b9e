"""Where the time of first tokens, of decoding and of a batch about one picture goes, by operator.

    python -m benchmarks.profiles [--repeats N] [--threads N]

Shares of the time that torch's profiler gives to operators themselves, what they call left out. The
batch is run with the cache of the picture copied to every row, and stored once; decoding with the
cache that grows in place, and as plain `generate` with transformers' own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.alone import run_alone
from benchmarks.results import Row
from ipn_core import shared_cache
from ipn_core.benchmarking.engine import decoding
from ipn_core.benchmarking.engine.first_token import setup_first_token
from ipn_core.benchmarking.engine.questions import QUESTIONS, Album
from ipn_core.benchmarking.engine.table import Found

PREFIXES = (128, 512)
KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_softmax",
        "aten::masked_fill_",
    ),
    "copies": (
        "aten::cat",
        "aten::copy_",  # of slices that are written, and of `clone`, `contiguous` and `to`
        "aten::index",
        "aten::index_select",
        "aten::_index_put_impl_",
        "aten::index_copy_",
        "aten::gather",
    ),
}
"""By name, the operators of a kind; `index_put` and `index_copy` call those with an underscore."""
REST = "the rest"
NEVER = 1 << 40
"""More positions than any cache saves by being stored once."""

Run = Callable[[], object]


def shares(run: Run) -> dict[str, float]:
    """Return the share of each kind in the time of a run."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        run()
    own = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    whole = sum(own.values())
    parts = {kind: sum(own.get(n, 0) for n in names) / whole for kind, names in KINDS.items()}
    return {**parts, REST: 1 - sum(parts.values())}


@contextmanager
def worth(positions: int) -> Iterator[None]:
    """Let a beginning be stored once from so many positions on inside the block."""
    before = shared_cache.WORTH_STORING_ONCE
    shared_cache.WORTH_STORING_ONCE = positions
    try:
        yield
    finally:
        shared_cache.WORTH_STORING_ONCE = before


def runs(llm: Any) -> dict[str, Run]:
    """Return what is profiled, by name."""
    cases = {prefix: setup_first_token(llm, prefix) for prefix in PREFIXES}
    batch = Album(llm, QUESTIONS).batches()["one batch"]

    def asked(positions: int) -> object:
        with worth(positions):
            return batch(len(QUESTIONS))

    longest = cases[max(PREFIXES)]
    answer = f"{decoding.NEW} tokens after {longest.prefix + longest.rest}"
    return {
        **{f"first token, prefix {prefix}": case.round for prefix, case in cases.items()},
        f"{answer}, a cache that grows in place": partial(decoding._answer, longest),
        f"{answer}, plain generate": partial(decoding._generate, longest),
        f"{len(QUESTIONS)} questions, the cache copied to each row": partial(asked, NEVER),
        f"{len(QUESTIONS)} questions, the cache stored once": partial(asked, 1),
    }


def measure(llm: Any, repeats: int, compiles: bool) -> Found:
    """Profile everything, so many times each; nothing is compiled."""
    rows: list[Row] = []
    for name, run in runs(llm).items():
        run()
        started = time.process_time()
        run()
        seconds = time.process_time() - started
        rows.append(Row.of(f"profiles/{name}, seconds of the processor", [seconds]))
        found = [shares(run) for _ in range(repeats)]
        rows += [
            Row.of(f"profiles/{name}: {kind}", [one[kind] for one in found], unit="ratio")
            for kind in found[0]
        ]
    return Found(
        "profiles",
        "shares of the time of operators, prefill and decoding together",
        rows,
        notes=[
            "products of queries with a beginning that is stored once count as matrix products",
            "a processor's seconds are of one run without the profiler, all threads together",
        ],
    )


if __name__ == "__main__":
    with torch.no_grad():
        run_alone("profiles", __doc__ or "", measure, repeats=3, compiles=False)
