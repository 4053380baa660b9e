"""Measure the packaged model on photographs and write its model card.

    python -m ipn_names.stamps                      fetches the photographs
    python plugins/ipn-names/train/score.py         measures on those that nothing was tuned on
    python plugins/ipn-names/train/score.py --tune  prints the same for the other half

The first table asks about made-up evidence of one class after the other what it is, and then what
each photograph of the half shows, and compares with the first choice of the classifier; the others
are the task `photo-stamps`, as `ipn eval` asks it.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ipn_names.classes import article, labels
from ipn_names.sayings import UNSURE
from ipn_names.stamps import Stamp, called, stamps

from ipn_core import IPN, Example, Picture, Prompt, VisionEncoder, VisualFeatures
from ipn_core.clock import Clock
from ipn_core.evaluation.evaluate import evaluate
from ipn_core.evaluation.scoring import Score
from ipn_core.files import atomic_write
from ipn_core.generate import decode
from ipn_core.images import load_image
from ipn_core.tasks import open_task
from ipn_core.testing.tiny import tiny_picture

HERE = Path(__file__).parent
CARD = HERE.parent / "MODEL_CARD.md"
SCORES = HERE / "scores.json"
QUESTION = "What is this?"
COMPOSED = ("exist", "side", "where")


def first_choices(encoder: VisionEncoder, some: Iterable[Stamp]) -> dict[str, str]:
    """Return the classifier's first choice of each photograph by name."""
    found = {}
    for stamp in some:
        (encoded,) = encoder.encode([load_image(stamp.path)])
        found[stamp.name] = labels()[int(encoded.global_token.argmax())].name
    return found


@torch.no_grad()
def said_back(model: IPN, batch: int = 25) -> list[bool]:
    """Ask what it is where all evidence is of one class, for every class: is its name said?"""
    verdicts = []
    plan = model.planner.plan(Prompt.ask(QUESTION, [tiny_picture()]))
    alone = 14 * torch.eye(len(labels()))
    for start in range(0, len(labels()), batch):
        some = range(len(labels()))[start : start + batch]
        features = VisualFeatures.pack(
            [alone[i].expand(4, -1) for i in some],
            [(2, 2)] * len(some),
            range(len(some)),
            len(some),
            alone[[*some]],
        )
        percept = model.perceive([], [QUESTION] * len(some), features)
        clock = Clock(torch.device("cpu"))
        answers, _, _ = decode(model, [plan] * len(some), percept, {"max_new_tokens": 16}, clock)
        verdicts += [
            answer.text == labels()[i].name for i, answer in zip(some, answers, strict=True)
        ]
    return verdicts


def known(example: Example, choices: Mapping[str, str], words: Mapping[str, str]) -> bool:
    """Whether the first choice is right of the photograph, alone, that a question is about.

    Args:
        example: about a composed picture; one about what is not there counts as known.
        choices: the first choices by the photograph's name.
        words: of the captions, by the same.
    """
    names = example.images[0].name.partition(":")[2].split("+")
    asked = [name for name in names if words[name] == example.names[0]]
    return all(choices[name] in called()[words[name]] for name in asked)


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
        "names said back, of all classes": row(said_back(model)),
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
    examples = [e for e in every if e.type in COMPOSED]
    report = evaluate(
        model, examples, task="photo-stamps", split=split, batch_size=16, shuffled=shuffled
    )
    words = {stamp.name: stamp.word for stamp in stamps()}
    found: dict[str, Any] = {}
    for kind in COMPOSED:
        mine = [p for p in report.predictions if p.example.type == kind]
        found[f"{kind}, all"] = row([p.right for p in mine])
        found[f"{kind}, known"] = row([p.right for p in mine if known(p.example, choices, words)])
    return found


def kinds(model: IPN, split: str) -> dict[str, Any]:
    """Ask each photograph for kinds of things; the last row is the question of the README."""
    every = open_task("photo-stamps", {"scenes": 0}).examples(split)
    examples = [e for e in every if e.type == "kind"]
    report = evaluate(model, examples, task="photo-stamps", split=split, batch_size=16)
    there = [p for p in report.predictions if p.example.answers == ("yes",)]
    absent = [p for p in report.predictions if p.example.answers == ("no",)]
    dogs = [p for p in absent if p.example.names == ("dog",)]
    return {
        "a kind of thing that it shows": row([p.right for p in there]),
        "a kind of thing that it does not show": row([p.right for p in absent]),
        "of those, a dog": row([p.right for p in dogs]),
    }


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
    choices = first_choices(model.encoder, half)
    found = {"Naming": naming(model, half, choices)}
    splits = ("tune",) if tune else ("test", "paraphrase")
    for split in splits:
        found[f"Kinds, {split}"] = kinds(model, split)
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
