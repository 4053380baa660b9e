"""Results of benchmarks: rows with intervals, one file a device, and what two files differ in."""

from ipn_core.benchmarking.results import Results, Section, about, device_name, store
from ipn_core.benchmarking.rows import Row

__all__ = ["Results", "Row", "Section", "about", "device_name", "store"]
