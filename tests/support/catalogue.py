"""The distributions of this workspace, and which of them brings each published bridge."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
MEMBERS = {
    path.parent.name: path.parent
    for path in sorted(ROOT.glob("*/ipn-*/pyproject.toml"))
    if "[project.entry-points.ipn]" in path.read_text(encoding="utf-8")
}
"""Those that are plugins of ours; `ipn-lmms-eval` is one of another program."""
CATALOGUE = {
    "c-abstractor": "ipn-c-abstractor",
    "film": "ipn-film",
    "gated-xattn": "ipn-gated-xattn",
    "lmeye": "ipn-lmeye",
    "qformer": "ipn-qformer",
    "resampler": "ipn-resampler",
    "rvii": "ipn-rvii",
    "static": "ipn-static",
    "zoom": "ipn-zoom",
}
