"""The README's Python runs as it stands there, and its commands exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [text for found, text in fenced if found == language]


@pytest.mark.weights
def test_the_three_lines_of_python_print_an_answer(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line.strip()]) == 3

    exec(compile(code, "README.md", "exec"), {})

    assert capsys.readouterr().out.strip() == "yes"


def test_the_make_targets_it_shows_exist():
    shown = set(re.findall(r"^\$ make ([\w-]+)$", README, re.MULTILINE))
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))

    assert shown == {"demo", "test"}
    assert shown <= targets


def test_every_ipn_command_it_lists_exists():
    from ipn_core.cli.app import app

    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    lines = [line for line in blocks("")[0].splitlines() if line.startswith("ipn ")]
    listed = {line.split()[1] for line in lines}

    assert listed == names | {group.name for group in app.registered_groups}


def test_every_file_it_links_exists():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_test_file_it_names_exists():
    for target in re.findall(r"(?:tests|benchmarks|plugins)/[\w./-]+", README):
        assert (ROOT / target.rstrip(".")).exists(), target


def strategies():
    """The cells of each row of its table of strategies."""
    begin, end = "<!-- strategies: begin -->", "<!-- strategies: end -->"
    table = README.partition(begin)[2].partition(end)[0]
    rows = [row for row in table.strip().splitlines() if row.startswith("| `")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_its_table_of_strategies_lists_all_that_this_workspace_brings():
    from ipn_core.plugins import discover

    shown = [(cells[0].strip("`"), cells[1]) for cells in strategies()]
    ours = {folder.name for folder in (ROOT / "plugins").iterdir()}
    installed = [
        (name, component.plugin.distribution)
        for name, component in sorted(discover().entries("strategy").items())
        if component.plugin.distribution in ours
    ]

    assert shown == installed
    assert len({distribution for _, distribution in shown}) == len(shown)  # each its own


def test_each_strategy_of_its_table_is_held_against_something_and_near_it():
    for name, *_, originals, differences in strategies():
        assert originals not in ("", "—"), name
        found = [float(difference) for difference in differences.split("<br>")]
        assert len(found) == len(originals.split("<br>"))
        assert max(found) <= 1e-4, name


@pytest.mark.slow
def test_its_table_of_strategies_counts_what_there_is_today(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.strategies import row

    counted = [row(cells[0].strip("`"), [])[:6] for cells in strategies()]

    assert counted == [cells[:6] for cells in strategies()]
