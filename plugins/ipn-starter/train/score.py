"""Measure the packaged checkpoints and write their model card.

python plugins/ipn-starter/train/score.py [ROW …] [--second FOLDER]

Every row is what `ipn eval` prints with the row's options; results are kept in `scores.json` beside
this file, so that rows can be measured one at a time. The card is written from all there are. With
--second the rows are measured for a checkpoint that was trained with another seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ipn_core import IPN
from ipn_core.evaluation.evaluate import evaluate
from ipn_core.files import atomic_write
from ipn_core.tasks import open_task

HERE = Path(__file__).parent
SCORES = HERE / "scores.json"
CARD = HERE.parent / "MODEL_CARD.md"

ROWS: dict[str, tuple[str, str, str, bool]] = {
    "rvii test": ("rvii", "emoji-scenes", "test", False),
    "rvii paraphrase": ("rvii", "emoji-scenes", "paraphrase", False),
    "rvii composition": ("rvii", "emoji-scenes", "composition", False),
    "rvii test, shuffled requests": ("rvii", "emoji-scenes", "test", True),
    "rvii easy-vqa": ("rvii", "easy-vqa", "test", False),
    "static test": ("static", "emoji-scenes", "test", False),
    "static easy-vqa": ("static", "easy-vqa", "test", False),
}
"""Interaction, task, split, whether requests are shuffled."""


SECOND = "second seed: "
"""What the names of rows begin with that were measured with --second."""


def measure(row: str, source: str) -> dict[str, Any]:
    """Return what `ipn eval --json` would."""
    interact, task, split, shuffled = ROWS[row]
    model = IPN.from_pretrained(source, interact=interact)
    examples = open_task(task).examples(split)
    report = evaluate(model, examples, task=task, split=split, batch_size=64, shuffled=shuffled)
    return report.to_json()


def command(row: str) -> str:
    """Return the command line that measures the same."""
    interact, task, split, shuffled = ROWS[row]
    options = " --shuffled" if shuffled else ""
    return f"ipn eval {task} --split {split} --interact {interact}{options}"


def table(row: str, found: dict[str, Any]) -> str:
    """Return a section of the card."""
    lines = [f"### {row}", "", f"`{command(row)}`", ""]
    guess = found.get("guess")
    lines.append("| type | n | right | 95 % interval |" + (" guessing |" if guess else ""))
    lines.append("|---|---|---|---|" + ("---|" if guess else ""))
    whole = {"n": found["n"], "accuracy": found["accuracy"], "ci95": found["ci95"], "guess": guess}
    for name, score in {**found["by_type"], "**all**": whole}.items():
        low, high = score["ci95"]
        cells = [name, f"{score['n']:,}", _percent(score["accuracy"])]
        cells.append(f"{_percent(low)} to {_percent(high)}")
        if guess:
            cells.append(f"{_percent(score['guess']['accuracy'])} ({score['guess']['answer']})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def seeds(scores: dict[str, Any]) -> str:
    """Return a section that compares the two trainings."""
    lines = [
        "### Another seed",
        "",
        "The same command with `seed=1`, its checkpoint measured with `--model runs/seed1/model`;",
        "the first one is packaged, whichever is better.",
        "",
        "| row | packaged | second seed |",
        "|---|---|---|",
    ]
    for row in ROWS:
        if SECOND + row in scores:
            both = [scores[row], scores[SECOND + row]]
            cells = [f"{_percent(s['accuracy'])} of {s['n']:,}" for s in both]
            lines.append("| " + " | ".join([row, *cells]) + " |")
    return "\n".join(lines)


def write_card() -> None:
    """Write the card from the scores that there are."""
    scores = json.loads(SCORES.read_text())
    head = (HERE / "card.md").read_text(encoding="utf-8")
    sections = [table(row, scores[row]) for row in ROWS if row in scores]
    if any(name.startswith(SECOND) for name in scores):
        sections.append(seeds(scores))
    atomic_write(CARD, (head + "\n" + "\n\n".join(sections) + "\n").encode())


def main() -> None:
    """Measure the rows that are named, or all, and write the card."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="; ".join(ROWS))
    parser.add_argument("--second", metavar="FOLDER", help="a checkpoint of another seed")
    arguments = parser.parse_args()
    for row in arguments.rows:
        if row not in ROWS:
            parser.error(f"unknown row '{row}': there are {'; '.join(ROWS)}")
    for row in arguments.rows or ROWS:
        result = measure(row, arguments.second or "starter")
        scores = json.loads(SCORES.read_text()) if SCORES.exists() else {}
        name = SECOND + row if arguments.second else row
        scores[name] = result
        atomic_write(SCORES, (json.dumps(scores, indent=1) + "\n").encode())
        print(f"{name}: {_percent(result['accuracy'])} of {result['n']:,}", flush=True)
    write_card()


if __name__ == "__main__":
    main()
