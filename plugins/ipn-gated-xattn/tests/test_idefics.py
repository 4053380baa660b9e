"""The importer `idefics` against transformers' `IdeficsForVisionText2Text` and its processor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import IdeficsConfig, IdeficsForVisionText2Text
from transformers.models.idefics.image_processing_pil_idefics import IdeficsImageProcessorPil
from transformers.models.idefics.processing_idefics import IdeficsProcessor

from ipn_core import IPN
from ipn_core.errors import CheckpointError
from ipn_core.prompt import Prompt
from ipn_core.testing.oracles import (
    assert_same,
    command_answer,
    prompt_logits,
    randomise,
    record_oracle,
    tokenizer_with,
)
from ipn_core.testing.tiny import tiny_picture

SIDE, PATCH = 16, 4
FAKE, IMAGE, END = "<fake_token_around_image>", "<image>", "<end_of_utterance>"
RESAMPLER = {
    "use_resampler": True,
    "resampler_n_latents": 5,
    "resampler_depth": 2,
    "resampler_n_heads": 3,
    "resampler_head_dim": 4,
}
FORMS: dict[str, dict[str, Any]] = {
    "base": {
        "use_resampler": True,
        "perceiver_config": {**RESAMPLER, "qk_layer_norms_perceiver": True},
        "qk_layer_norms": True,
        "cross_layer_interval": 2,
        "alpha_type": "vector",
    },
    "instruct": {
        "use_resampler": True,
        "perceiver_config": RESAMPLER,
        "alpha_initializer": "normal",
        "alphas_initializer_range": 0.3,
        "alpha_type": "vector",
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "without-resampler": {
        "qk_layer_norms": True,
        "alpha_initializer": "ones",
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class Saved:
    """A small random Idefics as a checkpoint has it, and transformers' own model of it."""

    folder: Path
    model: Any
    processor: Any
    end: str

    @property
    def name(self) -> str:
        return f"idefics:{self.folder}"

    def inputs(self, *prompts: list[Any]) -> dict[str, torch.Tensor]:
        """What the processor makes of texts and pictures."""
        made = self.processor(
            text=list(prompts), add_end_of_utterance_token=False, padding=True, return_tensors="pt"
        )
        return {key: made[key] for key in made if key != "token_type_ids"}

    @torch.no_grad()
    def logits(self, *prompts: list[Any]) -> list[torch.Tensor]:
        inputs = self.inputs(*prompts)
        found = self.model(**inputs).logits
        return [row[real.bool()] for row, real in zip(found, inputs["attention_mask"], strict=True)]


