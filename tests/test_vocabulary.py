"""Stages meet the LLM's words, and are told what features are evidence of."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from toys import LinearConnector, picture, toy_config, toy_registry

from ipn_core.fitting import declared, sizes
from ipn_core.hooks import hookimpl
from ipn_core.model import IPN
from ipn_core.plan import Tokens
from ipn_core.plugins import Registry, add_plugin
from ipn_core.prompt import Prompt
from ipn_core.stages import Label
from ipn_core.testing.interactions import TinyLook
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig, tiny_backbone
from ipn_core.training.answers import directions
from ipn_core.vocabulary import Vocabulary


class Reader(TinyLook):
    """Keeps what it needs of the words, and can say texts with them."""

    met = 0
    word: Tensor

    def meet(self, vocabulary: Vocabulary) -> None:
        self.met += 1
        word = vocabulary.embed(vocabulary.ids("yes")).mean(0)
        self.register_buffer("word", word, persistent=False)
        self.embed = vocabulary

    def saying(self, texts: Any) -> Tensor:
        means = [self.embed.embed(self.embed.ids(text)).mean(0) for text in texts]
        return torch.stack(means).unsqueeze(1).expand(-1, self.length, -1)

    @property
    def width(self) -> int:
        return self.dims.D_in


class Replacing(LinearConnector):
    """Gives other features than its encoder's."""

    @property
    def static_tokens(self) -> int:  # type: ignore[override]
        return 0


class Plugin:
    @hookimpl
    def register(self, registry: Any) -> None:
        registry.interaction("toy-reader", Reader)


@pytest.fixture(scope="module")
def registry() -> Registry:
    registry = toy_registry()
    add_plugin(registry, "toy-words", Plugin())
    return registry


@pytest.fixture
def model(registry: Registry) -> IPN:
    config = toy_config(registry, "tiny-look", interact={"name": "toy-reader", "width": 32})
    encoder = TinyEncoder(TinyEncoderConfig())
    return IPN.from_config(config, backbone=tiny_backbone(), encoder=encoder, registry=registry)


def test_a_stage_meets_the_words_once_and_no_checkpoint_holds_them(model: IPN) -> None:
    reader = model.interaction
    assert isinstance(reader, Reader)
    assert reader.met == 1
    ids = model.backbone.tokenizer("yes", add_special_tokens=False)["input_ids"]
    expected = model.backbone.embed(torch.tensor([ids]))[0].mean(0)
    torch.testing.assert_close(reader.word, expected)
    assert not any(name.endswith(".word") for name in model.trained_state())


def test_directions_are_those_of_the_training(model: IPN) -> None:
    found = Vocabulary.of(model.backbone).directions(["yes", "no", "green"])
    torch.testing.assert_close(found, directions(model, ["yes", "no", "green"]))
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3))


def test_stages_are_told_what_features_are_evidence_of(model: IPN) -> None:
    assert model.interaction is not None
    labels = model.interaction.dims.labels
    assert labels[:2] == (Label("it 0"), Label("it 1", ("odd",)))
    assert len(labels) == model.encoder.width


def test_a_connector_that_gives_other_features_hands_no_labels_on(model: IPN) -> None:
    dims = sizes(model.backbone, model.encoder, model.config.layout)
    assert declared(dims, LinearConnector(None, dims, model.encoder)).labels == dims.labels != ()
    assert declared(dims, Replacing(None, dims, model.encoder)).labels == ()


def test_verbalise_teaches_with_what_an_interaction_says_itself(model: IPN) -> None:
    from ipn_core.tasks import Example, Picture
    from ipn_core.training.data import Examples, make_batch
    from ipn_core.training.features import FeatureCache
    from ipn_core.training.objectives import Verbalise

    shown = Picture("one", picture)
    data = Examples("toy", "train", [Example("What?", (word,), (shown,)) for word in ("a", "bc")])
    told: list[Tensor] = []

    class Told:
        @hookimpl(wrapper=True)
        def inject(self, message: Any, context: Any) -> Any:
            told.append(message.values)
            return (yield)

    batch = make_batch([(data, 0), (data, 1)], FeatureCache(model.encoder, size=0), None)
    objective = Verbalise(model, [data])  # type: ignore[list-item]
    with model.observing(Told()):
        objective.loss(batch, None)
    assert isinstance(model.interaction, Reader)
    torch.testing.assert_close(told[0], model.interaction.saying(["a", "bc"]))


@pytest.mark.parametrize("space", ["", " "])
def test_directions_are_those_of_answers_where_the_template_puts_them(
    registry: Registry, space: str
) -> None:
    template = (
        "{% for m in messages %}{{ m.role }}:"
        f"{{% if m.role == 'assistant' %}}{space}{{% endif %}}"
        "{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    prompt = {"template": template, "system": "Be brief."}
    config = toy_config(registry, "tiny-look", prompt=prompt)
    encoder = TinyEncoder(TinyEncoderConfig())
    model = IPN.from_config(config, backbone=tiny_backbone(), encoder=encoder, registry=registry)
    plan = model.planner.plan(Prompt.ask("What?", [picture()], answer="no cake"))
    learned = next(piece.ids for piece in plan.pieces if isinstance(piece, Tokens) and piece.learn)
    answer = model.planner.answer_ids("no cake")
    assert tuple(answer) == learned[: len(answer)]
    assert len(learned) == len(answer) + 1  # what ends it
    assert (model.backbone.tokenizer.decode(answer)) == f"{space}no cake"

    vocabulary = Vocabulary.of(model.backbone)
    means = torch.stack(
        [vocabulary.embed(vocabulary.ids(f"{space}{word}")).mean(0) for word in ("no cake", "yes")]
    )
    expected = torch.nn.functional.normalize(means - means.mean(0), dim=-1)
    torch.testing.assert_close(directions(model, ["no cake", "yes"]), expected)
