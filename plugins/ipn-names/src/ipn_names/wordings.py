"""How things are asked for: the wordings of training, of development, and those held out for tests.

`{a}` is a noun with its article, `{noun}` the noun, `{some}` a noun of one or many, `{in}` a place.
"""

from __future__ import annotations

__all__ = ["CELLS", "DEVELOPMENT", "HELD_OUT", "PLACES", "TRAINED"]

CELLS = (
    "top left", "top", "top right",
    "left", "middle", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
"""The nine places of a picture, row by row."""

PLACES: dict[str, tuple[str, ...]] = {
    "top left": ("in the top left", "in the upper left corner", "at the top left"),
    "top": ("at the top", "in the upper half", "above"),
    "top right": ("in the top right", "in the upper right corner", "at the top right"),
    "left": ("on the left", "on the left side", "on the left hand side"),
    "middle": ("in the middle", "in the centre", "in the center"),
    "right": ("on the right", "on the right side", "on the right hand side"),
    "bottom left": ("in the bottom left", "in the lower left corner", "at the bottom left"),
    "bottom": ("at the bottom", "in the lower half", "below"),
    "bottom right": ("in the bottom right", "in the lower right corner", "at the bottom right"),
}
"""How each of them is said; the first one is the plain one."""

TRAINED: dict[str, tuple[str, ...]] = {
    "name": (
        "What is this?", "What is it?", "What do you see?", "What is in the picture?",
        "What does the photo show?", "Name the thing in the picture.", "What is that?",
        "What can you see here?", "Tell me what this is.", "What's this?", "What am I looking at?",
        "Describe the picture.", "What animal is this?", "What kind of thing is this?",
        "What is shown in the image?", "Which thing is this?",
    ),
    "side": (
        "What is {in}?", "What do you see {in}?", "What can be seen {in}?",
        "Name the thing {in}.", "Which thing is {in}?", "What is shown {in} of the picture?",
        "Tell me what is {in}.", "What's {in}?",
    ),
    "exist": (
        "Is there {a}?", "Is there {a} in the picture?", "Do you see {a}?", "Is this {a}?",
        "Can you see {a} here?", "Does the photo show {a}?", "Is {a} in the image?",
        "Is it {a}?", "Is {a} there?", "Does this show {a}?", "Is there any {noun}?",
    ),
    "where": (
        "Where is the {noun}?", "Where do you see the {noun}?", "On which side is the {noun}?",
        "In which part of the picture is the {noun}?", "Where in the photo is {a}?",
        "Where can I find the {noun}?", "Tell me where the {noun} is.",
    ),
}  # fmt: skip
"""By kind of question; the first wording of each is the plain one."""

DEVELOPMENT: dict[str, tuple[str, ...]] = {
    "name": ("What does this picture show?", "What have we got here?"),
    "side": ("What do we have {in}?", "What object is {in}?"),
    "exist": ("Can {a} be seen in it?", "Do we have {a} here?"),
    "where": ("Where would I find the {noun}?", "At which place is the {noun}?"),
}
"""Wordings that training never uses, to look at while developing."""

HELD_OUT: dict[str, tuple[str, ...]] = {
    "name": ("Please identify the subject.", "What could this be?", "Say what you see."),
    "side": ("Could you tell what stands {in}?", "Identify whatever is {in}."),
    "exist": ("Would you say {a} is visible?", "Have you spotted {a}?", "Any {noun} around?"),
    "where": ("Point out the {noun}'s position.", "Could you locate the {noun}?"),
}
"""Wordings built around words that no other list uses."""
