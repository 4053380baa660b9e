"""The guide: maps and counts that the request alone asks for, before any block has looked.

Ours, not the paper's. A look is the product of what the request names (cosine similarity in a space
that text and patches share) and of where it says to look; a second look is the first one moved by a
step that the request gives ("left of"). A softmax over patches says where, and neither whether nor
how many: the evidence is how similar the most similar patches are, and a tally adds up, over all
patches, how much each is of a kind. What is there may be told as well, in the space that text and
patches share: a linear layer reads it long before the blocks have learned to, and from then on the
loss says which look was the right one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from ipn_core import Config, VisualFeatures
from ipn_core.features import ImageSpan
from ipn_core.positions import cosines
from ipn_core.transfer import send

__all__ = ["Guide", "GuideConfig", "Guided"]

_SHARPNESS = 16.0
"""What cosines are multiplied with before a softmax or sigmoid."""
_EVIDENCE = torch.arange(-2, 22, 2).float()
"""Where bumps stand on the line of evidence, log-sum-exp over patches of 16 cosines."""
_FLOOR = 1e-4
"""Added to maps before their logarithm."""


class GuideConfig(Config):
    """How the request guides.

    Attributes:
        width: of the space that text and patches share.
        frequencies: cosines a side in the code of places and steps.
        tallies: kinds that are added up, 0 for none.
        seen: whether the findings tell what the maps look at, in the shared space.
        near: how close to the first look the second begins: before training a step `s`, of 1 for
            the whole side, has the logit `near · cos(π s)` on each side; at 0 all steps are alike.
    """

    width: int = Field(default=128, ge=4, le=4096)
    frequencies: int = Field(default=8, ge=1, le=64)
    tallies: int = Field(default=8, ge=0, le=256)
    seen: bool = False
    near: float = Field(default=0.0, ge=0, le=16)

    @model_validator(mode="after")
    def _has_a_wave(self) -> Self:
        if self.near and self.frequencies < 2:
            raise ValueError("'near' needs 'frequencies' of at least 2: the first is constant")
        return self


@dataclass(frozen=True, eq=False)
class Guided:
    """What the guide says.

    Attributes:
        log_maps: (B, 2, P) logarithms of the first and the moved look.
        findings: (B, 1, W) a token that carries the evidence, the tallies and what is seen.
    """

    log_maps: Tensor
    findings: Tensor


class Guide(nn.Module):
    """Maps and tallies for a request.

    Attributes:
        maps: how many maps it gives.
    """

    maps = 2

    def __init__(self, config: GuideConfig, width: int, vision_width: int) -> None:
        super().__init__()
        self.config = config
        sides = 2 * config.frequencies
        self.patch_in = nn.Linear(vision_width, config.width)
        self.patch_out = nn.Linear(config.width, config.width)
        self.named = nn.Linear(width, config.width)
        self.how_named = nn.Linear(width, 1)
        self.where = nn.Linear(width, sides)
        self.step = nn.Linear(width, 2 * sides)
        self.evidence_in = nn.Linear(_EVIDENCE.numel(), width)
        if config.tallies:
            self.kinds = nn.Linear(width, config.tallies * config.width)
            self.kind_patch = nn.Sequential(
                nn.Linear(config.width, 2 * config.width),
                nn.GELU(),
                nn.Linear(2 * config.width, config.width),
            )
            self.threshold = nn.Parameter(torch.full((config.tallies,), -8.0))
            self.count_in = nn.Linear(config.tallies * _Counts.codes, width)
        if config.seen:
            self.seen_in = nn.Linear(self.maps * config.width, width)
        for layer in (self.where, self.step):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        if config.near:
            with torch.no_grad():
                self.step.bias.view(2, 2, -1)[0, :, 1] = config.near

    def forward(self, asked: Tensor, features: VisualFeatures) -> Guided:
        """Guide with (B, W) requests."""
        patches = self.patch_in(features.values)
        mask = features.mask
        positions = features.positions()
        gate = self.how_named(asked).sigmoid() * 2
        image = self.image(patches)
        shown = features.spread(image)
        similarity = self._similarity(asked, shown)
        logits = gate * similarity
        codes = cosines(positions, self.config.frequencies).to(asked.dtype)
        logits = logits + torch.einsum("bf,bpf->bp", self.where(asked), codes)
        first = logits.masked_fill(~mask, -1e4).softmax(-1)
        moved = self._moved(first, asked, features)
        maps = torch.stack([first, moved], dim=1)
        findings = self._evidence(similarity, mask) + self._tally(asked, image, features)
        findings = findings + self._seen(maps, shown)
        return Guided((maps + _FLOOR).log(), findings.unsqueeze(1))

    def text(self, asked: Tensor) -> Tensor:
        """Return what the request names, (B, w) unit vectors."""
        return F.normalize(self.named(asked), dim=-1)

    def image(self, patches: Tensor) -> Tensor:
        """Return what mapped patches show, (N, w) unit vectors."""
        return F.normalize(self.patch_out(patches), dim=-1)

    def _similarity(self, asked: Tensor, shown: Tensor) -> Tensor:
        return _SHARPNESS * torch.einsum("bw,bpw->bp", self.text(asked), shown)

    def _moved(self, first: Tensor, asked: Tensor, features: VisualFeatures) -> Tensor:
        """Move a map by the step that the request gives, within each picture.

        How likely a step is, `softmax_i(f(y_i − y_j) + g(x_i − x_j))`, is a product of two: the map
        (h, w) of a picture becomes `S_y · map · S_xᵀ`, and no P × P matrix is held.
        """
        places = features.packed_positions()[0]
        spans: list[list[ImageSpan]] = [[] for _ in range(features.batch)]
        for span in features.images:
            spans[span.sample].append(span)
        if features.alike:
            return self._moved_alike(first, asked, spans[0], places)
        rows = [
            self._moved_alike(first[row : row + 1], asked[row : row + 1], mine, places)
            for row, mine in enumerate(spans)
        ]
        return torch.cat(rows)

    def _moved_alike(
        self, first: Tensor, asked: Tensor, spans: Sequence[ImageSpan], places: Tensor
    ) -> Tensor:
        """Move maps (n, P) of samples whose pictures have the grids of `spans`, one after another.

        Args:
            first: the maps; zero where padded.
            asked: (n, W).
            spans: of one of the samples.
            places: (N, 2) of the packed patches.
        """
        waves = [part.unflatten(-1, (2, -1)) for part in self.step(asked).chunk(2, dim=-1)]
        parts, start = [], 0
        for span in spans:
            h, w = span.grid
            centres = places[span.offset : span.offset + span.length].unflatten(0, (h, w))
            down = self._steps(centres[:, 0, 0], [part[:, 0] for part in waves])
            right = self._steps(centres[0, :, 1], [part[:, 1] for part in waves])
            shown = first[:, start : start + span.length].unflatten(1, (h, w))
            parts.append((down @ shown @ right.transpose(1, 2)).flatten(1))
            start += span.length
        return torch.cat([*parts, first[:, start:]], dim=1)

    def _steps(self, at: Tensor, waves: Sequence[Tensor]) -> Tensor:
        """Return how likely each step along a side is: (n, to, from), each `from` adding up to 1.

        Args:
            at: (h,) where the patches stand on it.
            waves: two of (n, frequencies), of cosines and of sines on −1…1.
        """
        steps = (at.unsqueeze(1) - at) / 2
        frequencies = torch.arange(self.config.frequencies, device=at.device) * torch.pi * 2
        angles = steps.unsqueeze(-1) * frequencies
        cosines, sines = waves
        kernel = torch.einsum("bf,ijf->bij", cosines, angles.cos().to(cosines.dtype))
        kernel = kernel + torch.einsum("bf,ijf->bij", sines, angles.sin().to(sines.dtype))
        return kernel.softmax(1)

    def _evidence(self, similarity: Tensor, mask: Tensor) -> Tensor:
        """Say (B, W) whether the pictures show what is named: bumps along the best similarity."""
        best = similarity.masked_fill(~mask, -1e4).logsumexp(-1)
        line = send(_EVIDENCE, best.device, best.dtype)
        bumps = (-(((best.unsqueeze(-1) - line) / 2) ** 2)).exp()
        told: Tensor = self.evidence_in(bumps)
        return told

    def _seen(self, maps: Tensor, shown: Tensor) -> Tensor | float:
        """Say (B, W) what maps (B, 2, P) look at, of what patches (B, P, w) show."""
        if not self.config.seen:
            return 0.0
        seen = torch.einsum("bmp,bpw->bmw", maps, shown) * self.config.width**0.5
        told: Tensor = self.seen_in(seen.flatten(1))
        return told

    def _tally(self, asked: Tensor, image: Tensor, features: VisualFeatures) -> Tensor | float:
        count = self.config.tallies
        if not count:
            return 0.0
        kinds = F.normalize(self.kinds(asked).unflatten(-1, (count, -1)), dim=-1)
        # What patches show, in the space in which they were aligned with what requests name.
        shown = image * self.config.width**0.5
        kind = features.spread(F.normalize(self.kind_patch(shown), dim=-1))
        scores = 2 * _SHARPNESS * torch.einsum("bkw,bpw->bkp", kinds, kind)
        are = (scores + self.threshold[:, None]).sigmoid()
        totals = are.masked_fill(~features.mask.unsqueeze(1), 0).sum(-1)
        told: Tensor = self.count_in(_Counts.code(totals))
        return told


class _Counts:
    """Totals as numbers that a linear layer can read."""

    centres = 26
    codes = centres + 2

    @classmethod
    def code(cls, totals: Tensor) -> Tensor:
        """Code (B, n) totals of patches as (B, n × codes): bumps along the line, log, and size."""
        line = torch.arange(cls.centres, device=totals.device) * 2.0
        bumps = (-(((totals.unsqueeze(-1) - line) / 2) ** 2)).exp()
        size = torch.stack([totals.clamp(min=0).log1p(), totals / 16], dim=-1)
        return torch.cat([bumps, size], dim=-1).flatten(1).to(totals.dtype)
