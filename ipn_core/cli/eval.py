"""`ipn eval`: how often a model is right on a task or a file of questions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ipn_core.cli.completing import installed
from ipn_core.cli.options import (
    DEFAULT_MODEL,
    Debug,
    Device,
    Dtype,
    Interact,
    Json,
    Model,
    Untrained,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ipn_core.evaluation.against import Against, Pairs
    from ipn_core.evaluation.evaluate import Report
    from ipn_core.model import IPN
    from ipn_core.tasks import Example

__all__ = ["evaluate"]

INTERVAL = "95 % interval"
SMALLEST_P = 1e-4
"""Smaller ones are shown as below it."""


def evaluate(
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK|FILE.jsonl", help="What to answer.", autocompletion=installed("task")
        ),
    ],
    model: Model = DEFAULT_MODEL,
    interact: Interact = None,
    untrained: Untrained = False,
    split: Annotated[
        str | None, typer.Option("--split", help="A split of the task; its test split otherwise.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, metavar="N", help="Only the first N questions.")
    ] = None,
    shuffled: Annotated[
        bool,
        typer.Option("--shuffled", help="The control: every question asks what another one would."),
    ] = False,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="NAME|PATH",
            help="Another model that answers the same questions, for a paired test.",
            autocompletion=installed("weights"),
        ),
    ] = None,
    against_interact: Annotated[
        str | None,
        typer.Option(
            "--against-interact",
            metavar="NAME",
            help="The interaction of that model; without --against, another one of this model.",
            autocompletion=installed("strategy"),
        ),
    ] = None,
    predictions: Annotated[
        str | None,
        typer.Option("--predictions", metavar="FILE.jsonl", help="Write every answer to a file."),
    ] = None,
    seed: Annotated[
        int,
        typer.Option("--seed", min=0, help="Of the partners of --shuffled, and of resampling."),
    ] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Questions at once.")] = 16,
    device: Device = None,
    dtype: Dtype = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Score a model; matching ignores case and surrounding punctuation."""
    from ipn_core.cli.loading import check_file, load_model
    from ipn_core.cli.terminal import note, print_json, quiet
    from ipn_core.errors import UserError
    from ipn_core.memory import keep_freed_memory
    from ipn_core.tasks import check_pictures, open_task

    if against is not None and not against.strip():
        raise UserError(f"--against '{against}' names no model. See 'ipn models list'.")
    paired = against is not None or against_interact is not None
    if paired and shuffled:
        raise UserError(
            "--shuffled goes with no --against: a control is scored by itself. Leave one of them "
            "out."
        )
    with quiet():
        source = open_task(task)
        chosen = split if split is not None else source.default_split
        source.check_split(chosen)
        if predictions is not None:
            check_file("--predictions", predictions, "a JSONL file", task, "the file of questions")
        pool = source.examples(chosen)
        asked = pool[:limit]
        check_pictures(asked)
        keep_freed_memory()
        load = partial(load_model, untrained=untrained, device=device, dtype=dtype)
        loaded = load(model, interact)
        # Before the first question: that the other one cannot be loaded should not come out late.
        other = load(against or model, against_interact) if paired else None
        options = {"task": task, "split": chosen, "batch_size": batch_size, "seed": seed}
        report = _answer(loaded, asked, shuffled=shuffled, pool=pool, **options)
        theirs = _answer(other, asked, **options) if other else None
        compared = _compare(report, theirs, other, seed) if theirs and other else None
        if predictions is not None:
            from ipn_core.evaluation.predictions import verdicts_of, write_verdicts

            lines = verdicts_of(report.predictions, theirs.predictions if theirs else None)
            write_verdicts(predictions, lines)
    if json:
        print_json({**report.to_json(), **({"against": compared.to_json()} if compared else {})})
    else:
        _print_report(report, f"{loaded.name} with {loaded.strategy}", compared)
    if predictions is not None:
        note(f"every answer: {predictions}")


def _answer(model: IPN, asked: Sequence[Example], **options: Any) -> Report:
    from ipn_core.cli.terminal import Bar
    from ipn_core.evaluation.evaluate import evaluate as run

    with Bar(f"{options['task']} ({options['split']}), {model.strategy}") as bar:
        return run(model, asked, progress=bar.steps, **options)


def _compare(ours: Report, theirs: Report, other: IPN, seed: int) -> Against:
    from ipn_core.evaluation.against import compare_reports

    return compare_reports(ours, theirs, model=other.name, interact=other.strategy, seed=seed)


def _print_report(report: Report, model: str, against: Against | None) -> None:
    from rich.console import Console

    console = Console(markup=False, highlight=False)
    title, columns = f"{report.task} ({report.split}), {model}", ["n", "right", INTERVAL]
    scores: list[Any] = [*report.by_type.values(), report]
    rows = [[f"{score.n:,}", *_share(score)] for score in scores]
    if report.shuffled and report.guess:
        title, columns = f"{title}, requests shuffled", [*columns, "guessing"]
        for row, guess in zip(rows, [*report.guess_by_type.values(), report.guess], strict=True):
            row.append(f"{guess.accuracy:.1%}")
    if against:
        title = f"{title}, against {against.model} with {against.interact}"
        columns = [*columns, "other", INTERVAL]
        for row, pairs in zip(rows, [*against.by_type.values(), against.whole], strict=True):
            row += _share(pairs.theirs)
    console.print(_table(title, columns, list(report.by_type), rows))
    if against:
        _print_difference(console, against)
    seconds = report.seconds + (against.seconds if against else 0.0)
    rate = report.n * (2 if against else 1) / seconds if seconds else 0.0
    console.print(f"{seconds:.1f} s, {rate:.1f} questions a second")


def _print_difference(console: Console, against: Against) -> None:
    from ipn_core.evaluation.statistics import FEW_CLUSTERS

    columns = ["difference", INTERVAL, "only first", "only other", "p"]
    rows = [_difference(pairs) for pairs in (*against.by_type.values(), against.whole)]
    console.print(_table("first minus other, in points", columns, list(against.by_type), rows))
    count = against.whole.clusters
    what = f"{count:,} pictures" if count > 1 else "the questions about one picture"
    doubt = ", too few to trust it" if count < FEW_CLUSTERS else ""
    console.print(f"interval: from resampling {what}{doubt}")
    console.print("p: McNemar's exact test, which takes questions as independent")


def _table(
    title: str, columns: Sequence[str], types: Sequence[str], rows: Sequence[Sequence[str]]
) -> Table:
    """Return a table with a row for each type of question, and one for all, which comes last."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("type")
    for column in columns:
        table.add_column(column, justify="right")
    for name, cells in zip(types, rows, strict=False):
        table.add_row(name, *cells)
    table.add_section()
    table.add_row("all", *rows[-1])
    return table


def _share(score: Any) -> list[str]:
    low, high = score.ci95
    return [f"{score.accuracy:.1%}", f"{low:.1%} to {high:.1%}"]


def _difference(pairs: Pairs) -> list[str]:
    found = pairs.difference
    mean, low, high = (f"{100 * x:+.1f}" for x in (found.mean, found.low, found.high))
    p = f"{pairs.p:.4f}" if pairs.p >= SMALLEST_P else f"< {SMALLEST_P:.4f}"
    return [mean, f"{low} to {high}", f"{pairs.only_ours:,}", f"{pairs.only_theirs:,}", p]
