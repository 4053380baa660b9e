"""What every `Backbone` must do, as tests that a plugin gets by writing `build`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch

from ipn_core.backbone import Backbone
from ipn_core.config import Layout
from ipn_core.plan import Planner, Tokens
from ipn_core.prompt import Prompt
from ipn_core.testing.contracts.clause import clause, same
from ipn_core.testing.contracts.component import ComponentContract
from ipn_core.testing.contracts.module import TIGHT

__all__ = ["BackboneContract"]

LENGTH, CUT = 7, 4


class BackboneContract(ComponentContract):
    """Subclass it, name the adapter and return a small random one from `build`."""

    kind = "backbone"

    @abstractmethod
    def build(self) -> Backbone:
        """A backbone over a small language model with random weights, and a tokenizer."""

    def config_class(self) -> Any:
        """The config of all backbones is the core's."""
        return None

    def ids(self, backbone: Backbone) -> torch.Tensor:
        """Ids (2, LENGTH) of no special meaning."""
        most = int(backbone.lm.get_input_embeddings().weight.shape[0])
        generator = torch.Generator().manual_seed(3)
        return torch.randint(most // 2, most, (2, LENGTH), generator=generator)

    # -- clauses ---------------------------------------------------------------------------------

    def test_its_sizes(self) -> None:
        """Widths and layers are those of the weights."""
        with (
            clause(
                "its sizes",
                "override D_in, D_out, D_hidden or `layers` where the family keeps them elsewhere.",
            ),
            torch.no_grad(),
        ):
            backbone = self.build()
            count = len(backbone.layers)
            assert len(backbone.D_hidden) == count + 1, (
                f"{len(backbone.D_hidden)} widths for {count} layers and the final norm"
            )
            embeds = backbone.embed(self.ids(backbone))
            assert embeds.shape[-1] == backbone.D_in, f"embeddings are {embeds.shape[-1]} wide"
            positions = torch.arange(LENGTH).expand(2, -1)
            found = backbone.extend(
                embeds, backbone.new_cache(), positions, None, list(range(count))
            )
            for layer in range(count):
                width = found.hidden[layer].shape[-1]
                wanted = backbone.D_hidden[layer]
                assert width == wanted, f"layer {layer} is {width} wide, D_hidden says {wanted}"
            width = found.last.shape[-1]
            assert width == backbone.D_out, f"the last is {width} wide, D_out {backbone.D_out}"

    @torch.no_grad()
    def test_segments_equal_the_whole(self) -> None:
        """Two segments over one cache give the logits of the model's own forward."""
        with clause(
            "segments equal the whole",
            "pass positions and cache on to every forward, and drop no key or value.",
        ):
            backbone = self.build()
            ids = self.ids(backbone)
            embeds, cache = backbone.embed(ids), backbone.new_cache()
            positions = torch.arange(LENGTH).expand(2, -1)
            parts = [
                backbone.extend(embeds[:, a:b], cache, positions[:, a:b], None).last
                for a, b in ((0, CUT), (CUT, LENGTH))
            ]
            expected = backbone.lm(input_ids=ids, use_cache=False).logits
            same(backbone.logits(torch.cat(parts, dim=1)), expected, TIGHT)

    @torch.no_grad()
    def test_padding_on_the_left_changes_nothing(self) -> None:
        """A row with padding gives what it gives alone."""
        with clause(
            "padding on the left changes nothing",
            "hand mask and position_ids to the model; positions count real tokens alone.",
        ):
            backbone = self.build()
            embeds = backbone.embed(self.ids(backbone))[:1]
            positions = torch.arange(LENGTH)[None]
            plain = backbone.extend(embeds, backbone.new_cache(), positions, None).last
            padded = torch.cat([torch.zeros_like(embeds[:, :3]), embeds], dim=1)
            mask = torch.arange(LENGTH + 3)[None] >= 3
            moved = (mask.long().cumsum(1) - 1).clamp(min=0)
            shifted = backbone.extend(padded, backbone.new_cache(), moved, mask).last
            same(shifted[:, 3:], plain, TIGHT)

    def test_it_stays_frozen(self) -> None:
        """No weight asks for a gradient, and train() leaves it in eval mode."""
        with clause("it stays frozen", "call Backbone.__init__ and override neither train nor it."):
            backbone = self.build()
            loose = [n for n, p in backbone.named_parameters() if p.requires_grad]
            assert not loose, f"'{loose[0]}' asks for a gradient"
            assert not backbone.train().lm.training, "train() puts the model into train mode"

    def test_its_chat_format_shows_every_turn_once(self) -> None:
        """A dialogue renders to ids that hold each turn's words, in order."""
        with clause(
            "its chat format",
            "give TEMPLATE, or a tokenizer with a chat_template, that shows each turn once.",
        ):
            backbone = self.build()
            prompt = Prompt.user("first").then_assistant("second").then_user("third")
            plan = Planner(backbone.tokenizer, backbone.template, Layout(rounds=0)).plan(prompt)
            ids = [i for piece in plan.pieces if isinstance(piece, Tokens) for i in piece.ids]
            text = str(backbone.tokenizer.decode(ids))
            places = [text.find(word) for word in ("first", "second", "third")]
            assert -1 not in places, f"a turn is missing: {text!r}"
            assert places == sorted(places), f"turns are out of order: {text!r}"
