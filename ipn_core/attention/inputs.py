"""`AttentionInputs`: one call's tensors, checked once, as every backend reads them.

Letters: B batch, M queries, N keys, H heads, Hk heads of the keys and values, K width of a query's
or key's head, Kv width of a value's head. H is a multiple of Hk: H / Hk neighbouring heads of the
queries share one of the keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ipn_core.errors import ShapeError
from ipn_core.transfer import send, tensor_on

__all__ = ["AttentionInputs"]


@dataclass(frozen=True, eq=False, slots=True)
class AttentionInputs:
    """What one attention call was given; build it with `make`, which checks it.

    Attributes:
        q: (B, M, H, K) queries.
        k: (B, N, Hk, K) keys.
        v: (B, N, Hk, Kv) values.
        mask: bool, four dimensions that broadcast to (B, H, M, N), True where a query may look.
        bias: float, four dimensions that broadcast to (B, H, M, N), added to the logits.
        lengths: valid keys of each sample, the rest being padding on the right; None where all
            are valid. With `query_lengths`, the keys of each sequence.
        query_lengths: None, or the queries of each sequence: B is 1 then, and the sequences lie end
            to end, each looking at its own keys alone.
        scale: what the logits are multiplied by, None for K ** -0.5.
        return_map: whether the attention map is wanted too.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None = None
    bias: Tensor | None = None
    lengths: tuple[int, ...] | None = None
    scale: float | None = None
    return_map: bool = False
    query_lengths: tuple[int, ...] | None = None

    @classmethod
    def make(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        lengths: Sequence[int] | None = None,
        scale: float | None = None,
        return_map: bool = False,
        query_lengths: Sequence[int] | None = None,
    ) -> AttentionInputs:
        """Check the shapes and bring mask, bias and lengths into one form.

        Args:
            q: (B, M, H, K) queries.
            k: (B, N, Hk, K) keys.
            v: (B, N, Hk, Kv) values.
            mask: as the attribute, or (B, N), a mask over the keys of each sample.
            bias: as the attribute; fewer dimensions broadcast from the right.
            lengths: B numbers from 0 to N; with `query_lengths` as many as these, N in all.
            scale: as the attribute.
            return_map: as the attribute.
            query_lengths: as the attribute; M in all.

        Raises:
            ShapeError: shapes, dtypes or devices do not fit each other.
        """
        if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
            raise _misfit("q, k and v must have four dimensions (B, M|N, H, K)", q, k, v)
        B, M, H, K = q.shape
        N, Hk = k.shape[1:3]
        if k.shape != (B, N, Hk, K) or v.shape[:3] != (B, N, Hk):
            raise _misfit(
                "k must be (B, N, Hk, K) and v (B, N, Hk, Kv) for q (B, M, H, K)", q, k, v
            )
        if Hk != H and (not Hk or H % Hk):
            raise _misfit(
                f"the {H} heads of q must be a multiple of the {Hk} heads of k and v", q, k, v
            )
        if not (q.dtype == k.dtype == v.dtype and q.device == k.device == v.device):
            raise _misfit("q, k and v must share one dtype and one device", q, k, v)
        if not q.is_floating_point():
            raise _misfit("q, k and v must be floating-point numbers", q, k, v)
        if mask is not None:
            if mask.dtype != torch.bool:
                raise ShapeError(f"mask must be bool (True = may look), got {mask.dtype}.")
            if mask.ndim == 2:
                if mask.shape != (B, N):
                    raise ShapeError(
                        f"a mask of two dimensions is one over the keys, (B, N) = {(B, N)}; got "
                        f"{tuple(mask.shape)}. Give four dimensions for any other."
                    )
                mask = mask[:, None, None, :]
            mask = _four("mask", mask, (B, H, M, N))
        if bias is not None:
            if not bias.is_floating_point():
                raise ShapeError(f"bias must be floating-point, got {bias.dtype}.")
            bias = _four("bias", bias, (B, H, M, N))
        if query_lengths is not None:
            lengths, query_lengths = _sequences(q, k, lengths, query_lengths)
        elif lengths is not None:
            lengths = tuple(int(n) for n in lengths)
            if len(lengths) != B or any(not 0 <= n <= N for n in lengths):
                raise ShapeError(
                    f"lengths must be {B} numbers from 0 to {N}, the keys of each sample; got "
                    f"{list(lengths)}."
                )
            if min(lengths, default=N) == N:
                lengths = None
        return cls(q, k, v, mask, bias, lengths, scale, return_map, query_lengths)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B, H, M, N), the shape of the map."""
        B, M, H, _ = self.q.shape
        return (B, H, M, self.k.shape[1])

    @property
    def kv_heads(self) -> int:
        """Hk, the heads of keys and values."""
        return self.k.shape[2]

    @property
    def is_grouped(self) -> bool:
        """Whether several heads of the queries share one of the keys and values."""
        return self.q.shape[2] != self.k.shape[2]

    @property
    def is_packed(self) -> bool:
        """Whether sequences of any length lie end to end."""
        return self.query_lengths is not None

    @property
    def head_dim(self) -> int:
        """The wider of K and Kv."""
        return max(self.q.shape[-1], self.v.shape[-1])

    @property
    def softmax_scale(self) -> float:
        """What the logits are multiplied by."""
        return float(self.q.shape[-1] ** -0.5) if self.scale is None else self.scale

    @property
    def needs_grad(self) -> bool:
        """Whether a backward pass through q, k or v may follow."""
        return torch.is_grad_enabled() and (
            self.q.requires_grad or self.k.requires_grad or self.v.requires_grad
        )

    @property
    def bias_needs_grad(self) -> bool:
        """Whether a backward pass through the bias may follow."""
        return self.bias is not None and self.bias.requires_grad and torch.is_grad_enabled()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to look at, or nobody to look."""
        return 0 in self.shape

    def describe(self) -> str:
        """Return the shapes, dtype and device in a few words, for messages."""
        names = ("mask", "bias", "lengths", "query_lengths")
        extras = [name for name in names if getattr(self, name) is not None]
        extras += ["return_map"] if self.return_map else []
        with_ = f" with {', '.join(extras)}" if extras else ""
        return (
            f"q {tuple(self.q.shape)}, k {tuple(self.k.shape)}, v {tuple(self.v.shape)} "
            f"{_short(self.q.dtype)} on {self.q.device.type}{with_}"
        )

    def ungrouped(self) -> AttentionInputs:
        """Return the same call with keys and values repeated for each head of the queries.

        `k.repeat_interleave(H // Hk, dim=2)`, and so for v; a backward pass sums over the copies.
        """
        if not self.is_grouped:
            return self
        times = self.q.shape[2] // self.kv_heads
        k, v = (t.repeat_interleave(times, dim=2) for t in (self.k, self.v))
        return replace(self, k=k, v=v)

    def zeros(self) -> Tensor:
        """Return (B, M, H, Kv) of zeros, with a graph through which zeros flow back to q and v."""
        B, M, H, _ = self.q.shape
        nothing: Tensor = self.q.sum(-1, keepdim=True) * 0.0 + self.v.sum() * 0.0
        return nothing.expand(B, M, H, self.v.shape[-1])

    def allowed(self) -> Tensor | None:
        """Return mask and lengths as one bool tensor that broadcasts to (B, H, M, N), or None."""
        if self.lengths is None:
            return self.mask
        device = self.q.device
        if self.query_lengths is not None:
            mine, theirs = (send(_owners(n), device) for n in (self.query_lengths, self.lengths))
            inside = (mine[:, None] == theirs)[None, None]
        else:
            lengths = tensor_on(self.lengths, device)[:, None, None, None]
            inside = torch.arange(self.k.shape[1], device=device) < lengths
        return inside if self.mask is None else inside & self.mask

    def masking(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Return what to put on the logits so that no row is without a key, and who had none.

        A softmax over nothing is NaN, and so are its gradients. So a row that may look nowhere is
        let look anywhere, and the caller sets its result to zero.

        Args:
            dtype: of the bias returned.

        Returns:
            A bool mask (True = may look), or a float bias with −inf where a query may not look,
            or None; and (B|1, H|1, M|1, 1) bool, True for rows that may look somewhere, or None
            where all may. All broadcast to (B, H, M, N).
        """
        allowed = self.allowed()
        if self.bias is None:
            if allowed is None:
                return None, None
            alive = allowed.any(-1, keepdim=True)
            return allowed | ~alive, alive
        bias = self.bias.to(dtype)
        closed = bias == float("-inf")
        if allowed is not None:
            closed = closed | ~allowed
        dead = closed.all(-1, keepdim=True)
        return bias.masked_fill(closed, float("-inf")).masked_fill(dead, 0.0), ~dead


def _sequences(
    q: Tensor, k: Tensor, lengths: Sequence[int] | None, query_lengths: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Check the lengths of sequences that lie end to end."""
    if q.shape[0] != 1:
        raise ShapeError(
            f"query_lengths are for sequences that lie end to end in one row: q must be "
            f"(1, M, H, K), got {tuple(q.shape)}."
        )
    if lengths is None:
        raise ShapeError("query_lengths need lengths too, the keys of each sequence.")
    queries, keys = tuple(int(n) for n in query_lengths), tuple(int(n) for n in lengths)
    for what, given, total in (("query_lengths", queries, q), ("lengths", keys, k)):
        if len(queries) != len(keys) or min(given, default=0) < 0 or sum(given) != total.shape[1]:
            raise ShapeError(
                f"{what} must be {len(queries)} numbers from 0, {total.shape[1]} in all, one for "
                f"each sequence; got {list(given)}."
            )
    return keys, queries


def _owners(lengths: Sequence[int]) -> Tensor:
    """Return (sum,) the sequence that each position belongs to; on the CPU, so nothing waits."""
    return torch.repeat_interleave(torch.tensor(lengths, dtype=torch.long))


def _four(what: str, given: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    if what == "mask" and given.ndim != 4:
        raise ShapeError(
            f"mask must have two dimensions (B, N) or four, (B, H, M, N); got {tuple(given.shape)}."
        )
    fits = given.ndim <= 4 and all(
        have in (1, want)
        for have, want in zip(reversed(given.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ShapeError(
            f"{what} must broadcast to (B, H, M, N) = {shape}; got {tuple(given.shape)}."
        )
    return given if given.ndim == 4 else given[(None,) * (4 - given.ndim)]


def _misfit(rule: str, *tensors: Tensor) -> ShapeError:
    given: list[Any] = [
        f"{name} {tuple(t.shape)} {_short(t.dtype)} on {t.device}"
        for name, t in zip("qkv", tensors, strict=True)
    ]
    return ShapeError(f"{rule}; got {', '.join(given)}.")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
