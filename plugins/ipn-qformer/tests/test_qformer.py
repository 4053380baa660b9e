"""The connector `qformer` against the Q-Formers of transformers, and what batches make of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ipn_qformer.importing import Blip2, InstructBlip
from ipn_qformer.qformer import QFormer, QFormerConfig
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
)

from ipn_core.errors import CheckpointError, ConfigError, UnknownNameError
from ipn_core.features import VisualFeatures
from ipn_core.stages import PerceiveContext
from ipn_core.testing.contracts import ConnectorContract
from ipn_core.testing.contracts.pictures import ragged
from ipn_core.testing.oracles import bert_tokenizer, randomise
from ipn_core.testing.tiny import TinyEncoder

SMALL = {"queries": 3, "width": 16, "depth": 3, "heads": 2, "hidden": 20, "every": 2}
THEIRS = {
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 20,
    "cross_attention_frequency": 2,
    "encoder_hidden_size": 20,
    "max_position_embeddings": 64,
}
VOCABULARY, WIDTH, D_IN = 90, 20, 28
QUESTIONS = ["What?", "Where is the dog, if there is one?", "What?", "Which?"]


def read_by() -> Any:
    """A tokenizer as the Q-Former's is: lower case, marks around the text, cut on the left."""
    tokenizer = bert_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "[DEC]"})
    return tokenizer


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reader")
    read_by().save_pretrained(folder)
    return folder


class TestQFormer(ConnectorContract):
    name = "qformer"
    options = SMALL


class TestInstructed(ConnectorContract):
    name = "qformer"

    @pytest.fixture(autouse=True)
    def _with_tokenizer(self, reader: Path) -> None:
        self.options = {**SMALL, "instruction": {"tokenizer": str(reader)}}


class _Made(ConnectorContract):
    """Builds connectors as models do."""

    name = "qformer"


def make(**options: Any) -> QFormer:
    connector = _Made().build(**SMALL, **options)
    assert isinstance(connector, QFormer)
    return connector


def instructed(reader: Path) -> QFormer:
    options = {"tokenizer": str(reader), "vocabulary": VOCABULARY, "positions": 64}
    return make(instruction=options)


def seen(rows: Any = ((0,), (1, 2), (2,), (0, 1)), classes: bool = True) -> VisualFeatures:
    """Ragged pictures, with a class token each."""
    features = ragged(WIDTH, rows)
    tokens = torch.stack(
        [
            torch.randn(WIDTH, generator=torch.Generator().manual_seed(100 + span.length))
            for span in features.images
        ]
    )
    return VisualFeatures(
        features.values, features.images, features.batch, tokens if classes else None
    )


def keys(features: VisualFeatures, index: int) -> torch.Tensor:
    """What the original's cross-attention is given for a picture, (1, 1 + P, Dv)."""
    span = features.images[index]
    parts = [features.values[span.offset : span.offset + span.length]]
    if features.global_tokens is not None:
        parts.insert(0, features.global_tokens[index, None])
    return torch.cat(parts)[None]


