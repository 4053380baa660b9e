"""The weights of the model `photo`: a packaged checkpoint, on the starter's language model."""

from __future__ import annotations

from pathlib import Path

from ipn_starter.weights import SMOLLM2

from ipn_core.weights import Report, Weights

__all__ = ["PHOTO"]


class Photo(Weights):
    """The trained stages in this package, and the language model that they were trained on."""

    name = "photo"
    description = "photographs by name: what a classifier of 1,000 things sees (packaged)"
    license = "Apache-2.0"

    def folder(self) -> Path:
        """Return the packaged checkpoint."""
        return Path(__file__).parent / "checkpoints" / "names"

    @property
    def size_bytes(self) -> int:  # type: ignore[override]
        """The packaged checkpoint and the language model together."""
        return sum(f.stat().st_size for f in self.folder().iterdir()) + SMOLLM2.size_bytes

    def present(self) -> bool:
        return SMOLLM2.present()

    def fetch(self, report: Report) -> None:
        SMOLLM2.pull(report)


PHOTO = Photo()
