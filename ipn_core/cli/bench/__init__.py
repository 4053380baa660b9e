"""`ipn bench`: timings on this machine, a file a subcommand."""

from ipn_core.cli.bench.group import app

__all__ = ["app"]
