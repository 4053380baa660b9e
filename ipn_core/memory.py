"""How the C library hands out memory, for commands that compute for minutes."""

from __future__ import annotations

import ctypes
import os

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Numbers of mallopt(3)."""
_NEVER, _STEP = 2**31 - 1, 2**27


def keep_freed_memory() -> bool:
    """Let this process use the memory again that it frees, rather than return it at once.

    glibc maps every block above 32 MB anew and unmaps it when it is freed, so that each page of a
    large activation is faulted in, zeroed and given back in every step: of the CPU time of encoding
    pictures 32 at a time, that is more than half. What the process holds is then the most that it
    ever needed. Settings of the user's own, `MALLOC_…` in the environment, are left as they are.

    Returns:
        Whether anything was set: only glibc has these settings.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    try:
        os.confstr("CS_GNU_LIBC_VERSION")
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, ValueError):
        return False
    settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: _NEVER, _TOP_PAD: _STEP}
    done = [mallopt(name, value) for name, value in settings.items()]
    return all(done)
