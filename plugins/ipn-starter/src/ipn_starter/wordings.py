"""How the questions of `emoji-scenes` are worded: in training, and held out for two test splits.

`{rel}` is a relation, `{noun}` a noun and `{a}` one with its article, `{axis}` row or column,
`{things}` a category; `{r}` and `{c}` are a row and a column in digits, `{rw}` and `{cw}` in words,
`{rth}` and `{cth}` as ordinals. The first of each type is the plain wording, the only one that
`val`, `test` and `composition` use.

What `paraphrase` holds out, training must not come near: no wording of training or of development
uses a word of `KEPT_OUT`, around which the held-out ones are built.
"""

from __future__ import annotations

__all__ = ["DEVELOPMENT", "HELD_OUT", "KEPT_OUT", "ORDINALS", "RELATIONS", "TRAINED"]

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
        "What is in column {c}, row {r}?",
        "What is in row {rw}, column {cw}?",
        "Identify the item at row {r}, column {c}.",
        "Which item is in the cell at row {r} and column {c}?",
        "In row {r}, what is in column {c}?",
        "In column {c}, what is in row {r}?",
        "What occupies row {r}, column {c}?",
        "Column {c}, row {r}. What is it?",
        "Read row {r}, column {c}.",
        "What has been drawn in row {r}, column {c}?",
        "Please say what row {r}, column {c} holds.",
        "Go to row {r}, then to column {c}. What do you see?",
        "Which picture is at row {r}, column {c}?",
        "There is something in row {r}, column {c}. What is it?",
        "What's in the {cth} column of the {rth} row?",
        "Describe the content of row {r}, column {c} in one word.",
        "The cell in row {r}, column {c} contains what?",
        "I am pointing at row {r}, column {c}. What is this?",
        "Could you name the thing at row {r} and column {c}?",
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
        "What's just {rel} the {noun}?",
        "Identify the item {rel} the {noun}.",
        "Which item is {rel} the {noun}?",
        "Start at the {noun}. What is {rel} it?",
        "There is something {rel} the {noun}. What is it?",
        "The thing {rel} the {noun} is what?",
        "{Rel} the {noun}, what do you see?",
        "Please say what is {rel} the {noun}.",
        "Who or what is the neighbour {rel} the {noun}?",
        "What has been drawn {rel} the {noun}?",
        "Which picture is right next to the {noun}, {rel} it?",
        "What would I see if I looked {rel} the {noun}?",
        "Could you name what is {rel} the {noun}?",
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
        "Has {a} been drawn here?",
        "Is any of these things {a}?",
        "Yes or no: is there {a}?",
        "Does this picture have {a} in it?",
        "Please check whether there is {a}.",
        "I am looking for {a}. Is there one?",
        "Is {a} among the things shown?",
        "Does it show {a}?",
        "Could you check if {a} is there?",
        "Say whether {a} is shown.",
        "Is {a} part of the picture?",
        "Are we looking at a picture with {a}?",
        "Can {a} be seen?",
        "Do we have {a} here?",
    ),
    "where": (
        "Which {axis} is the {noun} in?",
        "In which {axis} is the {noun}?",
        "What {axis} is the {noun} in?",
        "Which {axis} contains the {noun}?",
        "Which {axis} shows the {noun}?",
        "Name the {axis} that the {noun} is in.",
        "Where is the {noun}: in which {axis}?",
        "Give the {axis} number of the {noun}.",
        "The {noun} is shown in which of the {axis}s?",
        "Look at the {noun}. Which {axis} is it in?",
        "What is the {axis} of the {noun}?",
        "Please say which {axis} has the {noun}.",
        "Which {axis} do you see the {noun} in?",
        "Which {axis} would I look at to see the {noun}?",
        "On which {axis} is the {noun}?",
        "There is {a} here. In which {axis}?",
        "The {noun}: which {axis}?",
        "Which {axis} has the {noun} been drawn in?",
        "Could you name the {axis} with the {noun}?",
        "What number is the {axis} holding the {noun}?",
        "Look for the {noun} and say its {axis}.",
    ),
    "count": (
        "How many {things} are there?",
        "How many {things} can you see?",
        "How many {things} does the picture show?",
        "How many {things} are in the picture?",
        "Count the {things}.",
        "What is the number of {things}?",
        "How many {things} does this contain?",
        "How many of these are {things}?",
        "Please count all {things} here.",
        "Say how many {things} are shown.",
        "The picture has how many {things}?",
        "How many {things} have been drawn?",
        "What number of {things} do you see?",
        "Of all the things shown, how many are {things}?",
        "If you count the {things}, how many do you get?",
        "How many {things} do we have here?",
        "Could you count the {things}?",
        "{Things}: how many?",
        "There are how many {things}?",
    ),
}

DEVELOPMENT: dict[str, tuple[str, ...]] = {
    "cell": (
        "Can you say which thing row {r} has in column {c}?",
        "What is that at row {r} and column {c}?",
        "Looking at column {c} in row {r}, what is shown?",
        "Which one of them is in row {r}, column {c}?",
    ),
    "relation": (
        "Can you say which thing is {rel} the {noun}?",
        "What is that {rel} the {noun}?",
        "Looking {rel} the {noun}, what is shown?",
        "Which one of them is {rel} the {noun}?",
    ),
    "exist": (
        "Can you say if there is {a}?",
        "Is that {a} in the image?",
        "Looking at the picture, is there {a}?",
        "Is one of them {a}?",
    ),
    "where": (
        "Can you say which {axis} the {noun} is in?",
        "What is the number of the {axis} with the {noun}?",
        "Looking for the {noun}, which {axis} is right?",
        "Which one of the {axis}s has the {noun}?",
    ),
    "count": (
        "Can you say how many {things} there are?",
        "What is the count of {things}?",
        "Looking at the picture, how many {things} are shown?",
        "How many of them are {things}?",
    ),
}
"""For `val-paraphrase`: never trained, looked at while developing."""

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

KEPT_OUT = frozenset(
    {"object", "sits", "tell", "me", "find", "immediately", "placed", "anywhere", "appear"}
    | {"scene", "found", "total"}
)
"""Words that the held-out wordings turn on, and that training and development never use."""

RELATIONS: dict[str, tuple[str, str]] = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
"""The usual words first; training also uses the others, in the plain wording."""

ORDINALS = ("first", "second", "third", "fourth")
