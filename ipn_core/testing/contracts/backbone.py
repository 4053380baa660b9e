"""What every `Backbone` must do, as tests that a plugin gets by writing `build`."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import pytest
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
    def test_its_embeddings_are_its_callers(self) -> None:
        """Whoever has tokens looked up may write into what comes back."""
        with clause("its embeddings are its caller's", "return a tensor of its own from `embed`."):
            backbone = self.build()
            ids = self.ids(backbone)
            first = backbone.embed(ids)
            expected = first.clone()
            first.zero_()
            assert torch.equal(backbone.embed(ids), expected), (
                "what is written into embeddings stands in those of later tokens"
            )

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

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    @torch.no_grad()
    def test_shape_and_dtype(self, dtype: torch.dtype) -> None:
        """What comes out has the dtype of the weights, but for the logits, which are fp32."""
        with clause(
            "shape and dtype",
            "leave the weights in the dtype they came in, and give float32 from `logits`.",
        ):
            backbone = self.build()
            backbone.lm.to(dtype)
            ids = self.ids(backbone)
            embeds, positions = backbone.embed(ids), torch.arange(LENGTH).expand(2, -1)
            last = backbone.extend(embeds, backbone.new_cache(), positions, None).last
            for what, found in (("embeddings", embeds), ("hidden states", last)):
                assert found.dtype == dtype, f"{what} are {found.dtype}, not {dtype}"
            logits = backbone.logits(last)
            vocabulary = backbone.lm.get_output_embeddings().weight.shape[0]
            got, expected = tuple(logits.shape), (*ids.shape, vocabulary)
            assert got == expected, f"logits are {got}, expected (B, T, vocabulary) = {expected}"
            assert logits.dtype == torch.float32, f"logits are {logits.dtype}, not float32"
            assert bool(logits.isfinite().all()), "logits are not finite"

    @torch.no_grad()
    def test_each_layer_can_be_changed(self) -> None:
        """A call-back before a layer gets what the layer reads, and decides it."""
        with clause(
            "each layer can be changed",
            "return from `layers` the decoder's own modules, in the order in which they run, each "
            "called with the keyword position_ids.",
        ):
            backbone = self.build()
            embeds = backbone.embed(self.ids(backbone))
            positions = torch.arange(LENGTH).expand(2, -1)

            def last() -> torch.Tensor:
                return backbone.extend(embeds, backbone.new_cache(), positions, None).last

            plain = last()
            every = list(range(len(backbone.layers)))
            read = backbone.extend(embeds, backbone.new_cache(), positions, None, every).hidden
            met: list[int] = []

            def watch(layer: int, hidden: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
                met.append(layer)
                same(hidden, read[layer], TIGHT)
                assert torch.equal(at.expand(2, -1), positions), "positions are other ones"
                return hidden

            with backbone.layer_callback(every, watch):
                assert torch.equal(last(), plain), "a call-back that changes nothing does"
            assert met == every, f"layers {every} were called as {met}"
            for layer in every:
                with backbone.layer_callback([layer], lambda layer, hidden, at: -hidden):
                    alike = torch.allclose(last(), plain, rtol=1e-2)
                assert not alike, f"what layer {layer} reads decides nothing"
            assert torch.equal(last(), plain), "it is changed afterwards, too"

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

    @torch.no_grad()
    def test_order_of_the_batch(self) -> None:
        """Rows in another order get their hidden states in that order."""
        with clause("order of the batch", "let no row's hidden states depend on another row."):
            backbone = self.build()
            embeds = backbone.embed(self.ids(backbone))
            positions = torch.arange(LENGTH).expand(2, -1)
            one, other = (
                backbone.extend(rows, backbone.new_cache(), positions, None).last
                for rows in (embeds, embeds.flip(0))
            )
            same(other.flip(0), one, TIGHT)

    def test_gradients_flow_through_the_cache(self) -> None:
        """What a later segment gives has a gradient for every token of an earlier one."""
        with clause(
            "gradients flow through the cache",
            "run the model without torch.no_grad, and detach no keys or values: stages before the "
            "cut could not learn.",
        ):
            backbone = self.build()
            embeds = backbone.embed(self.ids(backbone)).detach().requires_grad_(True)
            cache, positions = backbone.new_cache(), torch.arange(LENGTH).expand(2, -1)
            for a, b in ((0, CUT), (CUT, LENGTH)):
                last = backbone.extend(embeds[:, a:b], cache, positions[:, a:b], None).last
            (gradient,) = torch.autograd.grad(last.square().sum(), embeds)
            assert bool(gradient.isfinite().all()), "a gradient is not finite"
            reached = gradient.abs().amax((0, 2)) > 0
            lost = [token for token, there in enumerate(reached.tolist()) if not there]
            assert not lost, f"no gradient reaches token {lost[0]} of {LENGTH}"

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
