"""Attention behind one function: `attend(q, k, v, …, backend="auto")`.

A backend is a class with constants and a list of reasons why it cannot serve some inputs; the
dispatcher, error texts, tests and benchmarks all read that list.
"""

from ipn_core.attention.backend import AttentionBackend
from ipn_core.attention.dispatch import (
    attend,
    available_backends,
    backend_reasons,
    get_backend,
)
from ipn_core.attention.inputs import AttentionInputs

__all__ = [
    "AttentionBackend",
    "AttentionInputs",
    "attend",
    "available_backends",
    "backend_reasons",
    "get_backend",
]
