"""Measure the connector `names`: does the LLM say the name that stands before the question?

    python -m ipn_names.stamps                    fetches the photographs
    python plugins/ipn-names/train/connector.py   of the half that nothing was tuned on

Nothing is trained: three turns in the prompt show what is to be said. With --parts the names of
that many rows and columns of parts follow the one of the whole picture.
"""

from __future__ import annotations

import argparse
import functools

from ipn_names.stamps import stamps
from score import QUESTION, first_choices, row

from ipn_core import IPN, Example, Picture
from ipn_core.evaluation.evaluate import evaluate
from ipn_core.images import load_image

SHOWN = ("espresso maker", "frog", "grey fox")
TURNS = "".join(
    f"<|im_start|>user\\n{name}\\n\\n\\n\\n\\n\\n{QUESTION}<|im_end|>\\n"
    f"<|im_start|>assistant\\n{name}<|im_end|>\\n"
    for name in SHOWN
)
TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% if loop.first and message['role'] == 'system' %}{{ '" + TURNS + "' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML, with turns before the user's own."""


def build(parts: int) -> IPN:
    """Return the connector between the frozen encoder and the frozen LLM."""
    config = {
        "backbone": {"name": "llama", "weights": "smollm2-135m-instruct"},
        "encoder": "imagenet-names",
        "perceive": {"name": "names", "names": 1, "parts": parts},
        "layout": {"rounds": 0},
        "prompt": {"system": "Repeat what stands first.", "template": TEMPLATE},
    }
    return IPN.from_config(config).eval()


def main() -> None:
    """Ask what each photograph shows; right is the classifier's first choice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", type=int, default=0, help="rows and columns of parts")
    parser.add_argument("--limit", type=int, default=None, help="only the first photographs")
    arguments = parser.parse_args()
    model = build(arguments.parts)
    captioned = [stamp for stamp in stamps() if stamp.word]
    other = [stamp for stamp in stamps() if not stamp.word]
    half = [*captioned[1::2], *other[1::2]][: arguments.limit]
    choices = first_choices(model.encoder, half)
    examples = [
        Example(
            QUESTION,
            (choices[stamp.name],),
            (Picture(stamp.name, functools.partial(load_image, stamp.path)),),
        )
        for stamp in half
    ]
    report = evaluate(model, examples, task="first choice", split="", batch_size=8)
    found = row([p.right for p in report.predictions])
    low, high = (f"{100 * x:.1f} %" for x in found["ci95"])
    share = f"{100 * found['accuracy']:.1f} %"
    print(f"| parts {arguments.parts} | {found['n']} | {share} | {low} to {high} |")


if __name__ == "__main__":
    main()
