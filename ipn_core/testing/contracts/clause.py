"""A clause of a contract: what must hold, and what to do where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["ContractError", "clause", "same"]


class ContractError(AssertionError):
    """A component breaks its contract; the text names the clause, what was seen and the mend."""


@contextmanager
def clause(name: str, mend: str) -> Iterator[None]:
    """Name the clause that the block checks, and what to do if it fails.

    Raises:
        ContractError: the block failed in any way.
    """
    try:
        yield
    except ContractError:
        raise
    except Exception as error:
        seen = str(error).strip() or "the check is false"
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        raise ContractError(f"clause '{name}': {kind}{seen}\nWhat to do: {mend}") from error


def same(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """Assert that two tensors differ by at most `tolerance` of the largest number expected."""
    assert found.shape == expected.shape, (
        f"the shape is {tuple(found.shape)}, expected {tuple(expected.shape)}"
    )
    if not expected.numel():
        return
    largest = expected.detach().abs().max().double()
    apart = (found.detach().double() - expected.detach().double()).abs().max()
    bound = tolerance * torch.clamp(largest, min=1e-6)
    assert apart <= bound, f"results differ by {apart:.2e}, more than {bound:.2e} allows"
