"""The components of ipn-names keep the contracts of their kinds."""

from __future__ import annotations

from ipn_core.stages import Dims
from ipn_core.testing.contracts import (
    ConnectorContract,
    EncoderContract,
    InjectorContract,
    InteractionContract,
    TaskContract,
)


class TestImageNetNames(EncoderContract):
    name = "imagenet-names"
    options = {"whole": 64, "parts": 64}  # noqa: RUF012 the contract declares it


class TestConnector(ConnectorContract):
    name = "names"
    options = {"names": 2, "parts": 2, "slots": 5}  # noqa: RUF012


class TestNames(InteractionContract):
    name = "names"
    options = {"width": 16, "hidden": 16, "lead": 1}  # noqa: RUF012
    K = 6


class TestVerbatim(InjectorContract):
    name = "verbatim"

    def dims(self) -> Dims:
        """A message of words is as wide as the LLM's embeddings."""
        from dataclasses import replace

        return replace(super().dims(), Dm=28)


class TestPhotoWords(TaskContract):
    name = "photo-words"
