"""`ipn plugins`: what is installed, what it brings, and what is wrong with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipn_core.cli.options import Debug, Json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ipn_core.cli.probe import Probe

__all__ = ["plugins"]


def plugins(json: Json = False, debug: Debug = False) -> None:
    """List the installed plugins with their components; each is tried in a process of its own."""
    from ipn_core.cli.health import requirement_faults
    from ipn_core.cli.probe import probe_plugins
    from ipn_core.cli.terminal import print_json

    found = probe_plugins()
    for probe in found:
        # What is missing only some of its components may need: `ipn doctor` tells of that.
        wrong = requirement_faults([probe.distribution], missing=False)
        probe.faults += [fault["reason"] for fault in wrong]
    if json:
        print_json({"plugins": [probe.to_json() for probe in found]})
    else:
        _print_plugins(found)


def _print_plugins(found: Sequence[Probe]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(markup=False, highlight=False, soft_wrap=True)
    for probe in found:
        console.print(Text(probe.label, style="bold") + Text(f"  (plugin '{probe.name}')"))
        for kind, names in sorted(probe.components.items()):
            console.print(f"    {kind + ':':<13}{', '.join(names)}")
        for fault in probe.faults:
            console.print(Text(f"    fault:       {' '.join(fault.split())}", style="red"))
    faulty = sum(bool(probe.faults) for probe in found)
    if faulty:
        console.print(
            f"{faulty} of {len(found)} plugins have faults; the others work without them."
        )
