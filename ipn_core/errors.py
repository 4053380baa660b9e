"""Errors: what was wrong, what was given, what is allowed, and the next step.

`UserError` and its children mean that the user's input is wrong (exit code 2). Any other
`IPNError` means that something failed although the input was right (exit code 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AttentionUnavailableError",
    "CheckpointError",
    "ChecksumError",
    "ConfigError",
    "DataError",
    "DownloadError",
    "GenerationOptionError",
    "IPNError",
    "ImageError",
    "PluginError",
    "PromptError",
    "ShapeError",
    "StageError",
    "TrainingError",
    "UnknownNameError",
    "UserError",
    "first_line",
    "near",
    "unknown_name",
]


class IPNError(Exception):
    """Base of all errors that this package raises on purpose."""

    exit_code = 1


class UserError(IPNError):
    """The user's input is wrong; nothing was changed on disk."""

    exit_code = 2


class AttentionUnavailableError(UserError):
    """No attention backend accepts these inputs; the text lists each one's reasons."""


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, unsafe, or does not fit its config."""


class ConfigError(UserError):
    """A config holds an unknown key or a value outside its range."""


class DataError(UserError):
    """A data file or task is malformed; the text names the line."""


class GenerationOptionError(UserError):
    """A generation option that this engine cannot serve, refused by name."""


class ImageError(UserError):
    """A picture is missing, not a picture, damaged, or over the pixel limit."""


class PluginError(UserError):
    """A plugin cannot be imported or built; the text names its distribution and version."""


class PromptError(UserError):
    """A prompt is empty, too long, or puts images where they cannot stand."""


class ShapeError(UserError):
    """A plugin returned a tensor of the wrong shape; the text names both shapes."""


class UnknownNameError(UserError):
    """A name that nothing is registered under; the text lists the known ones."""


class DownloadError(IPNError):
    """Weights could not be fetched: the index or the hub cannot be reached, or refuses."""


class ChecksumError(DownloadError):
    """Fetched bytes are not the published ones."""


class StageError(IPNError):
    """A stage or another component failed while it ran; the text names who brought it."""


class TrainingError(IPNError):
    """Training stopped itself; the text names the tensor or the check that failed."""


def first_line(error: BaseException) -> str:
    """Return the first line of another library's error, ending with a full stop.

    A line that ends with a colon announces the next one, which then belongs to it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    while len(lines) > 1 and lines[0].endswith(":"):
        lines[:2] = [f"{lines[0]} {lines[1]}"]
    return (lines or [type(error).__name__])[0].rstrip(".") + "."


def near(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the nearest known name, or an empty string."""
    folded = {k.casefold(): k for k in known}
    wanted = name.casefold()
    begins = sorted(k for k in folded if len(name) > 2 and k.startswith(wanted))
    close = begins[:1] or difflib.get_close_matches(wanted, folded, n=1, cutoff=0.6)
    return f" (did you mean '{folded[close[0]]}'?)" if close else ""


def unknown_name(kind: str, name: str, known: Iterable[str], see: str) -> UnknownNameError:
    """Build the error for a name that nothing is registered under.

    Args:
        kind: what was looked up, such as "interaction".
        name: what the user gave.
        known: the names that would have been accepted.
        see: a command that shows them, such as "ipn plugins".
    """
    names = sorted(known)
    listed = ", ".join(names) if names else "none"
    return UnknownNameError(
        f"unknown {kind} '{name}': installed are {listed}{near(name, names)}. See '{see}'."
    )
