"""`attend`: find a backend for some inputs, or say why there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ipn_core.attention.backend import AttentionBackend
from ipn_core.attention.choice import Case, answers, measured
from ipn_core.attention.inputs import AttentionInputs
from ipn_core.errors import AttentionUnavailableError, IPNError, PluginError, StageError
from ipn_core.plugins import Component, get_registry

__all__ = [
    "AUTO",
    "attend",
    "available_backends",
    "backend_reasons",
    "backends_for",
    "choose",
    "get_backend",
    "listening",
]

AUTO = ("xformers", "sdpa", "eager")
"""What `backend="auto"` tries, in this order, where nothing was measured (`choice`); any other
backend is used only by name."""

REMEMBERED = 4096
"""Kinds of calls for which it is kept what "auto" took."""

_made: dict[str, tuple[Component, AttentionBackend]] = {}
_listeners: list[Callable[[AttentionInputs], object]] = []


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    lengths: Sequence[int] | None = ...,
    query_lengths: Sequence[int] | None = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_map: Literal[False] = ...,
) -> Tensor: ...


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    lengths: Sequence[int] | None = ...,
    query_lengths: Sequence[int] | None = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_map: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    lengths: Sequence[int] | None = ...,
    query_lengths: Sequence[int] | None = ...,
    scale: float | None = ...,
    backend: str = ...,
    return_map: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    lengths: Sequence[int] | None = None,
    query_lengths: Sequence[int] | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_map: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend: `softmax(scale · q·kᵀ + bias) · v` over the keys that each query may look at.

    A query that may look at none gets zeros, in the map too, and gradients stay finite. One that
    overflowed in float16 gets NaN. Under autocast q, k and v are cast to its dtype first, whatever
    the backend.

    Args:
        q: (B, M, H, K) queries.
        k: (B, N, Hk, K) keys; H is a multiple of Hk, and H / Hk neighbouring heads of the queries
            share one of the keys.
        v: (B, N, Hk, Kv) values; keys that are masked out must hold finite numbers too.
        mask: bool, True where a query may look: (B, N) over the keys, or four dimensions that
            broadcast to (B, H, M, N).
        bias: float, added to the logits, broadcasting to (B, H, M, N); −inf masks.
        lengths: the number of valid keys of each sample, padded on the right.
        query_lengths: the number of queries of each sequence, where sequences of any length lie end
            to end, q (1, M, H, K) and k (1, N, Hk, K), each looking at its own keys alone;
            `lengths` are the keys of each then.
        scale: what the logits are multiplied by, by default K ** -0.5.
        backend: a name that `ipn doctor` lists, or "auto".
        return_map: return the map too.

    Returns:
        (B, M, H, Kv); with `return_map` a pair of it and the map (B, H, M, N), rows summing to 1.

    Raises:
        UnknownNameError: there is no backend of that name.
        AttentionUnavailableError: the named backend, or with "auto" every one that it tries,
            refuses these inputs; the text lists the reasons of each backend there is.
        ShapeError: shapes, dtypes or devices do not fit each other.
        StageError: the backend failed; the text names its plugin.
    """
    device = q.device.type
    autocast = torch.is_autocast_enabled(device)
    if autocast:
        dtype = torch.get_autocast_dtype(device)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    inputs = AttentionInputs.make(q, k, v, mask, bias, lengths, scale, return_map, query_lengths)
    chosen = choose(inputs) if backend == "auto" else _named(backend, inputs)
    if inputs.is_empty:
        return _nothing(inputs)
    if autocast:
        with torch.autocast(device, enabled=False):
            return _run(chosen, inputs)
    return _run(chosen, inputs)


def get_backend(name: str) -> AttentionBackend:
    """Return the backend of a name; it is made on the first call.

    Raises:
        UnknownNameError: no plugin registered it.
        PluginError: it cannot be imported or made, or is no `AttentionBackend`.
    """
    entries = get_registry().entries("attention")
    made = _made.get(name)
    if made is not None and made[0] is entries.get(name):
        return made[1]
    component = get_registry().get("attention", name)
    target: Any = component.load()
    with component.building():
        backend = target()
    if not isinstance(backend, AttentionBackend):
        raise PluginError(
            f"attention '{name}' of {component.plugin.label} must be a subclass of "
            f"ipn_core.attention.AttentionBackend, got {target!r}."
        )
    _made[name] = (component, backend)
    return backend


def backend_reasons(
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    grad: bool = False,
    head_dim: int = 64,
) -> dict[str, list[str]]:
    """Return each registered backend with its reasons against plain inputs; empty means it works.

    Args:
        device: where q, k and v would lie.
        dtype: theirs.
        grad: whether a backward pass would follow.
        head_dim: K and Kv.
    """
    q = torch.zeros(1, 8, 1, head_dim, device=device, dtype=dtype, requires_grad=grad)
    inputs = AttentionInputs.make(q, q, q)
    return backends_for(inputs)


def backends_for(inputs: AttentionInputs) -> dict[str, list[str]]:
    """Return each registered backend with its reasons against some inputs; empty means it works."""
    return {name: _reasons(name, inputs) for name in sorted(get_registry().entries("attention"))}


