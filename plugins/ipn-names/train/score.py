"""Measure the packaged model on photographs and write its model card.

    python -m ipn_names.stamps                      fetches the photographs
    python plugins/ipn-names/train/score.py         measures on those that nothing was tuned on
    python plugins/ipn-names/train/score.py --tune  prints the same for the other half

The first table asks what each photograph of the half shows, and compares with the first choice of
the classifier; the others are the task `photo-stamps`, as `ipn eval` asks it.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ipn_names.classes import article, labels
from ipn_names.sayings import UNSURE
from ipn_names.stamps import Stamp, called, stamps

from ipn_core import IPN, Example, Picture
from ipn_core.evaluation.evaluate import evaluate
from ipn_core.evaluation.scoring import Score
from ipn_core.files import atomic_write
from ipn_core.images import load_image
from ipn_core.tasks import open_task

HERE = Path(__file__).parent
CARD = HERE.parent / "MODEL_CARD.md"
SCORES = HERE / "scores.json"
QUESTION = "What is this?"


def first_choices(model: IPN, some: Iterable[Stamp]) -> dict[str, str]:
    """Return the classifier's first choice of each photograph by name."""
    found = {}
    for stamp in some:
        (encoded,) = model.encoder.encode([load_image(stamp.path)])
        found[stamp.name] = labels()[int(encoded.global_token.argmax())].name
    return found


def naming(model: IPN, some: Sequence[Stamp], choices: dict[str, str]) -> dict[str, Any]:
    """Ask what each photograph shows; right is the classifier's first choice."""
    examples = [
        Example(
            QUESTION,
            (choices[stamp.name], UNSURE.format(article(choices[stamp.name]))),
            (Picture(stamp.name, functools.partial(load_image, stamp.path)),),
        )
        for stamp in some
    ]
    report = evaluate(model, examples, task="first choice", split="", batch_size=16)
    verdicts = [p.right for p in report.predictions]
    guessed = [UNSURE.split(",")[0] in p.text for p in report.predictions]
    true = [choices[stamp.name] in called().get(stamp.word, ()) for stamp in some]
    captioned = [i for i, stamp in enumerate(some) if stamp.word]
    return {
        "first choice of the classifier said": row(verdicts),
        "of those whose caption ends with a word of ours: first choice right": row(
            [true[i] for i in captioned]
        ),
        "the same, where no guess was said": row([true[i] for i in captioned if not guessed[i]]),
        "the same, where a guess was said": row([true[i] for i in captioned if guessed[i]]),
    }


def row(verdicts: Sequence[bool]) -> dict[str, Any]:
    """Return a share with its interval."""
    score = Score.of(verdicts)
    return {"n": score.n, "accuracy": score.accuracy, "ci95": list(score.ci95)}


def composed(
    model: IPN, split: str, scenes: int, choices: dict[str, str], shuffled: bool = False
) -> dict[str, Any]:
    """Ask about composed pictures; by type, over all and over what the classifier knows alone."""
    every = open_task("photo-stamps", {"scenes": scenes}).examples(split)
    examples = [e for e in every if e.type != "name"]
    report = evaluate(
        model, examples, task="photo-stamps", split=split, batch_size=16, shuffled=shuffled
    )
    word = {stamp.name: stamp.word for stamp in stamps()}

    def known(example: Example) -> bool:
        names = example.images[0].name.partition(":")[2].split("+")
        asked = [name for name in names if word[name] == example.names[0]]
        return all(choices[name] in called()[word[name]] for name in asked)

    found: dict[str, Any] = {}
    for kind in ("exist", "side", "where"):
        mine = [p for p in report.predictions if p.example.type == kind]
        found[f"{kind}, all"] = row([p.right for p in mine])
        found[f"{kind}, known"] = row([p.right for p in mine if known(p.example)])
    return found


def table(title: str, command: str, rows: dict[str, Any]) -> str:
    """Return a section of the card."""
    lines = [f"### {title}", "", f"`{command}`", "", "| | n | right | 95 % interval |"]
    lines.append("|---|---|---|---|")
    for name, one in rows.items():
        low, high = (f"{100 * x:.1f} %" for x in one["ci95"])
        lines.append(f"| {name} | {one['n']} | {100 * one['accuracy']:.1f} % | {low} to {high} |")
    return "\n".join(lines)


def measure(source: str, tune: bool, scenes: int) -> dict[str, dict[str, Any]]:
    """Return all tables of a half, by title."""
    model = IPN.from_pretrained(source)
    captioned = [stamp for stamp in stamps() if stamp.word]
    other = [stamp for stamp in stamps() if not stamp.word]
    half = [*captioned[0 if tune else 1 :: 2], *other[0 if tune else 1 :: 2]]
    choices = first_choices(model, half)
    found = {"Naming": naming(model, half, choices)}
    splits = ("tune",) if tune else ("test", "paraphrase")
    for split in splits:
        found[f"Composed, {split}"] = composed(model, split, scenes, choices)
    found[f"Composed, {splits[0]}, shuffled requests"] = composed(
        model, splits[0], scenes, choices, shuffled=True
    )
    return found


def main() -> None:
    """Measure, print, and write the card unless it is the half for tuning."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true", help="the half that is for tuning")
    parser.add_argument("--model", default="photo", help="by default the packaged one")
    parser.add_argument("--scenes", type=int, default=70, help="composed pictures a split")
    arguments = parser.parse_args()
    found = measure(arguments.model, arguments.tune, arguments.scenes)
    command = "python plugins/ipn-names/train/score.py" + (
        f" --scenes {arguments.scenes}" if arguments.scenes != parser.get_default("scenes") else ""
    )
    sections = [table(title, command, rows) for title, rows in found.items()]
    print("\n\n".join(sections))
    if not arguments.tune:
        atomic_write(SCORES, (json.dumps(found, indent=1) + "\n").encode())
        head = (HERE / "card.md").read_text(encoding="utf-8")
        atomic_write(CARD, (head + "\n" + "\n\n".join(sections) + "\n").encode())


if __name__ == "__main__":
    main()
