"""Where the time of a first token and of a batch about one picture goes, by operator.

    python -m benchmarks.profiles [--threads N]

Shares of the processor's time; the batch is run with the cache of the picture copied to every row,
and stored once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from ipn_core import shared_cache
from ipn_core.benchmarking.engine import subjects
from ipn_core.benchmarking.engine.first_token import setup_first_token
from ipn_core.benchmarking.engine.questions import QUESTIONS, Album
from ipn_core.benchmarking.engine.timing import threads

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product_flash_attention_for_cpu", "aten::_softmax"),
    "copies": ("aten::cat", "aten::copy_", "aten::index", "aten::index_select"),
}


def shares(run: Callable[[], object], repeats: int = 2) -> tuple[float, dict[str, float]]:
    """Return the seconds of the processor that a run takes, and the shares of each kind."""
    run()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(repeats):
            run()
    started = time.process_time()
    run()
    seconds = time.process_time() - started
    own = {event.key: event.self_cpu_time_total for event in found.key_averages()}
    whole = sum(own.values())
    parts = {kind: sum(own.get(n, 0) for n in names) / whole for kind, names in KINDS.items()}
    return seconds, {**parts, "the rest": 1 - sum(parts.values())}


def main() -> None:
    """Print the shares."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, help="fewer than all, on a busy machine")
    with threads(parser.parse_args().threads), torch.no_grad():
        llm, name = subjects.backbone()
        print(f"{name}\n\nseconds of the processor; shares of them")
        for prefix in (128, 512):
            _show(f"first token, prefix {prefix}", setup_first_token(llm, prefix).round)
        album = Album(llm, QUESTIONS)
        batch = album.batches()["one batch"]
        for worth, how in ((1 << 40, "copied to each row"), (1, "stored once")):
            shared_cache.WORTH_STORING_ONCE = worth
            _show(f"16 questions as a batch, the cache {how}", batch)


def _show(what: str, run: Callable[[], object]) -> None:
    seconds, found = shares(run)
    cells = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in found.items())
    print(f"{what:58}{seconds:7.2f} s   {cells}", flush=True)


if __name__ == "__main__":
    main()
