"""Checks what a stage returned, so that whoever wrote it reads its name and both shapes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ipn_core.errors import ShapeError

if TYPE_CHECKING:
    from ipn_core.model import IPN

__all__ = ["expect"]


def expect(
    model: IPN, stage: str, result: Any, attribute: str, expected: tuple[int | None, ...] | None
) -> Tensor | None:
    """Return a tensor in a stage's result if it has the shape that the engine needs.

    Args:
        model: whose stage.
        stage: "request", "interact" or "inject".
        result: what it returned.
        attribute: where the tensor should be.
        expected: its shape, None for any size; None where there should be no tensor.

    Raises:
        ShapeError: it has another shape, or is there or not there against expectation.
    """
    tensor = None if isinstance(result, Tensor) else getattr(result, attribute, None)
    if expected is None and tensor is None:
        return None
    if (
        expected is not None
        and isinstance(tensor, Tensor)
        and tensor.ndim == len(expected)
        and all(e in (None, g) for e, g in zip(expected, tensor.shape, strict=True))
    ):
        return tensor
    sizes = ", ".join("·" if e is None else str(e) for e in expected or ())
    wanted = f"no {attribute}" if expected is None else f"({sizes})"
    got = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(result).__name__
    part = {"request": "requester", "interact": "interaction", "inject": "injector"}[stage]
    module = type(getattr(model, part)).__name__
    raise ShapeError(
        f"stage {stage} of {model.label(stage)} ({module}) returned {got}, expected {wanted}."
    )
