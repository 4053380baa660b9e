"""What mkdocs calls while it builds the site: pages of linked files, links, included sections.

- A link out of `docs/` leads, in the site, to a page made of that file: documents as they are, code
  with its colours, a folder as its README or a list. No address of a code host is needed.
- `<!-- site: README.md#from-python -->` stands for a section of another document, and
  `<!-- site: commands -->` and `<!-- site: api -->` for the reference; code hosts show
  nothing there.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

import links
import reference
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
OUTSIDE = "repo"
"""Where in the site the files lie that are not in `docs/`."""
NAMED_FENCE = re.compile(r"^(```\w+) ([\w./-]+)$", re.MULTILINE)
MARKER = re.compile(r"^<!-- site: (\S+) -->$", re.MULTILINE)
PICTURES = (".png", ".svg", ".jpg")
MADE = {"commands": reference.commands, "api": reference.api}


def place(path: str) -> str:
    """Return where a file of the repository is in the site, as mkdocs names sources."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    there = ROOT / path
    if there.is_dir():
        return f"{OUTSIDE}/{path}/README.md"
    kept = path.endswith((".md", *PICTURES))
    return f"{OUTSIDE}/{path}" if kept else f"{OUTSIDE}/{path}.md"


def content(path: str) -> str:
    """Return the page of a file or folder of the repository."""
    there = ROOT / path
    hidden = "---\nsearch:\n  exclude: true\n---\n\n"
    if there.is_dir():
        readme = there / "README.md"
        if readme.is_file():
            return readme.read_text(encoding="utf-8")
        names = sorted(p.name + "/" * p.is_dir() for p in there.iterdir() if p.name[0] not in "._")
        return f"{hidden}# `{path}/`\n\n" + "\n".join(f"- `{name}`" for name in names)
    text = there.read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    kind = there.suffix.removeprefix(".") or "text"
    return f"{hidden}# `{path}`\n\n``````{kind}\n{text}\n``````\n"


def expand(text: str, document: str) -> str:
    """Put in what the markers stand for, with its links as they must be in this document."""

    def fill(found: re.Match[str]) -> str:
        name = found[1]
        if name in MADE:
            return MADE[name](ROOT)
        path, _, anchor = name.partition("#")
        try:
            there = links.section((ROOT / path).read_text(encoding="utf-8"), anchor)
        except (LookupError, OSError) as error:
            raise PluginError(f"{document}: <!-- site: {name} -->: {error}") from error
        return links.relink(there, path, lambda link: _written(link, document))

    return MARKER.sub(fill, text)


def _written(link: links.Link, document: str) -> str:
    if link.path is None:
        return link.target
    path = posixpath.relpath(link.path, posixpath.dirname(document) or ".")
    return f"{path}#{link.anchor}" if link.anchor else path


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make anchors as code hosts do."""
    config.mdx_configs.setdefault("toc", {})["slugify"] = links.slug
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside of `docs/` that the site's pages lead to, and what these lead to."""
    pages = {f"docs/{f.src_uri}": f.content_string for f in files.documentation_pages()}
    waiting = [(path, expand(text, path)) for path, text in pages.items()]
    waiting += [(path, content(path)) for path in _navigated(config.nav)]
    seen = set(pages)
    while waiting:
        document, text = waiting.pop()
        if document not in seen:
            seen.add(document)
            files.append(_generated(document, text, config))
        for link in links.links(text, _home(document)):
            if link.path is None or link.path.startswith("docs/") or link.path in seen:
                continue
            there = ROOT / link.path
            if not there.exists():
                continue  # mkdocs says so, with the page
            if link.path.endswith(PICTURES):
                seen.add(link.path)
                files.append(File.generated(config, place(link.path), abs_src_path=str(there)))
            else:
                waiting.append((link.path, content(link.path)))
    return files


def _navigated(entries: object) -> list[str]:
    """Return the paths of the navigation that lie outside of `docs/`."""
    if isinstance(entries, str):
        start = f"{OUTSIDE}/"
        return [entries.removeprefix(start)] if entries.startswith(start) else []
    if isinstance(entries, dict):
        entries = list(entries.values())
    return [path for entry in entries or [] for path in _navigated(entry)]


def _generated(path: str, text: str, config: MkDocsConfig) -> File:
    file = File.generated(config, place(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV)
    file.document = _home(path)
    return file


def _home(path: str) -> str:
    """Return the document that a page shows: of a folder, its README."""
    return f"{path}/README.md" if (ROOT / path).is_dir() else path


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let the links lead where the site has what they name, and show the names of files."""
    document = getattr(page.file, "document", f"docs/{page.file.src_uri}")
    here = posixpath.dirname(page.file.src_uri) or "."

    def lead(link: links.Link) -> str:
        if link.path is None or link.target.startswith("#"):
            return link.target
        path = posixpath.relpath(place(link.path), here)
        return f"{path}#{link.anchor}" if link.anchor else path

    shown = NAMED_FENCE.sub(r'\1 title="\2"', expand(markdown, document))
    return links.relink(shown, document, lead)