def theirs(model: Any, config: Any, importer: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Give an original Q-Former's tensors to an importer, with queries and a last linear map."""
    randomise(model)
    head = SimpleNamespace(queries=torch.randn(1, 3, 16), out=torch.nn.Linear(16, D_IN))
    tensors = {f"qformer.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors["query_tokens"] = head.queries
    for kind, tensor in head.out.state_dict().items():
        tensors[f"language_projection.{kind}"] = tensor
    state = importer.state(SimpleNamespace(qformer_config=config), tensors)
    return head, {name.removeprefix("perceiver."): tensor for name, tensor in state.items()}


def load(connector: QFormer, state: dict[str, torch.Tensor]) -> None:
    own = {k for k in connector.state_dict() if not k.startswith("encoder.")}
    assert set(state) == own
    connector.load_state_dict(state, strict=False)


@torch.no_grad()
@pytest.mark.parametrize("classes", [True, False])
def test_without_a_question_it_is_the_original(classes: bool) -> None:
    config = Blip2QFormerConfig(**THEIRS)
    original = Blip2QFormerModel(config).eval()
    head, state = theirs(original, config, Blip2())
    connector = make()
    load(connector, state)
    features = seen(classes=classes)
    found = connector.connect(features, PerceiveContext([], []))
    for index, tokens in enumerate(found):
        expected = original(head.queries, encoder_hidden_states=keys(features, index))
        torch.testing.assert_close(
            tokens, head.out(expected.last_hidden_state[0]), rtol=1e-4, atol=1e-4
        )


@torch.no_grad()
def test_with_questions_it_is_the_original(reader: Path) -> None:
    config = InstructBlipQFormerConfig(**THEIRS, vocab_size=VOCABULARY)
    original = InstructBlipQFormerModel(config).eval()
    head, state = theirs(original, config, InstructBlip())
    connector = instructed(reader)
    load(connector, state)
    features = seen()
    found = connector.connect(features, PerceiveContext([], QUESTIONS))
    for index, tokens in enumerate(found):
        asked = read_by()(QUESTIONS[features.images[index].sample], return_tensors="pt")
        expected = original(
            asked["input_ids"],
            attention_mask=torch.ones(1, 3 + asked["input_ids"].shape[1]),
            query_embeds=head.queries,
            encoder_hidden_states=keys(features, index),
        )
        torch.testing.assert_close(
            tokens, head.out(expected.last_hidden_state[0, :3]), rtol=1e-4, atol=1e-4
        )


@torch.no_grad()
def test_questions_about_one_picture_are_apart_and_equal_ones_are_run_once(reader: Path) -> None:
    connector = instructed(reader)
    features = seen([[0]]).select([0, 0, 0, 0])
    mapped: list[int] = []
    ran: list[int] = []
    first = connector.layers[0]
    first.cross_attention.kv.register_forward_hook(lambda m, a, out: mapped.append(len(out)))
    first.register_forward_hook(lambda m, a, out: ran.append(len(out)))
    tokens = connector.connect(features, PerceiveContext([], QUESTIONS))
    assert mapped == [1 + 6]  # the class token and the patches of one picture
    assert ran == [3]
    assert tokens[0] is tokens[2]
    assert not torch.allclose(tokens[0], tokens[1], rtol=1e-3)
    for question, together in zip(QUESTIONS, tokens, strict=True):
        (alone,) = connector.connect(seen([[0]]), PerceiveContext([], [question]))
        torch.testing.assert_close(together, alone)


@torch.no_grad()
def test_without_a_question_a_shared_picture_gives_one_tensor() -> None:
    tokens = make().connect(seen([[0], [1]]).select([0, 1, 0]), PerceiveContext([], []))
    assert tokens[0] is tokens[2]
    assert tokens[0] is not tokens[1]


@torch.no_grad()
def test_every_word_counts_and_padding_does_not(reader: Path) -> None:
    connector = instructed(reader)
    features = seen([[0], [1]])

    def ask(*questions: str) -> list[torch.Tensor]:
        return connector.connect(features, PerceiveContext([], list(questions)))

    (short, _), (same, _), (other, _) = ask("a?", "b?"), ask("a?", "a long one?"), ask("b?", "b?")
    torch.testing.assert_close(short, same)
    assert not torch.allclose(short, other, rtol=1e-3)


def test_what_a_user_typed_is_no_special_token(reader: Path) -> None:
    connector = instructed(reader)
    (ids,) = connector._read(["a [SEP] b"], 1)
    special = read_by().sep_token_id
    assert ids.index(special) == len(ids) - 1  # the tokenizer's own, at the end
    (plain,) = connector._read(["What is it?"], 1)
    assert list(plain) == read_by()("What is it?")["input_ids"]


@torch.no_grad()
def test_a_question_beyond_the_last_position_is_cut(reader: Path) -> None:
    connector = make(instruction={"tokenizer": str(reader), "positions": 8})
    (ids,) = connector._read(["abcdefghijkl?"], 1)
    assert len(ids) == 8
    assert ids[-2] == read_by()("?")["input_ids"][1]  # its end is kept
    assert connector.connect(seen([[0]]), PerceiveContext([], ["abcdefghijkl?"]))[0].shape == (
        3,
        28,
    )


def test_no_pictures_give_no_tokens(reader: Path) -> None:
    nothing = VisualFeatures.pack([torch.zeros(0, WIDTH)], [], [], 2)
    assert make().connect(nothing, PerceiveContext([], [])) == []
    assert instructed(reader).connect(nothing, PerceiveContext([], ["a", "b"])) == []


def test_new_queries_differ_and_dropout_is_for_training() -> None:
    connector = make()
    assert not torch.allclose(connector.queries[0], connector.queries[1])
    features, nothing = seen([[0]]), PerceiveContext([], [])
    still = [connector.connect(features, nothing)[0] for _ in range(2)]
    assert torch.equal(*still)
    connector.train()
    moved = [connector.connect(features, nothing)[0] for _ in range(2)]
    assert not torch.allclose(*moved)


def test_wrong_configs_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="width must be a multiple of heads, got 10 and 4"):
        QFormerConfig.parse({"width": 10, "heads": 4}, "perceive")
    with pytest.raises(ConfigError, match=r"unknown key 'perceive.instruction.tokeniser'"):
        QFormerConfig.parse({"instruction": {"tokeniser": "a"}}, "perceive")
    with pytest.raises(UnknownNameError, match="unknown weights 'nowhere'"):
        make(instruction={"tokenizer": "nowhere"})
    with pytest.raises(CheckpointError, match=r"of the Q-Former \('.*'\) cannot .* in '.*/inner'"):
        make(instruction={"tokenizer": str(tmp_path), "subfolder": "inner"})


def test_the_encoder_keeps_its_weights() -> None:
    assert isinstance(make().encoder, TinyEncoder)
    connector = _Made().new(**SMALL)
    reference = TinyEncoder(connector.encoder.config)
    assert torch.equal(connector.encoder.patch.weight, reference.patch.weight)
