"""The interaction `film`: its contract, and its two equations."""

from __future__ import annotations

import torch

from ipn_core.testing.contracts import InteractionContract


class TestFiLM(InteractionContract):
    name = "film"
    options = {"width": 16, "frequencies": 3}  # noqa: RUF012 the contract declares it

    def test_the_two_equations(self) -> None:
        film, asked, seen = self.build(frequencies=0), self.request(), self.features()
        patches, mask = seen.padded()
        expected = torch.zeros(len(mask), self.K, film.width)
        for sample in range(len(mask)):
            x = film.norm(film.patch_in(patches[sample][mask[sample]]))
            numbers = film.modulate(asked.values[sample].flatten()).view(self.K, 2, -1)
            for token, (gamma, beta) in enumerate(numbers):
                modulated = (1 + gamma) * x + beta
                expected[sample, token] = film.out(modulated.relu().mean(0))
        torch.testing.assert_close(film(asked, seen).values, expected)
