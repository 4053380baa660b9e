"""The command line `ipn`: one file a command; whatever is heavy is imported when a command runs."""

from __future__ import annotations

from ipn_core.cli.app import main

__all__ = ["main"]
