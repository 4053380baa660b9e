"""The interaction `names`: the request says what to look for and where, classes what is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ipn_core import Config, Dims, Interaction, Request, VisualFeatures, VisualMessage
from ipn_core.transfer import tensor_on
from ipn_core.vocabulary import Vocabulary
from ipn_core.whitening import Whitening
from ipn_names.evidence import Evidence
from ipn_names.sayings import Sayings
from ipn_names.windows import centres, inside
from ipn_names.wordings import CELLS

__all__ = ["KINDS", "WHOLE", "Names", "NamesConfig", "Understood"]

KINDS = ("name", "exist", "where")
"""What a request can want: the name of what is there, whether something is, and where it is."""
WHOLE = len(CELLS)
"""The place after the nine cells: all of the picture."""
_SHARPNESS = 20.0
"""What cosines are multiplied with before a softmax."""
_CUT = 12.0
"""How sharp thresholds are while something trains."""
_AXIS = (0.3, 0.5, 0.7)
"""Where low, middle and high are on a side; the borders are half way, 0.4 and 0.6."""


def _shows() -> Tensor:
    """Which windows show a place, (10, 1 + W); all of the picture, the first one alone."""
    cells = F.pad(inside(), (1, 0))
    whole = torch.zeros_like(cells[:1])
    whole[0, 0] = True
    return torch.cat([cells, whole])


_SHOWN = [row.nonzero().flatten().tolist() for row in _shows()]


class NamesConfig(Config):
    """How a request is read, and how sure the classifier must be.

    Attributes:
        width: of the request, once whitened.
        hidden: of the MLP beside it.
        noise: standard deviation of the noise on whitened requests while training.
        lead: empty slots before the words, for what is learned to be read there.
        sure: below this probability of the first choice a name is said as a guess.
        seen: from this probability in some window on, a thing of one class is there.
        chance: what every further class of its word adds to that, since the probabilities of many
            classes come to something on any picture; 0 asks as much of every word.
    """

    width: int = Field(default=384, ge=8, le=4096)
    hidden: int = Field(default=384, ge=8, le=8192)
    noise: float = Field(default=0.25, ge=0, le=10)
    lead: int = Field(default=0, ge=0, le=64)
    sure: float = Field(default=0.4, ge=0, le=1)
    seen: float = Field(default=0.042, ge=0, le=1)
    chance: float = Field(default=0.002, ge=0, le=1)


@dataclass(frozen=True, eq=False)
class Understood:
    """What requests ask, as logits.

    Attributes:
        kinds: (B, 3) of `KINDS`.
        places: (B, 10) the nine cells, and all of the picture.
        words: (B, E) the words that a thing can be called by.
    """

    kinds: Tensor
    places: Tensor
    words: Tensor


class Names(Interaction):
    """Look for what the request names, or name what is where it looks, in words of the LLM.

    The features are logits of labels. The mean over a window's patches is what the classifier says
    of the window. A request is read by three linear layers: what it wants, where, and a direction
    that is compared with those of all the labels' words (the mean input embeddings of their
    tokens); a word stands for every label that it may be called by. Then

        name    the likeliest label in the windows of the place, or of the whole picture
        exist   whether the word's n labels together have seen + chance·(n − 1) in some window
        where   the mean of the windows' centres, by how likely they are in each

    and the message is what is to be said, word for word. While something trains the gradient is
    that of the mixture of all sayings. Its map is where the windows are that decided, by how likely
    what was found is in each patch of them; every token has the same.
    """

    Config = NamesConfig
    called: Tensor
    directions: Tensor
    shows: Tensor
    centres: Tensor

    def __init__(self, config: NamesConfig, dims: Dims) -> None:
        super().__init__(config, dims)
        labels = dims.labels
        self.request_scale = Whitening(dims.R * dims.D_request, config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, config.hidden),
            nn.GELU(),
            nn.Linear(config.hidden, config.width),
        )
        self.kind = nn.Linear(config.width, len(KINDS))
        self.place = nn.Linear(config.width, len(CELLS) + 1)
        self.thing = nn.Linear(config.width, dims.D_in)
        self.words = tuple(dict.fromkeys(w for one in labels for w in (one.name, *one.also)))
        known = {word: i for i, word in enumerate(self.words)}
        called = torch.zeros(len(self.words), len(labels))
        for index, label in enumerate(labels):
            called[[known[word] for word in (label.name, *label.also)], index] = 1
        self.register_buffer("called", called, persistent=False)
        directions = torch.zeros(len(self.words), dims.D_in)
        self.register_buffer("directions", directions, persistent=False)
        self.register_buffer("shows", _shows(), persistent=False)
        self.register_buffer("centres", centres(), persistent=False)
        self.sayings = Sayings(labels, config.lead, dims.K, dims.D_in)

    @classmethod
    def not_supported_reasons(cls, config: NamesConfig, dims: Dims) -> list[str]:
        """It needs labels, and room for words."""
        reasons = []
        if not dims.labels:
            reasons.append(
                "its features are no evidence of labels: use an encoder whose features are, such "
                "as imagenet-names, and no perceive that changes them"
            )
        if config.lead >= dims.K:
            reasons.append(
                f"{dims.K} slots have no room for words after {config.lead} empty ones: raise "
                "layout.dynamic or lower interact.lead"
            )
        return reasons

    @property
    def width(self) -> int:
        """Width of the LLM's input embeddings."""
        return self.dims.D_in

    @property
    def has_map(self) -> bool:
        """Where the deciding windows are."""
        return True

    @property
    def objectives(self) -> frozenset[str]:
        """Its message stands for an answer, word for word."""
        return frozenset({"verbalise"})

    def meet(self, vocabulary: Vocabulary) -> None:
        """Take the words' tokens and directions."""
        self.sayings.meet(vocabulary)
        self.directions = vocabulary.directions(self.words)

    def saying(self, texts: Sequence[str]) -> Tensor:
        """Return the messages (B, K, D_in) that say texts."""
        return self.sayings.said(self.sayings.find(texts))

    @torch.no_grad()
    def fit(self, requests: Tensor, patches: Tensor) -> None:
        """Whiten requests (n, R, D_request) as a sample of them needs it."""
        self.request_scale.fit(requests.flatten(1))

    def understand(self, request: Request) -> Understood:
        """Read requests (B, R, D_request)."""
        asked: Tensor = self.request_scale(request.values.flatten(1))
        if self.training and self.config.noise:
            asked = asked + self.config.noise * torch.randn_like(asked)
        asked = asked + self.mlp(asked)
        named = F.normalize(self.thing(asked), dim=-1)
        words = _SHARPNESS * named @ self.directions.to(named.dtype).T
        return Understood(self.kind(asked), self.place(asked), words)

    def forward(self, request: Request, features: VisualFeatures) -> VisualMessage:
        """Look; see `Interaction.forward`."""
        understood = self.understand(request)
        look = _Look(self, understood, Evidence(features))
        values = self.sayings.said(look.chosen)
        if torch.is_grad_enabled():
            mixed = self.sayings.mixed(look.shares.to(values.dtype))
            values = values + mixed - mixed.detach()
        attention = None
        if request.return_map:
            seen = look.map().to(values.dtype)
            attention = seen.unsqueeze(1).expand(-1, self.length, -1)
        return VisualMessage(values, attention)


