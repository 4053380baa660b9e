"""The interaction `film`: its contract, and its two equations."""

from __future__ import annotations

from typing import Any

import torch

from ipn_core.testing.contracts import InteractionContract
from ipn_core.testing.oracles import assert_same, record_oracle


class TestFiLM(InteractionContract):
    name = "film"
    options = {"width": 16, "frequencies": 3}  # noqa: RUF012 the contract declares it

    def test_the_two_equations(self, record_property: Any) -> None:
        film, asked, seen = self.build(frequencies=0), self.request(), self.features()
        patches, mask = seen.padded()
        expected = torch.zeros(len(mask), self.K, film.width)
        for sample in range(len(mask)):
            x = film.norm(film.patch_in(patches[sample][mask[sample]]))
            numbers = film.modulate(asked.values[sample].flatten()).view(self.K, 2, -1)
            for token, (gamma, beta) in enumerate(numbers):
                modulated = (1 + gamma) * x + beta
                expected[sample, token] = film.out(modulated.relu().mean(0))
        with torch.no_grad():
            worst = assert_same(film(asked, seen).values, expected)
        record_oracle(record_property, "film", "its two equations", worst)
