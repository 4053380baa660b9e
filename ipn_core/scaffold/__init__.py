"""Scaffold: a plugin package of one's own to start from, as `ipn new` writes it."""

from ipn_core.scaffold.kinds import KINDS, Kind
from ipn_core.scaffold.package import Package, write_package

__all__ = ["KINDS", "Kind", "Package", "write_package"]