class _Look:
    """One look of a batch.

    Attributes:
        chosen: (B,) what is said.
        shares: (B, n) how likely each saying would be, with a gradient.
    """

    def __init__(self, names: Names, understood: Understood, evidence: Evidence) -> None:
        self._evidence = evidence
        self._config = names.config
        self._kind = understood.kinds.argmax(-1)
        self._place = understood.places.argmax(-1)
        self._shows = names.shows
        words = understood.words.float().softmax(-1)
        # The likeliest word alone, or what is half understood would need the whole evidence.
        likeliest = F.one_hot(words.argmax(-1), words.shape[-1]).to(words)
        self._wanted = (likeliest + words - words.detach()) @ names.called.float()
        kinds = understood.kinds.float().softmax(-1)
        named, what = self._name(understood.places.float().softmax(-1))
        there, whether = self._exist()
        placed, where = self._where(names.centres, there)
        self.shares = torch.cat([named, there, placed], dim=1)
        sizes = [part.shape[1] for part in (named, there, placed)]
        share = torch.repeat_interleave(
            kinds, tensor_on(sizes, kinds.device), dim=1, output_size=sum(sizes)
        )
        self.shares = self.shares * share
        choices = torch.stack([what, whether + sizes[0], where + sizes[0] + sizes[1]], dim=1)
        self.chosen = choices.gather(1, self._kind.unsqueeze(1)).squeeze(1)

    def _name(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shares (B, 2 C) of names and guesses, and the choice among them."""
        windows = self._evidence.windows
        by_place = torch.stack(
            [windows[:, :, tensor_on(shown, windows.device)].amax((1, 2)) for shown in _SHOWN],
            dim=1,
        )  # (B, 10, C)
        mixed = torch.einsum("bp,bpc->bc", places, by_place)
        likely = by_place[torch.arange(len(places), device=places.device), self._place]
        best, self._label = likely.max(-1)
        unsure = best < self._config.sure
        doubt = (_CUT * (self._config.sure - mixed.amax(-1, keepdim=True))).sigmoid()
        mixed = mixed / mixed.sum(-1, keepdim=True)
        shares = torch.cat([mixed * (1 - doubt), mixed * doubt], dim=1)
        return shares, self._label + unsure.long() * mixed.shape[1]

    def _exist(self) -> tuple[Tensor, Tensor]:
        """Return the shares (B, 2) of yes and no, and the choice."""
        self._likely = torch.einsum("bnwc,bc->bnw", self._evidence.windows, self._wanted)
        best = self._likely.flatten(1).amax(-1)
        further = (self._wanted.sum(-1) - 1).clamp(min=0)
        least = self._config.seen + self._config.chance * further
        yes = (best.clamp(min=1e-9) / least.clamp(min=1e-9)).log().sigmoid()
        return torch.stack([yes, 1 - yes], dim=1), (best < least).long()

    def _where(self, centres: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Return the shares (B, 10) of the nine cells and of nowhere, and the choice."""
        weight = self._likely[:, :, 1:].square().sum(1)
        weight = weight / weight.sum(-1, keepdim=True).clamp(min=1e-18)
        axis = tensor_on(_AXIS, weight.device, weight.dtype)
        centre = weight @ centres.to(weight)  # (B, 2)
        near = (-((centre.unsqueeze(-1) - axis) ** 2) * _CUT**2).softmax(-1)  # (B, 2, 3)
        cells = (near[:, 0, :, None] * near[:, 1, None, :]).flatten(1)
        nowhere = there[:, :1] < 0.5
        choice = torch.where(nowhere.squeeze(1), cells.shape[1], cells.argmax(-1))
        return torch.cat([cells * there[:, :1], there[:, 1:]], dim=1), choice

    def map(self) -> Tensor:
        """Return where it was looked, (B, P)."""
        windows = self._evidence.windows
        named = self._kind == KINDS.index("name")
        label = F.one_hot(self._label, windows.shape[-1]).to(windows)
        shown = torch.einsum("bnwc,bc->bnw", windows, label) * self._shows[self._place, None]
        looked = torch.where(named[:, None, None], shown, self._likely.square())
        wanted = torch.where(named[:, None], label, self._wanted)
        return self._evidence.map(looked, wanted)
