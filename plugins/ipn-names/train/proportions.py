"""Compare what may be done with a picture that is no square, by the classifier's first choices.

    python -m ipn_names.stamps                      fetches the photographs
    python plugins/ipn-names/train/proportions.py   asks about each of them alone

Right is a class that the last word of the caption may stand for; the second figure is of the half
of the photographs that nothing was tuned on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from ipn_names.classes import labels
from ipn_names.encoder import ImageNetNames, ImageNetNamesConfig
from ipn_names.stamps import called, stamps
from ipn_starter.encoder import feature_maps
from PIL import Image
from torch import Tensor

from ipn_core.images import load_image

SIDE = 224


def padded(image: Image.Image) -> Image.Image:
    """Return a picture in the middle of a white square."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), "white")
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    return square


@torch.no_grad()
def main() -> None:
    """Print the share that is right, for each way."""
    encoder = ImageNetNames(ImageNetNamesConfig(whole=SIDE))

    def at_once(image: Image.Image) -> Tensor:
        maps = feature_maps(encoder.net, [image], (SIDE, SIDE))
        logits: Tensor = encoder.net._fc(maps[0].mean((1, 2)))
        return logits

    ways: dict[str, Callable[[Image.Image], Tensor]] = {
        "proportions kept": lambda image: encoder.encode([image])[0].global_token,
        "padded to a square": lambda image: at_once(padded(image)),
        "made a square": at_once,
    }
    some = [stamp for stamp in stamps() if stamp.word]
    print(f"| {len(some)} photographs, {SIDE} pixels | all | the scored half |\n|---|---|---|")
    for name, way in ways.items():
        first = [labels()[int(way(load_image(s.path)).argmax())].name for s in some]
        right = [one in called()[s.word] for one, s in zip(first, some, strict=True)]
        shares = (100 * sum(half) / len(half) for half in (right, right[1::2]))
        print(f"| {name} | " + " | ".join(f"{share:.1f} %" for share in shares) + " |")


if __name__ == "__main__":
    main()
