"""Zoom: `rvii`, whose own guide picks the regions that it sees again at full resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from ipn_rvii.guide import GuideConfig, Guided
from ipn_rvii.rvii import RVII, RVIIConfig
from pydantic import Field
from torch import Tensor

from ipn_core import Dims, Request, VisualFeatures, VisualMessage
from ipn_core.errors import ShapeError
from ipn_core.features import Box, ImageSpan
from ipn_core.transfer import send, tensor_on
from ipn_zoom.boxes import boxes, inside, inside_boxes

__all__ = ["Zoom", "ZoomConfig"]

_TIE = 1e-5
"""What each later box loses: of boxes that cover the same patches, rounding must not choose."""


class ZoomConfig(RVIIConfig):
    """How much is seen again; everything else is `rvii`'s.

    Attributes:
        regions: boxes k that are seen again, of all the pictures of a prompt together.
        boxes: a side of the grid of boxes that is laid over a picture.
        overlapping: whether neighbouring boxes overlap by half.
        explore: how much chance decides while training: 1 draws boxes by their shares, 0 takes
            the largest, as it is outside of training.
        guide: of `rvii`; here there is always one.
    """

    regions: int = Field(default=2, ge=1, le=256)
    boxes: int = Field(default=4, ge=1, le=32)
    overlapping: bool = False
    explore: float = Field(default=1.0, ge=0, le=10)
    guide: GuideConfig = Field(default_factory=GuideConfig)


class _Shown(NamedTuple):
    """A picture of a sample: its index in the features, its span, its first patch of the sample."""

    image: int
    span: ImageSpan
    start: int


class Zoom(RVII):
    """RVII over the picture's patches and those of the k boxes that its guide looks at most.

    The guide's maps m_g over the picture's patches say how much of each look falls into a box b,

        share_g(b) = Σ over patches p of m_g(p) · (the part of p's area that lies in b)

    and the k boxes with the largest Σ_g share_g are cropped from the original picture and encoded.
    A head that follows map g then attends with

        softmax(q·key / √d + log m_g(p)) over the picture's own patches, and
        softmax(q·key / √d + log share_g(b)) over the patches of a crop b,

    both in one softmax: through the logarithm the loss tells the guide which box was worth it.
    While training the boxes are drawn with Gumbel noise on the logarithm (Kool et al. 2019, arXiv
    1903.06059, section 2), so that a box that is seldom chosen is tried as well. A crop's patches
    carry the codes of their places in the whole picture. Zooming itself has no weights: it begins
    where a trained `rvii` with a guide ends.
    """

    Config: ClassVar[type[RVIIConfig]] = ZoomConfig

    def __init__(self, config: ZoomConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        self.boxes = boxes(config.boxes, config.overlapping)

    @classmethod
    def not_supported_reasons(cls, config: ZoomConfig, dims: Dims) -> list[str]:
        """It needs features that can look again."""
        reasons = super().not_supported_reasons(config, dims)
        if not dims.looks:
            reasons.append(
                "it looks again at parts of the picture, and these features are not of places in "
                "the whole of it (a perceiver resamples them, or the encoder crops pictures, as "
                "vision may without image_size): change perceive or encoder, or use rvii"
            )
        return reasons

    def forward(self, request: Request, features: VisualFeatures) -> VisualMessage:
        """Look, choose boxes, and look at both; see `Interaction.forward`.

        Raises:
            ShapeError: the features cannot look again.
        """
        if features.looker is None and features.images:
            raise ShapeError(
                "the interaction 'zoom' looks at pictures again, and these features cannot: they "
                "came without their pictures. Give the pictures, or use '--interact rvii'."
            )
        asked = self.asked(request)
        assert self.guide is not None
        guided = self.guide(asked[:, 0], features)
        rows = _rows(features)
        shares = self.shares(guided.log_maps, rows)
        chosen = self.choose(shares, rows)
        closer, patches = self._closer(features, rows, chosen)
        maps = torch.cat([guided.log_maps, shares.log().to(guided.log_maps)], dim=2)
        index = send(patches, maps.device).unsqueeze(1).expand(-1, maps.shape[1], -1)
        guided = Guided(maps.gather(2, index), guided.findings)
        message = self.read(asked, closer, guided, request.return_map)
        if message.attention is None:
            return message
        return VisualMessage(message.values, _folded(message.attention, features, closer, rows))

    def shares(self, log_maps: Tensor, rows: Sequence[Sequence[_Shown]]) -> Tensor:
        """Return (B, G, C): how much of each map falls into each box, 1 where there is no box.

        Args:
            log_maps: (B, G, P) logarithms of the guide's maps.
            rows: the pictures of each sample; C is as many boxes as the most pictures have.
        """
        each = len(self.boxes)
        alike: dict[tuple[tuple[int, int], int, int], list[int]] = {}
        for row, shown in enumerate(rows):
            for place, one in enumerate(shown):
                alike.setdefault((one.span.grid, one.start, place), []).append(row)
        maps = log_maps.float().exp()
        count = each * max(map(len, rows), default=0)
        shares = maps.new_ones(*maps.shape[:2], count)
        for (grid, start, place), mine in alike.items():
            area = inside_boxes(grid, self.config.boxes, self.config.overlapping)
            area, some = send(area, maps.device), tensor_on(mine, maps.device)
            looked = maps[some, :, start : start + len(area)] @ area
            shares[some, :, place * each : (place + 1) * each] = looked
        return shares

    def choose(self, shares: Tensor, rows: Sequence[Sequence[_Shown]]) -> list[list[int]]:
        """Return which boxes of each sample are seen again, k or as many as it has."""
        order = torch.arange(shares.shape[2], device=shares.device)
        scores = shares.detach().sum(1).log() - _TIE * order
        if self.training and self.config.explore:
            noise = torch.empty_like(scores).exponential_().log()
            scores = scores - self.config.explore * noise
        counts = [len(shown) * len(self.boxes) for shown in rows]
        real = order < tensor_on(counts, order.device).unsqueeze(1)
        scores = scores.masked_fill(~real, float("-inf"))
        count = min(self.config.regions, scores.shape[1])
        best: list[list[int]] = scores.topk(count).indices.tolist()
        return [row[:count] for row, count in zip(best, counts, strict=True)]

    def _closer(
        self,
        features: VisualFeatures,
        rows: Sequence[Sequence[_Shown]],
        chosen: Sequence[Sequence[int]],
    ) -> tuple[VisualFeatures, Tensor]:
        """Look at the chosen boxes, each once, however many samples chose it.

        Returns:
            The features with the crops behind each sample's own pictures, and (B, P') what belongs
            to each of their patches: a patch of the sample, or P and a box of it.
        """
        each, own = len(self.boxes), max(features.lengths, default=0)
        wanted: dict[tuple[int, int], Box] = {}
        picks = []
        for row, numbers in enumerate(chosen):
            for number in numbers:
                (image, whole, _), box = rows[row][number // each], number % each
                wanted.setdefault((whole.offset, box), (image, *self.boxes[box]))
                picks.append((row, whole, number))
        belongs = [list(range(length)) for length in features.lengths]
        if not wanted:
            return features, _padded(belongs)
        seen = features.look(list(wanted.values()))
        crops = dict(zip(wanted, seen.images, strict=True))
        spans = []
        for row, whole, number in picks:
            box = number % each
            crop = crops[whole.offset, box]
            offset = len(features.values) + crop.offset
            spans.append(ImageSpan(row, crop.grid, offset, whole.place, self.boxes[box]))
            belongs[row] += [own + number] * crop.length
        values = torch.cat([features.values, seen.values.to(features.values)])
        closer = VisualFeatures(values, (*features.images, *spans), features.batch)
        return closer, _padded(belongs)


def _rows(features: VisualFeatures) -> list[list[_Shown]]:
    """Return the pictures of each sample in the order of its patches."""
    rows: list[list[_Shown]] = [[] for _ in range(features.batch)]
    starts = [0] * features.batch
    for image, span in enumerate(features.images):
        rows[span.sample].append(_Shown(image, span, starts[span.sample]))
        starts[span.sample] += span.length
    return rows


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    width = max(map(len, rows), default=0)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]).long()


def _folded(
    attention: Tensor,
    features: VisualFeatures,
    closer: VisualFeatures,
    rows: Sequence[Sequence[_Shown]],
) -> Tensor:
    """Lay a map over patches and crops, (B, K, P'), on the patches alone, (B, K, P)."""
    folded = attention.new_zeros(*attention.shape[:2], max(features.lengths, default=0))
    at = list(features.lengths)
    for row, length in enumerate(at):
        folded[row, :, :length] = attention[row, :, :length]
    for crop in closer.images[len(features.images) :]:
        row, start = crop.sample, at[crop.sample]
        whole = next(one for one in rows[row] if one.span.place == crop.place)
        covers = inside(crop.grid, crop.box, whole.span.grid)
        covers = send(covers, attention.device, attention.dtype)
        on = slice(whole.start, whole.start + whole.span.length)
        folded[row, :, on] += attention[row, :, start : start + crop.length] @ covers
        at[row] += crop.length
    return folded
