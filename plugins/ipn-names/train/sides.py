"""Compare ways to name what is in a place, by the classifier alone, with the place known.

    python -m ipn_names.stamps                fetches the photographs
    python plugins/ipn-names/train/sides.py   takes a minute a row

The photographs are those for tuning, two to four to a picture. The first row is the most that a
perfect reading of parts could be expected to give: how often the classifier is right about the same
photograph alone, all of it at 224 pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from ipn_names.classes import labels
from ipn_names.encoder import ImageNetNames, ImageNetNamesConfig
from ipn_names.stamps import stamps
from ipn_names.windows import WINDOWS, inside, pooling
from ipn_names.wordings import CELLS
from score import first_choices, known
from torch import Tensor

from ipn_core.tasks import open_task

SCENES = 200
PIXELS = (384, 448, 512, 640, 768)
AREAS = torch.tensor([(bottom - top) * (right - left) for top, left, bottom, right in WINDOWS])

Way = Callable[[Tensor, Tensor], Tensor]
WAYS: dict[str, Way] = {
    "surest window": lambda logits, areas: logits.softmax(-1).amax(0),
    "mean of windows": lambda logits, areas: logits.softmax(-1).mean(0),
    "mean of logits": lambda logits, areas: logits.mean(0),
    "by area": lambda logits, areas: areas @ logits.softmax(-1),
    "largest window": lambda logits, areas: logits[areas.argmax()],
    "smallest window": lambda logits, areas: logits[areas.argmin()],
}
"""What is said of a place: from the logits (n, 1000) and the areas (n,) of its windows."""


def _percent(right: list[bool]) -> str:
    return f"{100 * sum(right) / len(right):.1f} %"


@torch.no_grad()
def main() -> None:
    """Print the share that is right, by the longer side in pixels and the way."""
    every = open_task("photo-stamps", {"scenes": SCENES}).examples("tune")
    asked = [e for e in every if e.type == "side"]
    places = [e.answers[0] for e in every if e.type == "where"]  # of the same things
    some = [stamp for stamp in stamps() if stamp.word]
    alone = first_choices(ImageNetNames(ImageNetNamesConfig()), some)
    words = {stamp.name: stamp.word for stamp in some}
    clear = [known(example, alone, words) for example in asked]
    print(f"| {len(asked)} sides | " + " | ".join(WAYS) + " |")
    print("|---" * (len(WAYS) + 1) + "|")
    print("| alone | " + " | ".join([_percent(clear)] * len(WAYS)) + " |")
    for pixels in PIXELS:
        encoder = ImageNetNames(ImageNetNamesConfig(parts=pixels))
        right: dict[str, list[bool]] = {name: [] for name in WAYS}
        for example, place in zip(asked, places, strict=True):
            (encoded,) = encoder.encode([example.images[0].load()])
            shown = inside()[CELLS.index(place)]
            logits = (pooling(encoded.grid) @ encoded.values)[shown]
            for name, way in WAYS.items():
                label = labels()[int(way(logits, AREAS[shown]).argmax())]
                right[name].append(label.name in example.answers)
        print(f"| {pixels} pixels | " + " | ".join(map(_percent, right.values())) + " |")


if __name__ == "__main__":
    main()
