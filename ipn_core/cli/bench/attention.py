"""`ipn bench attention`: the attention backends timed, and the fastest kept for "auto"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ipn_core.cli.completing import installed
from ipn_core.cli.options import Debug, Json

if TYPE_CHECKING:
    import torch

    from ipn_core.attention.choice import Case
    from ipn_core.attention.timing import Timing
    from ipn_core.benchmarking import Row

__all__ = ["attention"]

DTYPES = ("float32", "bfloat16", "float16")
MASKINGS = ("none", "mask", "bias", "lengths", "packed")


def attention(
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="Q,KV,HEADS,DIM,BATCH",
            help="Queries, keys, heads (9/3: nine that share three of the keys), their width, "
            "batch. Several times for several; by default what the starter computes.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|PATH",
            help="Time what this model computes when it is asked and taught, instead.",
            autocompletion=installed("weights"),
        ),
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"Of --shape: {', '.join(DTYPES)}.")
    ] = None,
    masking: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help=f"Of --shape: {', '.join(MASKINGS)}.")
    ] = None,
    backward: Annotated[
        bool, typer.Option("--backward", help="Time --shape with a backward pass too.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="cpu or cuda; by default cuda if there is.")
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(
            metavar="S",
            min=0,
            help="About how long each row is timed; with --tune, those that are near the fastest "
            "again, until it is known which wins.",
        ),
    ] = 0.2,
    tune: Annotated[
        bool, typer.Option("--tune", help="Let 'auto' take the fastest from now on.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time every attention backend, checked against double precision first."""
    from ipn_core.cli.terminal import Bar, note, print_json, quiet
    from ipn_core.errors import UserError

    parsed = [_parse(words) for words in shape or []]
    for what, given, known in (("dtype", dtype, DTYPES), ("masking", masking, MASKINGS)):
        _check(what, given or [], known, bool(shape))
    if model is not None and parsed:
        raise UserError("'--model' and '--shape' both say what to time. Give one of them.")
    with quiet():
        from ipn_core.attention.choice import machine, write_table
        from ipn_core.attention.deciding import tuned
        from ipn_core.attention.drawing import default_cases
        from ipn_core.attention.timing import measure
        from ipn_core.memory import keep_freed_memory
        from ipn_core.placing import device_of
        from ipn_core.processors import limit_threads

        # As the commands do that the table is for.
        limit_threads()
        keep_freed_memory()
        where = device_of(device)
        if model is not None:
            cases = _used_by(model, where)
        elif parsed:
            cases = _cases(parsed, dtype or [_usual(where)], masking or ["none"], backward)
        else:
            cases = default_cases(where)
        with Bar("timing attention") as bar:
            if tune:
                timings, winners = tuned(cases, where, seconds=seconds, report=bar.steps)
                table = write_table(where, winners)
            else:
                timings, table = measure(cases, where, seconds=seconds, report=bar.steps), None
        auto = _auto(cases, where)
    if json:
        print_json(
            {
                "machine": machine(where),
                "rows": [t.to_row().model_dump(mode="json") for t in timings],
                "auto": [{**case._asdict(), "backend": name} for case, name in auto.items()],
                "table": None if table is None else str(table),
            }
        )
        return
    _print(timings, auto)
    if table is not None:
        note(f"the fastest are kept in {table}")


def _parse(words: str) -> tuple[int, ...]:
    """Return queries, keys, heads, heads of the keys, width and batch."""
    from ipn_core.errors import UserError

    found = re.fullmatch(r"(\d+),(\d+),(\d+)(?:/(\d+))?,(\d+),(\d+)", words.replace(" ", ""))
    given: tuple[str, ...] = found.groups() if found is not None else ("0",)
    numbers = tuple(int(n or given[2]) for n in given)
    if min(numbers) < 1 or numbers[2] % numbers[3]:
        raise UserError(
            f"'--shape' must be Q,KV,HEADS,DIM,BATCH, five numbers from 1 such as 5,64,8,32,1 or, "
            f"with grouped heads, 5,64,9/3,32,1; got '{words}'."
        )
    return numbers


def _check(what: str, given: Sequence[str], known: Sequence[str], shaped: bool) -> None:
    from ipn_core.errors import UserError, near

    for name in given:
        if name not in known:
            raise UserError(
                f"unknown {what} '{name}': known are {', '.join(known)}{near(name, known)}."
            )
    if given and not shaped:
        raise UserError(f"'--{what}' says what to give a '--shape', and there is none. Add one.")


def _used_by(model: str, device: torch.device) -> list[Case]:
    from ipn_core.attention.drawing import cases_of
    from ipn_core.cli.loading import load_model
    from ipn_core.errors import UserError

    cases = cases_of(load_model(model, None, untrained=False, device=str(device)))
    if not cases:
        raise UserError(
            f"'{model}' leaves no attention to the backend 'auto': there is nothing to time. Name "
            "shapes with '--shape'."
        )
    return cases


def _usual(device: torch.device) -> str:
    return "float32" if device.type == "cpu" else "bfloat16"


def _cases(
    shapes: Sequence[tuple[int, ...]],
    dtypes: Sequence[str],
    maskings: Sequence[str],
    backward: bool,
) -> list[Case]:
    from ipn_core.attention.choice import Case

    cases = []
    for queries, keys, heads, kv_heads, width, batch in shapes:
        for dtype in dtypes:
            for masking in maskings:
                times = batch if masking == "packed" else 1
                cases += [
                    Case(
                        batch,
                        queries * times,
                        keys * times,
                        heads,
                        kv_heads,
                        width,
                        width,
                        dtype,
                        masking,
                        grad,
                    )
                    for grad in ((False, True) if backward else (False,))
                ]
    return cases


def _auto(cases: Sequence[Case], device: torch.device) -> dict[Case, str]:
    """Return what `auto` takes for each case from now on."""
    from ipn_core.attention.dispatch import choose
    from ipn_core.attention.drawing import draw

    return {case: choose(draw(case, device)).name for case in cases}


def _print(timings: Sequence[Timing], auto: dict[Case, str]) -> None:
    for case, taken in auto.items():
        print(_title(case))
        mine = [(t.backend, t.to_row()) for t in timings if t.case == case]
        for backend, row in sorted(mine, key=lambda one: (one[1].median is None, one[1].median)):
            mark = "  <- auto" if backend == taken else ""
            print(f"    {backend:<20}{_result(row)}{mark}")


def _title(case: Case) -> str:
    heads = str(case.heads) if case.heads == case.kv_heads else f"{case.heads}/{case.kv_heads}"
    passes = "forward and backward" if case.grad else "forward"
    return (
        f"{case.queries} queries, {case.keys} keys, {heads} heads of {case.head_dim}, batch "
        f"{case.batch}, {case.dtype}, masking {case.masking}, {passes}"
    )


def _result(row: Row) -> str:
    if row.median is None or row.p20 is None or row.p80 is None:
        return f"no: {'; '.join(row.reasons)}"
    median, low, high = (1000 * s for s in (row.median, row.p20, row.p80))
    return f"{median:9.4f} ms  ({low:.4f} to {high:.4f})  error {row.error:.1e}"
