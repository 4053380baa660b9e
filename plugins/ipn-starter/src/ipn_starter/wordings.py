"""How the questions of `emoji-scenes` are worded: in training, and held out for `paraphrase`.

`{rel}` is a relation, `{the}` and `{a}` a noun with its article, `{axis}` row or column, `{things}`
a category, `{r}` and `{c}` a row and a column. The first of each type is the plain wording, the
only one that `val`, `test` and `composition` use.
"""

from __future__ import annotations

__all__ = ["HELD_OUT", "ORDINALS", "RELATIONS", "TRAINED"]

TRAINED: dict[str, tuple[str, ...]] = {
    "cell": (
        "What is in row {r}, column {c}?",
        "What can you see in row {r}, column {c}?",
        "Which thing is in column {c} of row {r}?",
        "Name the thing in row {r}, column {c}.",
        "Row {r}, column {c}: what is there?",
        "What does row {r} show in column {c}?",
        "What is shown at column {c}, row {r}?",
        "What is in the {rth} row and the {cth} column?",
    ),
    "relation": (
        "What is {rel} the {noun}?",
        "What is directly {rel} the {noun}?",
        "Which thing is {rel} the {noun}?",
        "What can you see {rel} the {noun}?",
        "Name the thing {rel} the {noun}.",
        "What stands {rel} the {noun}?",
        "Look {rel} the {noun}: what is there?",
        "What does the picture show {rel} the {noun}?",
    ),
    "exist": (
        "Is there {a}?",
        "Is there {a} in the picture?",
        "Can you see {a}?",
        "Does the picture show {a}?",
        "Do you see {a} here?",
        "Is {a} in the picture?",
        "Does the image contain {a}?",
        "Is {a} shown?",
    ),
    "where": (
        "Which {axis} is the {noun} in?",
        "In which {axis} is the {noun}?",
        "What {axis} is the {noun} in?",
        "Which {axis} contains the {noun}?",
        "Which {axis} shows the {noun}?",
        "Name the {axis} that the {noun} is in.",
        "Where is the {noun}: in which {axis}?",
    ),
    "count": (
        "How many {things} are there?",
        "How many {things} can you see?",
        "How many {things} does the picture show?",
        "How many {things} are in the picture?",
        "Count the {things}.",
        "What is the number of {things}?",
        "How many {things} does this contain?",
    ),
}

HELD_OUT: dict[str, tuple[str, ...]] = {
    "cell": (
        "Which object sits in row {r}, column {c}?",
        "Tell me what is in row {r} and column {c}.",
        "Look at row {r}, column {c}. What do you find?",
    ),
    "relation": (
        "Which object is immediately {rel} the {noun}?",
        "Tell me what is {rel} the {noun}.",
        "What is placed {rel} the {noun}?",
    ),
    "exist": (
        "Is there {a} anywhere in this image?",
        "Tell me whether there is {a}.",
        "Does {a} appear in this scene?",
    ),
    "where": (
        "The {noun} is in which {axis}?",
        "Tell me the {axis} of the {noun}.",
        "In what {axis} can the {noun} be found?",
    ),
    "count": (
        "How many {things} do you find in this image?",
        "Tell me how many {things} there are.",
        "Give the total number of {things}.",
    ),
}

RELATIONS: dict[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
"""The plain wording first; training also uses the others."""

ORDINALS = ("first", "second", "third", "fourth")
