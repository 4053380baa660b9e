"""Every installed strategy: what it trains, what it puts into the LLM, and what it is held against.

    python -m benchmarks.strategies            print the table
    python -m benchmarks.strategies --write    put it into README.md

Parameters and tokens are counted on a model that is built and asked, with each strategy's defaults:
a LLaMA of SmolLM2-135M's shape, and 64 patches of EfficientNet-Lite0's width. Differences are what
the plugins' tests record when they compare with an original (`record_oracle`).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.pages import fill
from ipn_core.benchmarking.engine.subjects import GRID, SMOLLM2_SHAPE, WIDTH
from ipn_core.model import IPN
from ipn_core.plugins import get_registry
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig, tiny_tokenizer

README = Path(__file__).parents[1] / "README.md"


@dataclass(frozen=True)
class Oracle:
    """What a strategy was held against.

    Attributes:
        strategy: the strategy.
        original: what computed the expected values.
        difference: the largest difference, as a fraction of the largest expected value.
    """

    strategy: str
    original: str
    difference: float

    @classmethod
    def parse(cls, text: str) -> Oracle:
        """Read what a test recorded: `strategy | original | difference`."""
        strategy, original, difference = (part.strip() for part in text.split("|"))
        return cls(strategy, original, float(difference))


def oracles() -> list[Oracle]:
    """Run the tests that record one; the largest difference of each pair is kept."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = sorted(
            str(path)
            for path in README.parent.glob("plugins/*/tests/test_*.py")
            if "record_oracle" in path.read_text(encoding="utf-8")
        )
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *files]
        done = subprocess.run(command, cwd=README.parent, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"an oracle fails:\n{done.stdout[-4000:]}")
        found = [
            Oracle.parse(node.attrib["value"])
            for node in ET.parse(report).iter("property")
            if node.attrib["name"] == "oracle"
        ]
    worst: dict[tuple[str, str], Oracle] = {}
    for oracle in found:
        key = (oracle.strategy, oracle.original)
        if key not in worst or oracle.difference > worst[key].difference:
            worst[key] = oracle
    return list(worst.values())


def row(strategy: str, known: list[Oracle]) -> list[str]:
    """Return one strategy's cells."""
    component = get_registry().get("strategy", strategy)
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    shape = {**SMOLLM2_SHAPE, "vocab_size": len(tokenizer)}
    lm = LlamaForCausalLM(LlamaConfig(**shape, pad_token_id=tokenizer.pad_token_id))
    model = IPN.from_config(
        {"strategy": strategy, "backbone": "llama", "encoder": "tiny"},
        backbone=get_registry().get("backbone", "llama").load()(lm, tokenizer),
        encoder=TinyEncoder(TinyEncoderConfig(width=WIDTH, grid=GRID[0])),
    )
    own = model.trained_state()
    trained = sum(p.numel() for n, p in model.named_parameters() if n in own and _used(model, n))
    tokens = model.ask(Image.new("RGB", (64, 64)), "What is it?", max_new_tokens=1).tokens
    mine = [o for o in known if o.strategy == strategy]
    cells = [f"`{strategy}`", component.plugin.distribution, f"{trained / 1e6:,.2f} M"]
    cells += [str(tokens[kind]) for kind in ("static", "request", "dynamic")]
    cells.append("<br>".join(o.original for o in mine) or "—")
    cells.append("<br>".join(f"{o.difference:.0e}" for o in mine) or "—")
    return cells


def _used(model: IPN, name: str) -> bool:
    """Whether the layout has the slots that a parameter stands for."""
    return model.config.layout.rounds > 0 or name not in ("slots.request", "slots.dynamic")


def table() -> str:
    """Return the table, in Markdown."""
    known = oracles()
    head = [
        "strategy",
        "distribution",
        "trained parameters",
        "static tokens",
        "request tokens",
        "dynamic tokens",
        "held against",
        "largest difference",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for strategy in sorted(get_registry().entries("strategy")):
        lines.append("| " + " | ".join(row(strategy, known)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    made = table()
    if parser.parse_args().write:
        fill(README, "strategies", made)
    else:
        print(made)


if __name__ == "__main__":
    main()
