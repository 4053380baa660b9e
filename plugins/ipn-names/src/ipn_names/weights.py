"""The weights of the model `photo`: a packaged checkpoint, on the starter's language model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ipn_starter.weights import Packaged

__all__ = ["PHOTO"]


class _Photo(Packaged):
    def pictures(self) -> Sequence[tuple[Path, str]]:
        """Return the one photograph that is always there: matplotlib brings it along.

        It is the United States Navy's of Grace Hopper, and in the public domain.
        """
        import matplotlib

        path = Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")
        # Some systems package matplotlib without its samples.
        return [(path, "What is this?")] if path.is_file() else []


PHOTO = _Photo(
    "photo",
    "photographs by name: what a classifier of 1,000 things sees (packaged)",
    Path(__file__).parent / "checkpoints" / "names",
    "photo-stamps",
    "photographs",
)