def available_backends(
    device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> list[str]:
    """Return the names of the backends that work for plain inputs on a device."""
    return [name for name, reasons in backend_reasons(device, dtype).items() if not reasons]


def _reasons(name: str, inputs: AttentionInputs) -> list[str]:
    try:
        return get_backend(name).not_supported_reasons(inputs)
    except PluginError as error:
        return [str(error)]


def choose(inputs: AttentionInputs) -> AttentionBackend:
    """Return what "auto" takes: the fastest as measured, else the first of `AUTO` that can.

    Nothing is looked up for maps and inside of `torch.compile`. What was taken is kept for calls of
    the same kind, because looking it up would take a share of a small call's time.

    Raises:
        AttentionUnavailableError: none can; the text lists the reasons of every backend.
    """
    if inputs.return_map or torch.compiler.is_compiling():
        return _first(AUTO, inputs)[0]
    for listener in _listeners:
        listener(inputs)
    kind = _kind(inputs)
    known: tuple[Component, AttentionBackend] | None = answers.get(kind)
    if known is not None:
        component, backend = known
        if get_registry().entries("attention").get(backend.name) is component and (
            _goes_by_constants(backend) or not backend.not_supported_reasons(inputs)
        ):
            return backend
    fastest = measured(inputs)
    backend, at_once = _first(AUTO if fastest is None else (fastest, *AUTO), inputs)
    if at_once:
        if len(answers) >= REMEMBERED:
            answers.clear()
        answers[kind] = _made[backend.name]
    return backend


@contextmanager
def listening() -> Iterator[list[Case]]:
    """Yield a list that fills with each distinct call that is left to a measured "auto"."""
    heard: list[Case] = []

    def listen(inputs: AttentionInputs) -> None:
        case = Case.of(inputs)
        if case not in heard and not inputs.is_empty:
            heard.append(case)

    _listeners.append(listen)
    try:
        yield heard
    finally:
        _listeners.remove(listen)


def _kind(inputs: AttentionInputs) -> Any:
    """Return all that `Case` and the constants of a backend go by, as cheaply as can be."""
    q, k, v = inputs.q, inputs.k, inputs.v
    return (
        q.shape,
        k.shape,
        v.shape,
        q.dtype,
        q.device,
        inputs.mask is None,
        inputs.bias is None,
        inputs.lengths is None,
        None if inputs.query_lengths is None else len(inputs.query_lengths),
        inputs.needs_grad,
        inputs.bias_needs_grad,
        torch.get_num_threads(),
    )


def _goes_by_constants(backend: AttentionBackend) -> bool:
    cls = type(backend)
    return (
        cls.more_reasons is AttentionBackend.more_reasons
        and cls.not_supported_reasons is AttentionBackend.not_supported_reasons
    )


def _first(names: Sequence[str], inputs: AttentionInputs) -> tuple[AttentionBackend, bool]:
    """Return the first backend that takes these inputs, and whether it is so for all of their kind.

    It is, if those before it are not there or for another device: their own reasons may depend on
    more than the kind.
    """
    at_once = True
    for name in names:
        backend = _present(name)
        # The device first: on a CPU this is called often, and texts are slow to write.
        if backend is None or not _on_device(backend, inputs):
            continue
        if not backend.not_supported_reasons(inputs):
            return backend, at_once
        at_once = False
    raise AttentionUnavailableError(
        f"no attention backend that 'auto' tries ({', '.join(AUTO)}) takes {inputs.describe()}. "
        f"{_all_reasons(inputs)}. See 'ipn doctor'."
    )


def _present(name: str) -> AttentionBackend | None:
    """Return the backend of a name if it is there and can be made."""
    if name not in get_registry().entries("attention"):
        return None
    try:
        return get_backend(name)
    except PluginError:
        return None


def _on_device(backend: AttentionBackend, inputs: AttentionInputs) -> bool:
    return backend.devices is None or inputs.q.device.type in backend.devices


def _all_reasons(inputs: AttentionInputs, but: str | None = None) -> str:
    """Say what every backend has against some inputs, those that agree together."""
    saying: dict[str, list[str]] = {}
    for name, reasons in backends_for(inputs).items():
        if name != but:
            saying.setdefault(", ".join(reasons) or "nothing, take it", []).append(name)
    return "; ".join(f"{', '.join(names)}: {said}" for said, names in saying.items())


def _named(name: str, inputs: AttentionInputs) -> AttentionBackend:
    backend = get_backend(name)
    reasons = backend.not_supported_reasons(inputs)
    if reasons:
        raise AttentionUnavailableError(
            f"attention backend '{name}' does not take {inputs.describe()}: "
            f"{', '.join(reasons)}. Choose another one or 'auto'; see 'ipn doctor'. "
            f"The others have against it: {_all_reasons(inputs, but=name)}."
        )
    return backend


def _run(backend: AttentionBackend, inputs: AttentionInputs) -> Tensor | tuple[Tensor, Tensor]:
    try:
        found = backend.forward(inputs)
        return _overflowing(found, inputs.q) if inputs.q.dtype == torch.float16 else found
    except IPNError:
        raise
    except Exception as error:
        # Whoever attends, such as an interaction, is not to be blamed for it.
        who = get_registry().get("attention", backend.name).label
        raise StageError(f"{who} failed: {type(error).__name__}: {error}") from error


def _overflowing(
    found: Tensor | tuple[Tensor, Tensor], q: Tensor
) -> Tensor | tuple[Tensor, Tensor]:
    """Give NaN to each query (B, M, H, K) that holds an infinite number, so that it is noticed.

    Its logits may all be -inf, which a backend takes for a query that may look at no key.
    """
    spoiled = (q * 0).sum(-1, keepdim=True)  # 0, or NaN
    if isinstance(found, Tensor):
        return found + spoiled
    return found[0] + spoiled, found[1]


def _nothing(inputs: AttentionInputs) -> Tensor | tuple[Tensor, Tensor]:
    """Return zeros where there is no key or no query."""
    out = inputs.zeros()
    if not inputs.return_map:
        return out
    return out, inputs.q.new_zeros(inputs.shape, dtype=torch.float32)
