"""`ipn eval`: how often a model is right on a task or a file of questions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ipn_core.cli.options import DEFAULT_MODEL, Debug, Interact, Json, Model, Untrained

if TYPE_CHECKING:
    from ipn_core.evaluation.evaluate import Report

__all__ = ["evaluate"]


def evaluate(
    task: Annotated[str, typer.Argument(metavar="TASK|FILE.jsonl", help="What to answer.")],
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
    seed: Annotated[int, typer.Option("--seed", help="Of the partners of --shuffled.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Questions at once.")] = 16,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Score a model; matching ignores case and surrounding punctuation."""
    from ipn_core.cli.loading import load_model
    from ipn_core.cli.terminal import Bar, print_json, quiet
    from ipn_core.tasks import open_task

    with quiet():
        source = open_task(task)
        chosen = split if split is not None else source.default_split
        source.check_split(chosen)
        pool = source.examples(chosen)
        loaded = load_model(model, interact, untrained)
        from ipn_core.evaluation.evaluate import evaluate as run

        with Bar(f"{task} ({chosen})") as bar:
            report = run(
                loaded,
                pool[:limit],
                task=task,
                split=chosen,
                batch_size=batch_size,
                seed=seed,
                shuffled=shuffled,
                pool=pool,
                progress=bar.steps,
            )
    if json:
        print_json(report.to_json())
    else:
        _print_table(report, loaded.name, loaded.strategy)


def _print_table(report: Report, model: str, interact: str) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"{report.task} ({report.split}), {model} with {interact}"
    if report.shuffled:
        title += ", requests shuffled"
    table = Table(title=title, title_justify="left")
    table.add_column("type")
    for column in ("n", "right", "95 % interval", *(["guessing"] if report.shuffled else [])):
        table.add_column(column, justify="right")
    for name, score in report.by_type.items():
        guessed = report.guess_by_type.get(name)
        table.add_row(*_row(name, score, guessed.accuracy if guessed else None))
    table.add_section()
    table.add_row(*_row("all", report, report.guess.accuracy if report.guess else None))
    console = Console(markup=False, highlight=False)
    console.print(table)
    rate = report.n / report.seconds if report.seconds else 0.0
    console.print(f"{report.seconds:.1f} s, {rate:.1f} questions a second")


def _row(name: str, score: Any, guessed: float | None) -> list[str]:
    low, high = score.ci95
    cells = [name, f"{score.n:,}", f"{score.accuracy:.1%}", f"{low:.1%} to {high:.1%}"]
    return cells if guessed is None else [*cells, f"{guessed:.1%}"]
