"""The importers `blip2` and `instructblip` against the models and processors of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import processors
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    BlipImageProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
)

from ipn_core import IPN
from ipn_core.errors import CheckpointError
from ipn_core.plan import ImageSlot, Tokens
from ipn_core.prompt import Prompt
from ipn_core.testing.oracles import (
    assert_same,
    bert_tokenizer,
    command_answer,
    llama_tokenizer,
    prompt_logits,
    randomise,
    record_oracle,
    rename_tensors,
)
from ipn_core.testing.tiny import tiny_picture, tiny_tokenizer
from ipn_core.training.features import FeatureCache

SIDE, PATCH, S = 16, 4, 3
QUESTIONS = ["What?", "Where is the dog, if there is one?", "Who is it?"]


@dataclass
class Original:
    """A checkpoint on disk, the model that transformers loads from it, and its processor."""

    name: str
    folder: Path
    model: Any
    processor: Any
    text: str

    def imported(self) -> IPN:
        return IPN.from_pretrained(f"{self.name}:{self.folder}")

    def inputs(self, question: str, pictures: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """What its processor gives; for several pictures, as the model reads them."""
        text = self.text.format(question)
        made = dict(self.processor(images=list(pictures), text=text, return_tensors="pt"))
        more = len(pictures) - 1
        made["input_ids"] = torch.cat([made["input_ids"][:, :S]] * more + [made["input_ids"]], 1)
        made["attention_mask"] = torch.ones_like(made["input_ids"])
        for key in ("qformer_input_ids", "qformer_attention_mask"):
            if key in made:
                made[key] = made[key].expand(len(pictures), -1)
        return made

    @torch.no_grad()
    def logits(self, question: str, pictures: Sequence[Image.Image]) -> torch.Tensor:
        logits: torch.Tensor = self.model(**self.inputs(question, pictures)).logits[0]
        return logits

    def says(self, question: str, picture: Image.Image) -> list[int]:
        inputs = self.inputs(question, [picture])
        made = self.model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new: list[int] = made[0, inputs["input_ids"].shape[1] :].tolist()
        return new


def opt_tokenizer() -> Any:
    """One that puts its first token before every text, as OPT's does."""
    import copy

    tokenizer: Any = copy.deepcopy(tiny_tokenizer(chat=False))
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def text_config(kind: str, tokenizer: Any) -> dict[str, Any]:
    common = {
        "model_type": kind,
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 256,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    if kind == "opt":
        return {**common, "ffn_dim": 48, "word_embed_proj_dim": 32}
    return {**common, "intermediate_size": 48, "num_key_value_heads": 2}


def save(name: str, folder: Path, shard: str = "1GB", **changes: Any) -> Original:
    """Write a small random checkpoint as a real one is laid out."""
    images = BlipImageProcessor(size={"height": SIDE, "width": SIDE})
    if name == "blip2":
        kind, tokenizer, text = "opt", opt_tokenizer(), "Question: {} Answer:"
        processor: Any = Blip2Processor(images, tokenizer, num_query_tokens=S)
        make, cls = Blip2Config, Blip2ForConditionalGeneration
    else:
        kind, tokenizer, text = "llama", llama_tokenizer(bos="</s>", pad="[PAD]"), "{}"
        processor = InstructBlipProcessor(images, tokenizer, bert_tokenizer(), num_query_tokens=S)
        make, cls = InstructBlipConfig, InstructBlipForConditionalGeneration
    config = make(
        vision_config={
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        qformer_config={
            "vocab_size": 90,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "intermediate_size": 20,
            "max_position_embeddings": 64,
            **changes,
        },
        text_config=text_config(kind, tokenizer),
        num_query_tokens=S,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    torch.manual_seed(0)
    model: Any = cls(config)
    randomise(model)
    model.save_pretrained(folder, max_shard_size=shard)
    processor.save_pretrained(folder)
    return Original(name, folder, cls.from_pretrained(folder).eval(), processor, text)


@pytest.fixture(scope="module", params=["blip2", "instructblip"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Original:
    return save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def ours(original: Original) -> IPN:
    return original.imported()


def picture(seed: int) -> Image.Image:
    return tiny_picture(seed, (28, 20))


ASKED = [
    (QUESTIONS[0], [1]),
    (QUESTIONS[1], [2]),
    (QUESTIONS[2], [2]),  # the same picture, another question
    (QUESTIONS[1], [3, 1]),
]


@pytest.mark.parametrize("rows", [[0], [1], [3], [0, 1, 2, 3], [2, 0]])
def test_the_logits_are_the_originals(
    original: Original, ours: IPN, rows: list[int], record_property: Any
) -> None:
    asked = [(ASKED[row][0], [picture(seed) for seed in ASKED[row][1]]) for row in rows]
    expected = [original.logits(*one) for one in asked]
    got = prompt_logits(ours, [Prompt.ask(q, shown) for q, shown in asked])
    worst = assert_same(got, expected)
    record_oracle(record_property, "qformer", f"`{type(original.model).__name__}`", worst)
    if len(rows) == 1:
        assert len(got[0]) == len(expected[0])  # every position
    else:
        assert not torch.allclose(expected[0][-1], expected[1][-1], rtol=1e-2)


def test_the_picture_counts(original: Original) -> None:
    first, other = (original.logits(QUESTIONS[0], [picture(seed)])[-1] for seed in (1, 2))
    assert (first - other).abs().max() > 0.01 * first.abs().max()


def test_greedy_text_is_the_originals(original: Original, ours: IPN) -> None:
    asked = [(question, picture(seed)) for question, (seed, *_) in ASKED]
    expected = [original.says(*one) for one in asked]
    answers = ours.generate([Prompt.ask(q, [shown]) for q, shown in asked], max_new_tokens=8)
    assert [list(answer.ids) for answer in answers] == expected
    assert [list(ours.ask(s, q, max_new_tokens=8).ids) for q, s in asked] == expected
    assert len({tuple(ids) for ids in expected}) > 1


def test_the_command_asks_it(original: Original, ours: IPN, tmp_path: Path) -> None:
    name, expected = f"{original.name}:{original.folder}", ours.ask(picture(1), "What?").text
    assert command_answer(name, picture(1), "What?", tmp_path) == expected != ""


def test_an_answer_ends_where_the_originals_does(tmp_path: Path) -> None:
    first = save("blip2", tmp_path)
    said = first.says(QUESTIONS[0], picture(1))
    end = said[3]
    first.model.config.text_config.eos_token_id = end
    first.model.save_pretrained(tmp_path)
    model = Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    again = Original("blip2", tmp_path, model, first.processor, first.text)
    expected = again.says(QUESTIONS[0], picture(1))
    assert expected == said[: said.index(end) + 1]
    imported = again.imported()
    answer = imported.ask(picture(1), QUESTIONS[0], max_new_tokens=8)
    assert list(answer.ids) == expected
    # An answer to learn ends there, too, although the tokenizer's own end is another.
    plan = imported.planner.plan(Prompt.ask(QUESTIONS[0], [picture(1)], answer="No."))
    *_, learned = plan.pieces
    assert learned == Tokens((*imported.backbone.tokenizer(" No.")["input_ids"][1:], end), True)
    assert end != imported.backbone.tokenizer.eos_token_id


@torch.no_grad()
def test_cached_features_give_the_same(ours: IPN, tmp_path: Path) -> None:
    cache = FeatureCache(ours.encoder, tmp_path)

    class Shown:
        name = "one"

        def load(self) -> Image.Image:
            return picture(1)

    key = cache.add([Shown()])["one"]  # type: ignore[list-item]
    features = cache.get([[key], [key]])
    assert features.global_tokens is not None
    cached = ours.perceive([], QUESTIONS[:2], features).tokens
    fresh = ours.perceive([[picture(1)], [picture(1)]], QUESTIONS[:2]).tokens
    for kept, new in zip(cached, fresh, strict=True):
        # The cache keeps bfloat16.
        torch.testing.assert_close(kept, new, rtol=0.05, atol=0.05 * float(new.abs().max()))


def test_several_shards_hold_the_same(original: Original, ours: IPN, tmp_path: Path) -> None:
    save(original.name, tmp_path, shard="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    several = IPN.from_pretrained(f"{original.name}:{tmp_path}")
    prompt = [Prompt.ask(QUESTIONS[0], [picture(1)])]
    assert torch.equal(prompt_logits(ours, prompt)[0], prompt_logits(several, prompt)[0])


NEWER = [
    (r"^(vision_model|qformer|query_tokens|language_projection)", r"model.\1"),
    (r"^language_model\.model\.", "model.language_model."),
]
"""The names that the classes of transformers have had since 4.52, and it does not write."""


def test_other_versions_names_are_read(original: Original, ours: IPN, tmp_path: Path) -> None:
    head = [] if original.name == "blip2" else [(r"^language_model\.lm_head", "lm_head")]
    rename_tensors(original.folder, tmp_path / "newer", [*NEWER, *head])
    other = IPN.from_pretrained(f"{original.name}:{tmp_path / 'newer'}")
    prompt = [Prompt.ask(QUESTIONS[0], [picture(1)])]
    assert torch.equal(prompt_logits(ours, prompt)[0], prompt_logits(other, prompt)[0])


def test_it_is_saved_and_loaded_as_any_model(original: Original, ours: IPN, tmp_path: Path) -> None:
    ours.save_pretrained(tmp_path)
    again = IPN.from_pretrained(tmp_path)
    prompt = [Prompt.ask(QUESTIONS[0], [picture(1)])]
    assert torch.equal(prompt_logits(ours, prompt)[0], prompt_logits(again, prompt)[0])
    assert not list(tmp_path.glob("*token*"))  # named, not copied


def test_pictures_stand_before_the_first_token_in_every_turn(ours: IPN) -> None:
    dialogue = ours.dialogue([picture(1)])
    dialogue.ask(QUESTIONS[0], max_new_tokens=2)
    prefilled = dialogue.prefilled
    dialogue.ask(QUESTIONS[1], max_new_tokens=2)
    assert dialogue.prefilled > prefilled
    dialogue.ask(QUESTIONS[2], [picture(2)], max_new_tokens=2)
    plan = ours.planner.plan(dialogue.prompt.then_user("Why?"))
    slots = [i for i, piece in enumerate(plan.pieces) if isinstance(piece, ImageSlot)]
    assert slots == [0, 1]
    tokenizer = ours.backbone.tokenizer
    assert plan.text_ids[0] == tokenizer.bos_token_id
    text = tokenizer.decode(plan.text_ids[1:])
    for question in (*QUESTIONS, "Why?"):
        assert text.count(question) == 1


def test_it_trains_from_there(original: Original) -> None:
    model = original.imported()
    shown = [picture(1)]
    prompts = [Prompt.ask(q, shown, answer="A dog.") for q in QUESTIONS]
    learned = [
        piece for piece in model.planner.plan(prompts[0]).pieces if isinstance(piece, Tokens)
    ]
    text = original.text.format(QUESTIONS[0])
    assert list(learned[0].ids) == original.processor.tokenizer(text)["input_ids"]
    model.train()
    loss, count = model(prompts)
    loss.backward()
    assert count == sum(len(learned[1].ids) for _ in prompts)
    frozen = {id(p) for p in model.encoder.parameters()}
    for name, parameter in model.perceiver.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in frozen), name


def test_without_a_picture_only_the_text_is_read(original: Original, ours: IPN) -> None:
    plan = ours.planner.plan(Prompt.ask(QUESTIONS[0]))
    text = original.text.format(QUESTIONS[0])
    assert plan.text_ids == original.processor.tokenizer(text)["input_ids"]


def test_another_interaction_takes_its_place(original: Original, ours: IPN) -> None:
    name = f"{original.name}:{original.folder}"
    swapped = IPN.from_pretrained(name, interact="film", untrained=True)
    assert swapped.ask(picture(1), "What?", max_new_tokens=2).tokens["dynamic"] > 0
    for key, value in ours.backbone.state_dict().items():
        assert torch.equal(value, swapped.backbone.state_dict()[key])


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"hidden_act": "relu"}, "hidden_act 'relu'"), ({"layer_norm_eps": 1e-5}, "layer_norm_eps")],
)
def test_other_forms_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    save("blip2", tmp_path, **changes)
    with pytest.raises(CheckpointError, match=f"qformer_config.{named}.* alone"):
        IPN.from_pretrained(f"blip2:{tmp_path}")


def test_flan_t5_is_refused(tmp_path: Path) -> None:
    Blip2Config(text_config={"model_type": "t5"}).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"model_type 't5'; this importer reads 'llama' or"):
        IPN.from_pretrained(f"blip2:{tmp_path}")
