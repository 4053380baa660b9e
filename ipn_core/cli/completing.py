"""What a shell offers for the words of a command line, without importing what they name."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable

__all__ = ["installed", "kinds"]


def installed(kind: str) -> Callable[[str], list[str]]:
    """Return what completes a name that plugins register.

    Args:
        kind: of the components, such as "task".

    Returns:
        A function from the beginning of a word to the names that begin so; none where plugins
        cannot be looked up, for a shell has no place for the reason.
    """

    def complete(incomplete: str) -> list[str]:
        from ipn_core.errors import IPNError
        from ipn_core.plugins import get_registry

        # What a plugin prints while it is imported would be taken for names.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(IPNError):
            names = sorted(get_registry().entries(kind))
            return [name for name in names if name.startswith(incomplete)]
        return []

    return complete


def kinds(incomplete: str) -> list[str]:
    """Complete what `ipn new` can write a package for."""
    from ipn_core.scaffold import KINDS

    return [kind for kind in sorted(KINDS) if kind.startswith(incomplete)]
