"""The documentation site: its navigation has every page, every link and anchor leads somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import links as making  # the site's own reading of links, which needs no mkdocs
import pytest
import reference
import yaml

ROOT = Path(__file__).parents[1]

CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
PAGES = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))
OTHERS = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"]
OTHERS += sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("plugins/*/*.md"))
OTHERS += sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("backbones/*/*.md"))
MARKER = re.compile(r"^<!-- site: (\S+) -->$", re.MULTILINE)


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def navigated(entries: Any) -> list[str]:
    """The pages of the navigation, in its order."""
    if isinstance(entries, str):
        return [entries]
    inner = entries.values() if isinstance(entries, dict) else entries
    return [page for entry in inner for page in navigated(entry)]


def broken(text: str, document: str) -> list[str]:
    """What the links of a document do not lead to, each with its line."""
    found = []
    for link in making.links(text, document):
        if link.path is None:
            continue
        there = ROOT / link.path
        if link.path.startswith("..") or not there.exists():
            found.append(f"{document}:{link.line}: no file {link.target}")
        elif link.anchor and link.anchor not in making.anchors(there.read_text(encoding="utf-8")):
            found.append(f"{document}:{link.line}: no heading {link.target}")
    return found


def test_every_page_is_in_the_navigation_once() -> None:
    named = navigated(CONFIG["nav"])
    assert len(named) == len(set(named))
    ours = [page for page in named if not page.startswith("repo/")]
    assert sorted(f"docs/{page}" for page in ours) == PAGES
    for page in set(named) - set(ours):
        assert (ROOT / page.removeprefix("repo/")).is_file(), page


@pytest.mark.parametrize("document", [*PAGES, *OTHERS])
def test_every_link_and_anchor_leads_somewhere(document: str) -> None:
    assert broken(read(document), document) == []


def test_a_link_that_leads_nowhere_is_found_with_its_line() -> None:
    text = (
        "# Title\n\nA [page](train.md#nothing), a [folder](../benchmarks), `code` `[x](y.md)`,\n"
        "[no\nfile](../ipn_core/no.py), [here](#title), [there](#gone), [far](https://x.org/a.md).\n"
        "```text\n# no heading\n[none](z.md)\n```\n"
    )
    assert broken(text, "docs/page.md") == [
        "docs/page.md:3: no heading train.md#nothing",
        "docs/page.md:5: no file ../ipn_core/no.py",
        "docs/page.md:5: no file #title",
        "docs/page.md:5: no file #gone",
    ]
    assert making.anchors(text) == ["title"]


def test_anchors_are_those_of_code_hosts() -> None:
    assert making.slug("One answer as a page: `--trace`") == "one-answer-as-a-page---trace"
    assert making.slug("See [`hooks.py`](hooks.py), then R & D") == "see-hookspy-then-r--d"


@pytest.mark.parametrize("document", PAGES)
def test_no_two_headings_of_a_page_have_one_anchor(document: str) -> None:
    found = making.anchors(read(document))
    assert len(found) == len(set(found))


def test_what_the_pages_include_is_there() -> None:
    included = [name for page in PAGES for name in MARKER.findall(read(page))]
    assert sorted(included) == ["README.md#from-python", "api", "commands"]
    for name in included:
        path, _, anchor = name.partition("#")
        if anchor:
            assert making.section(read(path), anchor)
    with pytest.raises(LookupError, match="no heading 'nothing': there are "):
        making.section(read("README.md"), "nothing")


def test_the_reference_has_every_command_and_every_exported_name() -> None:
    import ipn_core
    from ipn_core.cli.app import app

    text = reference.commands(ROOT)
    for command in app.registered_commands:
        assert f"\n## `ipn {command.name}`\n" in text
    assert "\n### `ipn models pull`\n" in text
    shown = re.findall(r"^::: ipn_core\.[\w.]*?(\w+)$", reference.api(ROOT), re.MULTILINE)
    assert set(ipn_core.__all__) - {"__version__"} <= set(shown)


def test_the_tools_of_the_site_agree_with_the_tested_versions() -> None:
    def pins(document: str) -> dict[str, str]:
        return dict(re.findall(r"^([\w-]+)==(\S+)$", read(document), re.MULTILINE))

    site, tested = pins("docs/making/requirements.txt"), pins("requirements.txt")
    both = site.keys() & tested.keys()
    assert both == {"ruff", "typer"}
    assert {name: site[name] for name in both} == {name: tested[name] for name in both}


@pytest.mark.slow
def test_make_docs_builds_every_page_without_a_warning() -> None:
    def make(target: str) -> subprocess.CompletedProcess[str]:
        words = ["make", target, f"PYTHON={sys.executable}"]
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)

    if (tools := make(".venv-docs/.installed")).returncode:
        said = tools.stderr.strip().splitlines()[-1:]
        pytest.skip(f"the tools of the site are not here and cannot be installed: {said}")
    built = make("docs")
    said = built.stdout + built.stderr
    assert built.returncode == 0, said
    assert "WARNING" not in said
    site = ROOT / CONFIG["site_dir"]
    for page in navigated(CONFIG["nav"]):
        assert (site / page).with_suffix(".html").is_file(), page
    fetched = re.compile(r"<(?:script|img)[^>]* src=\"?https?:|<link rel=\"?stylesheet[^>]*https?:")
    for path in site.rglob("*.html"):
        assert not fetched.search(path.read_text(encoding="utf-8")), path
    made = {path.stem: path.read_text(encoding="utf-8") for path in site.glob("*.html")}
    assert 'id="ipn_core.model.IPN.from_pretrained"' in made["api"]
    assert 'id="ipn-doctor"' in made["cli"]
    assert "from_pretrained" in made["index"]
    assert 'href="repo/index.html#from-python"' in made["index"]
