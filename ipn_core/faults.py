"""Faults stay inside: what a plugin's component raises while it runs is told with its name."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, ClassVar

from ipn_core.errors import IPNError, StageError

__all__ = ["Guarded", "naming", "ran"]


@contextmanager
def naming(who: Callable[[], str], method: str, within: object = None) -> Iterator[None]:
    """Say who failed in whatever goes wrong while the block runs.

    An `IPNError` speaks for itself, and too little memory is no plugin's fault: both are handed on
    as they are.

    Args:
        who: says it, such as "task 'mine' of plugin ipn-mine 0.1.0"; called only for an error.
        method: what the block runs of it.
        within: where the block runs other things too, the one whose `method` is meant.

    Raises:
        StageError: anything else was raised.
    """
    try:
        yield
    except (IPNError, MemoryError):
        raise
    except Exception as error:
        # By its name: this is imported where torch is not.
        if type(error).__name__ == "OutOfMemoryError":
            raise
        if within is not None and not ran(within, error, method):
            raise
        raise StageError(f"{who()} failed in {method}: {type(error).__name__}: {error}") from error


def ran(part: object, error: BaseException, method: str | None = None) -> bool:
    """Whether an error came out of a method of an object, by default out of any."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(
        frame.f_locals.get("self") is part and method in (None, frame.f_code.co_name)
        for frame in frames
    )


class Guarded:
    """Base of components that are called in many places: each names itself in what it raises.

    What a subclass defines of the methods in `GUARDED` is wrapped once, when the class is made. An
    object that no registry has built is nobody's, and raises as it is.
    """

    GUARDED: ClassVar[tuple[str, ...]] = ()
    _brought_by: str | None = None

    def __init_subclass__(cls, **options: Any) -> None:
        """Wrap what the class defines."""
        super().__init_subclass__(**options)
        for name in cls.GUARDED:
            if isinstance(method := vars(cls).get(name), FunctionType):
                setattr(cls, name, _guarded(method, name))

    def sign(self, who: str) -> None:
        """Say who brought this object; see `Component.label`."""
        # So that it also works for a frozen dataclass.
        object.__setattr__(self, "_brought_by", who)


def _guarded(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Guarded, *arguments: Any, **options: Any) -> Any:
        who = self._brought_by
        if who is None:
            return method(self, *arguments, **options)
        with naming(lambda: who, name):
            found = method(self, *arguments, **options)
        return _each(found, who, name) if isinstance(found, Iterator) else found

    return call


def _each(found: Iterator[Any], who: str, method: str) -> Iterator[Any]:
    """Yield what a generator does; it raises only while it is read."""
    with naming(lambda: who, method):
        yield from found
