"""Two hops with no look, one and two: how often each is right on the test split of `emoji-hops`.

    python -m benchmarks.hops 0 1 2-early 2    answer the test questions, write the table
    python -m benchmarks.hops 2 --runs DIR     one of them, trained elsewhere

A row is what `ipn eval emoji-hops --split test --model RUNS/…/model` prints, with the tokens that a
question puts into the LLM beside its text, and the looks that a question took. Rows are kept
in a file, so that they can be measured one at a time; without a number the table is written again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.pages import fill
from ipn_core import IPN, hookimpl
from ipn_core.evaluation.evaluate import evaluate
from ipn_core.evaluation.scoring import guess
from ipn_core.files import atomic_write
from ipn_core.tasks import Example, open_task

STARTER = Path(__file__).parents[1] / "plugins" / "ipn-starter"
PAGE = STARTER / "README.md"
SCORES = STARTER / "train" / "hops" / "scores.json"
TASK, SPLIT = "emoji-hops", "test"
LOOKS = {
    "0": ("hops-0", "0"),
    "1": ("hops-1", "1"),
    "2-early": ("hops-2", "2, `decide` for 60 steps"),
    "2": ("hops-2-decide", "2, `decide` for 300 more"),
}
"""By name: where the checkpoint lies, and what the table calls it."""
TYPES = {"one": "one hop", "two": "two hops"}
BATCH_SIZE = 48


class Looks:
    """Counts the samples that look; register it with `IPN.observing`."""

    def __init__(self) -> None:
        self.count = 0

    @hookimpl(wrapper=True)
    def request(self, context: Any) -> Any:
        """Count the rows of a round."""
        self.count += len(context.samples)
        return (yield)


def measure(model: IPN, examples: list[Example]) -> dict[str, Any]:
    """Return what `ipn eval --json` prints, the tokens and the looks of a question added."""
    looks = Looks()
    with model.observing(looks):
        report = evaluate(model, examples, task=TASK, split=SPLIT, batch_size=BATCH_SIZE)
    twice = next(e for e in examples if e.type == "two")
    asked = model.ask([p.load() for p in twice.images], twice.question)
    own = {kind: asked.tokens[kind] for kind in ("static", "request", "dynamic")}
    return {**report.to_json(), "tokens": own, "looks": looks.count / len(examples)}


def table(scores: dict[str, dict[str, Any]], examples: list[Example]) -> str:
    """Return the table, in Markdown, of the rows that there are."""
    counts = {kind: sum(e.type == kind for e in examples) for kind in TYPES}
    titles = [f"{title} ({counts[kind]:,})" for kind, title in TYPES.items()]
    head = ["looks", "tokens of the picture", "looks a question", *titles, "all"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, (_, title) in LOOKS.items():
        if name in scores:
            one = scores[name]
            cells = [title, str(sum(one["tokens"].values())), f"{one['looks']:.2f}"]
            cells += [_share(one["by_type"][kind]) for kind in TYPES]
            lines.append("| " + " | ".join([*cells, f"**{_share(one)}**"]) + " |")
    most = guess([e.answers for e in examples])
    often = f"{100 * most.accuracy:.1f} %"
    lines += ["", f"The most frequent answer, {most.answer}, would be right in {often} of all."]
    return "\n".join(lines)


def _share(score: dict[str, Any]) -> str:
    low, high = score["ci95"]
    return f"{100 * score['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def main() -> None:
    """Measure the rows that are named, and write the table of all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("looks", nargs="*", metavar="LOOKS", help=", ".join(LOOKS))
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the trainings lie")
    arguments = parser.parse_args()
    for name in arguments.looks:
        if name not in LOOKS:
            parser.error(f"there is no training of {name!r} looks: give {', '.join(LOOKS)}")
    examples = list(open_task(TASK).examples(SPLIT))
    scores = json.loads(SCORES.read_text()) if SCORES.exists() else {}
    for name in arguments.looks:
        model = IPN.from_pretrained(arguments.runs / LOOKS[name][0] / "model")
        scores[name] = measure(model, examples)
        atomic_write(SCORES, (json.dumps(scores, indent=1) + "\n").encode())
        print(f"{name} looks: {_share(scores[name])} of {scores[name]['n']:,}", flush=True)
    fill(PAGE, "hops", table(scores, examples))


if __name__ == "__main__":
    main()