def save(folder: Path, form: str, shard: str = "1GB", **changes: Any) -> Saved:
    end = END if form == "instruct" else ""
    more = [FAKE, IMAGE, *([end] if end else [])]
    tokenizer: Any = tokenizer_with(folder, *more)
    config = IdeficsConfig(
        vocab_size=len(tokenizer) - len(more),
        additional_vocab_size=len(more),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        vision_config={
            "embed_dim": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        **{**FORMS[form], **changes},
    )
    torch.manual_seed(0)
    model = IdeficsForVisionText2Text(config).eval()
    randomise(model)
    model.save_pretrained(folder, max_shard_size=shard)
    pixels = IdeficsImageProcessorPil(image_size=SIDE)
    pixels.save_pretrained(folder)
    tokenizer.padding_side = "left"
    return Saved(folder, model, IdeficsProcessor(pixels, tokenizer, image_size=SIDE), end)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def get(form: str) -> Saved:
        return save(tmp_path_factory.mktemp(form), form)

    return get


@pytest.fixture(scope="module")
def imported(saved: Any) -> Any:
    @cache
    def get(form: str) -> IPN:
        return IPN.from_pretrained(saved(form).name)

    return get


def picture(seed: int) -> Image.Image:
    return tiny_picture(seed, (28, 20))


ONE, TWO, THREE = (picture(seed) for seed in range(3))


def pairs(end: str) -> list[tuple[Prompt, list[Any]]]:
    """Prompts of ours, and what Idefics' processor is given for the same."""
    turn = f"{end}\nAssistant:"
    return [
        (Prompt.ask("What?", [ONE]), ["User:", ONE, f"What?{turn}"]),
        (
            Prompt.user("Before", TWO, "between,", THREE, "and after?"),
            ["User: Before", TWO, "between,", THREE, f"and after?{turn}"],
        ),
        (Prompt.ask("Is there anything?"), [f"User: Is there anything?{turn}"]),
        (Prompt.ask("Which?", [THREE, ONE]), ["User:", THREE, ONE, f"Which?{turn}"]),
        (
            Prompt.ask("What?", [TWO]).then_assistant("yes").then_user("And", ONE, "?"),
            ["User:", TWO, f"What?{turn} yes{end}\nUser: And", ONE, f"?{turn}"],
        ),
    ]


BATCHES = [[0], [1], [2], [3], [4], [0, 1, 2, 3, 4], [2, 1], [2, 2]]


@pytest.mark.parametrize("rows", BATCHES, ids=lambda rows: "+".join(map(str, rows)))
@pytest.mark.parametrize("form", FORMS)
def test_the_logits_are_the_originals(
    saved: Any, imported: Any, form: str, rows: Any, record_property: Any
) -> None:
    theirs = saved(form)
    asked = [pairs(theirs.end)[row] for row in rows]
    got = prompt_logits(imported(form), [prompt for prompt, _ in asked])
    expected = [theirs.logits(items)[0] for _, items in asked]
    worst = assert_same(got, expected)
    record_oracle(record_property, "gated-xattn", "`IdeficsForVisionText2Text`", worst)
    assert [len(one) for one in got] == [len(one) for one in expected]
    assert_same(got, theirs.logits(*[items for _, items in asked]))


@pytest.mark.parametrize("form", FORMS)
def test_the_pictures_and_the_gates_matter(saved: Any, imported: Any, form: str) -> None:
    theirs, ours = saved(form), imported(form)
    one, other = (theirs.logits(["User:", shown, "What?"])[0] for shown in (ONE, TWO))
    assert (one - other)[-1].abs().max() > 1e-2 * one.abs().max()
    assert all(block.attention_gate.abs().min() > 0 for block in ours.injector.blocks)


@pytest.mark.parametrize("form", FORMS)
def test_greedy_text_is_the_originals(saved: Any, imported: Any, form: str) -> None:
    theirs, ours = saved(form), imported(form)
    ids = theirs.processor.tokenizer.get_vocab()
    asked = pairs(theirs.end)
    answers = ours.generate([prompt for prompt, _ in asked], max_new_tokens=8)
    for answer, (_, items) in zip(answers, asked, strict=True):
        inputs = theirs.inputs(items)
        made = theirs.model.generate(
            **inputs,
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=ids[theirs.end or "</s>"],
            bad_words_ids=[[ids[FAKE]], [ids[IMAGE]]],
        )
        assert list(answer.ids) == made[0, inputs["input_ids"].shape[1] :].tolist()


def test_the_command_asks_it(saved: Any, imported: Any, tmp_path: Path) -> None:
    expected = imported("instruct").ask(ONE, "What?").text
    assert command_answer(saved("instruct").name, ONE, "What?", tmp_path) == expected != ""


def test_a_dialogue_equals_a_fresh_start(imported: Any) -> None:
    ours = imported("instruct")
    dialogue = ours.dialogue([TWO])
    first = dialogue.ask("What?", max_new_tokens=4)
    second = dialogue.ask("And?", [ONE, THREE], max_new_tokens=4)
    ended = first.ids[-1] in ours.backbone.eos_ids
    again = Prompt.ask("What?", [TWO]).then_assistant(first.ids[:-1] if ended else first.ids)
    (answer,) = ours.generate([again.then_user(ONE, THREE, "And?")], max_new_tokens=4)
    assert answer.ids == second.ids


def test_answers_end_and_show_no_picture(saved: Any, imported: Any) -> None:
    for form in FORMS:
        ids = saved(form).processor.tokenizer.get_vocab()
        backbone = imported(form).backbone
        assert backbone.eos_ids == (ids[saved(form).end or "</s>"],)
        assert backbone.lm.generation_config.suppress_tokens == [ids[FAKE], ids[IMAGE]]


def test_the_words_of_a_user_name_no_picture(imported: Any) -> None:
    ours = imported("base")
    ids = ours.planner.plan(Prompt.ask(f"What is {IMAGE}?", [ONE])).text_ids
    assert ids.count(ours.backbone.tokenizer.get_vocab()[IMAGE]) == 1


@pytest.mark.parametrize("form", FORMS)
def test_several_shards_hold_the_same(saved: Any, imported: Any, form: str, tmp_path: Path) -> None:
    save(tmp_path, form, shard="40KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    several = IPN.from_pretrained(f"idefics:{tmp_path}").state_dict()
    for key, value in imported(form).state_dict().items():
        assert torch.equal(value, several[key]), key


def test_what_was_imported_is_saved_and_loaded_as_any_model(
    saved: Any, imported: Any, tmp_path: Path
) -> None:
    ours = imported("base")
    ours.save_pretrained(tmp_path / "mine")
    again = IPN.from_pretrained(tmp_path / "mine")
    prompts = [prompt for prompt, _ in pairs("")]
    for one, two in zip(prompt_logits(ours, prompts), prompt_logits(again, prompts), strict=True):
        assert torch.equal(one, two)


def test_another_interaction_takes_its_place(saved: Any) -> None:
    swapped = IPN.from_pretrained(saved("base").name, interact="film", untrained=True)
    assert swapped.strategy == "film"
    assert swapped.ask(ONE, "What?", max_new_tokens=2).tokens["dynamic"] > 0


def test_what_transformers_cannot_run_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "base", cross_layer_interval=3)
    with pytest.raises(CheckpointError, match="cross_layer_interval 3, which does not divide"):
        IPN.from_pretrained(f"idefics:{tmp_path}")


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        ("embed_tokens.additional_embedding.weight", "additional_embedding.weight is missing"),
        ("gated_cross_attn_layers.1.alpha_dense", "no tensor 'gated_cross_attn_layers.1.alpha"),
        ("perceiver_resampler.blocks.1.0.q_proj.weight", "no tensor 'perceiver_resampler"),
        ("layers.2.mlp.up_proj.weight", "missing model.layers.2.mlp.up_proj.weight"),
        ("vision_model.post_layernorm.bias", "missing .*post_layernorm.bias"),
    ],
)
def test_a_missing_tensor_is_named(saved: Any, tmp_path: Path, lost: str, said: str) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved("base").folder
    for path in folder.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    held = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in held.items() if key != f"model.{lost}"}
    assert len(kept) == len(held) - 1
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=said):
        IPN.from_pretrained(f"idefics:{tmp_path}")


def test_a_checkpoint_of_another_model_is_refused(saved: Any, tmp_path: Path) -> None:
    config = json.loads((saved("base").folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(CheckpointError, match="holds a model of type 'llama', which idefics does"):
        IPN.from_pretrained(f"idefics:{tmp_path}")
