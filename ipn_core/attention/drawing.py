"""Calls to time: those of the starter, and how one of a case is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ipn_core.attention.choice import Case
from ipn_core.attention.dispatch import listening
from ipn_core.attention.inputs import AttentionInputs

if TYPE_CHECKING:
    from ipn_core.model import IPN

__all__ = ["cases_of", "default_cases", "draw", "label", "ragged"]

TAUGHT = 32
"""Questions in a batch of training, where the model does not say."""


def default_cases(device: torch.device) -> list[Case]:
    """Return what the starter calls: its five tokens among themselves, and looking at 64 patches.

    Once for a question, and for a batch of 32 with a backward pass as in training.
    """
    dtypes = ("float32",) if device.type == "cpu" else ("bfloat16", "float32")
    return [
        Case(batch, 5, keys, 8, 8, 32, 32, dtype, masking, grad)
        for dtype in dtypes
        for batch, grad in ((1, False), (TAUGHT, True))
        for keys, masking in ((5, "none"), (64, "bias"))
    ]


def cases_of(model: IPN) -> list[Case]:
    """Return what a model leaves to "auto": asked a question, and taught 32 with their pictures.

    Calls that want a map are not among them: these go by the list (`choice`).
    """
    from PIL import Image

    from ipn_core.prompt import Prompt

    picture = Image.new("RGB", (256, 256))
    with listening() as asked:
        model.generate([Prompt.ask("What is it?", [picture])], max_new_tokens=2)
    with listening() as taught, torch.enable_grad():
        model([Prompt.ask("What is it?", [picture], answer="yes")])
    return list(dict.fromkeys([*asked, *(_times(case, TAUGHT) for case in taught)]))


def _times(case: Case, count: int) -> Case:
    """Return the call of a batch of so many; sequences end to end get longer with their number."""
    longer = count if "packed" in case.masking.split("+") else 1
    return case._replace(
        batch=case.batch * count, queries=case.queries * longer, keys=case.keys * longer
    )


def label(case: Case) -> str:
    """Return a short name; of sequences end to end it has the queries and keys of one."""
    times = case.batch if "packed" in case.masking else 1
    heads = str(case.heads) if case.heads == case.kv_heads else f"{case.heads}/{case.kv_heads}"
    passes = "forward+backward" if case.grad else "forward"
    return (
        f"q{case.queries // times} kv{case.keys // times} d{case.head_dim} h{heads} "
        f"b{case.batch} {case.dtype} {case.masking} {passes}"
    )


def draw(case: Case, device: torch.device, seed: int = 0) -> AttentionInputs:
    """Draw a call of a case, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    dtype: torch.dtype = getattr(torch, case.dtype)
    parts = case.masking.split("+")
    packed = "packed" in parts
    B = 1 if packed else case.batch
    M, N, H = case.queries, case.keys, case.heads

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    q = normal(B, M, H, case.head_dim)
    k = normal(B, N, case.kv_heads, case.head_dim)
    v = normal(B, N, case.kv_heads, case.value_dim)
    more: dict[str, Any] = {}
    if "mask" in parts:
        mask = torch.rand(B, N, generator=generator) > 0.25
        mask[:, 0] = True
        more["mask"] = mask.to(device)
    if "bias" in parts:
        more["bias"] = normal(B, H, 1, N)
    if "lengths" in parts:
        more["lengths"] = [max(N - 1 - i * N // (2 * B), 0) for i in range(B)]
    if packed:
        more["query_lengths"] = ragged(M, case.batch)
        more["lengths"] = ragged(N, case.batch)
    q, k, v = (t.requires_grad_(case.grad) for t in (q, k, v))
    return AttentionInputs.make(q, k, v, **more)


def ragged(total: int, parts: int) -> list[int]:
    """Share a total out, neighbours by as much more and less."""
    sizes = [total // parts + (i < total % parts) for i in range(parts)]
    shift = total // parts // 4
    for i in range(0, parts - 1, 2):
        sizes[i], sizes[i + 1] = sizes[i] + shift, sizes[i + 1] - shift
    return sizes
