"""Write the names of the ImageNet classes and what else they are called, out of WordNet 3.0.

python plugins/ipn-names/train/names.py WORDNET IDS > plugins/ipn-names/src/ipn_names/imagenet.tsv

WORDNET is the folder of its `data.noun` (Debian: package `wordnet-base`, /usr/share/wordnet), IDS a
file with the classes' ids, one a line in the classifier's order (`imagenet_synsets.txt` of the
package `timm`). An id is the place of a noun in that file; its words are the class's names, and the
nouns above it say what kind of thing it is.
"""

from __future__ import annotations

import sys
from pathlib import Path

KINDS = [
    "animal",
    "bird",
    "fish",
    "insect",
    "mammal",
    "reptile",
    "amphibian",
    "dog",
    "cat",
    "wolf",
    "fox",
    "bear",
    "monkey",
    "ape",
    "elephant",
    "sheep",
    "pig",
    "rabbit",
    "mouse",
    "squirrel",
    "horse",
    "cow",
    "deer",
    "goat",
    "antelope",
    "whale",
    "seal",
    "snake",
    "lizard",
    "turtle",
    "frog",
    "salamander",
    "crocodile",
    "spider",
    "butterfly",
    "beetle",
    "bee",
    "ant",
    "fly",
    "grasshopper",
    "moth",
    "crab",
    "lobster",
    "snail",
    "shark",
    "ray",
    "owl",
    "eagle",
    "duck",
    "goose",
    "parrot",
    "penguin",
    "chicken",
    "hen",
    "finch",
    "stork",
    "crane",
    "heron",
    "gull",
    "bug",
    "crustacean",
    "dinosaur",
    "arthropod",
    "marsupial",
    "hound",
    "terrier",
    "spaniel",
    "retriever",
    "poodle",
    "shepherd",
    "fungus",
    "mushroom",
    "fruit",
    "vegetable",
    "food",
    "dessert",
    "bread",
    "drink",
    "sauce",
    "vehicle",
    "car",
    "truck",
    "bus",
    "train",
    "locomotive",
    "bicycle",
    "motorcycle",
    "boat",
    "ship",
    "sailboat",
    "aircraft",
    "airplane",
    "spacecraft",
    "tank",
    "wagon",
    "van",
    "cart",
    "building",
    "house",
    "church",
    "bridge",
    "tower",
    "fence",
    "roof",
    "bank",
    "shop",
    "restaurant",
    "castle",
    "room",
    "furniture",
    "chair",
    "table",
    "bed",
    "couch",
    "sofa",
    "desk",
    "bench",
    "cabinet",
    "lamp",
    "shelf",
    "seat",
    "clothing",
    "hat",
    "shoe",
    "boot",
    "dress",
    "coat",
    "shirt",
    "skirt",
    "trousers",
    "sweater",
    "swimsuit",
    "glove",
    "sock",
    "mask",
    "helmet",
    "jewelry",
    "necklace",
    "bag",
    "instrument",
    "guitar",
    "violin",
    "flute",
    "horn",
    "drum",
    "piano",
    "saw",
    "hammer",
    "knife",
    "tool",
    "weapon",
    "gun",
    "rifle",
    "sword",
    "ball",
    "toy",
    "machine",
    "computer",
    "telephone",
    "clock",
    "watch",
    "camera",
    "television",
    "radio",
    "screen",
    "keyboard",
    "printer",
    "bottle",
    "cup",
    "glass",
    "bowl",
    "plate",
    "pot",
    "pan",
    "jug",
    "basket",
    "box",
    "container",
    "barrel",
    "spoon",
    "fork",
    "mountain",
    "shore",
    "sign",
    "apple",
    "berry",
    "pepper",
    "sandwich",
    "soup",
    "hare",
    "kangaroo",
    "panda",
    "phone",
    "oven",
    "curtain",
    "carpet",
    "rug",
    "pen",
    "towel",
    "tent",
    "pillow",
    "lighthouse",
    "rocket",
    "alligator",
    "gecko",
    "iguana",
    "chameleon",
    "cobra",
    "viper",
    "python",
    "toad",
    "newt",
    "otter",
    "mug",
    "purse",
    "coral",
    "stove",
    "plane",
    "musical_instrument",
    "wind_instrument",
    "kitchen_utensil",
]
"""Words for kinds of things, as people say them."""

NOT_THE_FIRST = {
    "crane": ("02012849",),
    "ray": ("01495701",),
    "bug": ("02236355", "02159955"),
    "fly": ("02190166",),
    "seal": ("02076196",),
    "instrument": ("03800933",),
    "horn": ("03536348", "03536761"),
    "glass": ("03438257", "04272054"),
    "plate": ("03959936",),
    "bank": ("02787772",),
    "mask": ("03725035", "03724870"),
    "watch": ("04555897",),
    "screen": ("04152593",),
    "keyboard": ("03614007",),
    "tank": ("04389033",),
    "hound": ("02087551",),
    "chicken": ("01791625",),
    "crab": ("01976957",),
    "lobster": ("01982650",),
    "drink": ("07881800",),
    "shepherd": ("02104523", "02104882"),
    "tower": ("04460130",),
    "pot": ("03990474",),
    "pan": ("03880531",),
    "goose": ("01855672",),
    "train": ("04468005",),
    "turtle": ("01662784",),
    "whale": ("02062744",),
    "heron": ("02008041",),
    "van": ("04520170",),
    "table": ("04379243",),
    "bowl": ("02880940",),
    "skirt": ("04230808",),
    "seat": ("04161981",),
    "glove": ("03441112",),
    "pepper": ("07720442",),
    "mug": ("03797390",),
    "alligator": ("01698434",),
    "chameleon": ("01693783",),
    "otter": ("02444819",),
    "coral": ("01915811",),
    "sign": ("06793231", "06791372"),
    "gun": ("04090263", "03948459"),
}
"""Where a word's first noun is not the one that is meant: the ids of those that are."""


class WordNet:
    """The nouns of WordNet.

    Attributes:
        words: of each noun, by its id.
        above: ids of the kinds that it belongs to directly.
    """

    def __init__(self, folder: Path) -> None:
        self.words: dict[str, list[str]] = {}
        self.above: dict[str, list[str]] = {}
        for line in (folder / "data.noun").read_text(encoding="utf-8").splitlines():
            if line.startswith(" "):
                continue
            fields = line.split(" | ")[0].split()
            count = int(fields[3], 16)
            self.words[fields[0]] = [fields[4 + 2 * i] for i in range(count)]
            rest = fields[5 + 2 * count :]
            pairs = zip(rest[::4], rest[1::4], strict=False)
            self.above[fields[0]] = [to for mark, to in pairs if mark in ("@", "@i")]
        self.senses: dict[str, list[str]] = {}
        for line in (folder / "index.noun").read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):
                fields = line.split()
                self.senses[fields[0]] = fields[-int(fields[2]) :]

    def kinds(self, noun: str) -> set[str]:
        """Return a noun and everything above it."""
        found, left = set(), [noun]
        while left:
            one = left.pop()
            if one not in found:
                found.add(one)
                left += self.above[one]
        return found

    def latin(self, word: str) -> bool:
        """Whether it looks like the Latin name of a species: its last word is no noun itself."""
        *first, last = word.split(" ")
        return bool(first) and word[0].isupper() and last.lower() not in self.senses


def main() -> None:
    """Write the table."""
    wordnet = WordNet(Path(sys.argv[1]))
    ids = [line[1:] for line in Path(sys.argv[2]).read_text(encoding="utf-8").split()]
    kinds = {k: NOT_THE_FIRST.get(k, wordnet.senses.get(k, [])[:1]) for k in KINDS}
    taken: set[str] = set()
    for noun in ids:
        words = [word.replace("_", " ") for word in wordnet.words[noun]]
        name = next((word for word in words if word not in taken), words[0])
        taken.add(name)
        above = wordnet.kinds(noun)
        other = [word for word in words if word != name and not wordnet.latin(word)]
        other += [k.replace("_", " ") for k, nouns in kinds.items() if above & {*nouns}]
        print("n" + noun, name, ", ".join(dict.fromkeys(o for o in other if o != name)), sep="\t")


if __name__ == "__main__":
    main()
