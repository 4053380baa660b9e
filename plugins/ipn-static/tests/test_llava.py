"""The importer `llava` against transformers' `LlavaForConditionalGeneration`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from ipn_core import IPN
from ipn_core.errors import CheckpointError, DownloadError, UnknownNameError
from ipn_core.prompt import Prompt
from ipn_core.testing.oracles import (
    assert_same,
    command_answer,
    llama_tokenizer,
    prompt_logits,
    randomise,
    record_oracle,
    rename_tensors,
)
from ipn_core.testing.tiny import tiny_picture
from ipn_core.training.run import train

EXAMPLE = Path(__file__).parents[3] / "examples" / "swap.yaml"
SIDE, PATCH = 16, 4


def save(folder: Path, shard: str = "1GB", **changes: Any) -> Any:
    """Write a small random LLaVA as a real checkpoint has it; returns the model."""
    tokenizer = llama_tokenizer("<image>")
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        **changes,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    randomise(model)
    model.save_pretrained(folder, max_shard_size=shard)
    size = {"height": SIDE, "width": SIDE}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    return model, processor


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    folder = tmp_path_factory.mktemp("llava")
    return folder, *save(folder)


def picture(seed: int) -> Image.Image:
    return tiny_picture(seed, (28, 20))


def original(llava: Any, question: str, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
    """What transformers' own processor would give for one question."""
    shown = "<image>\n" * len(pictures)
    text = f"USER: {shown}{question} ASSISTANT:"
    return dict(llava[2](images=pictures or None, text=text, return_tensors="pt"))


ASKED = [("What?", [1]), ("And where is the dog, if there is one?", [2, 3]), ("Who?", [])]


@pytest.mark.parametrize("rows", [[0], [1], [2], [0, 1, 2], [1, 0]])
def test_the_logits_are_the_originals(llava: Any, rows: list[int], record_property: Any) -> None:
    folder, model, _ = llava
    ours = IPN.from_pretrained(f"llava:{folder}")
    asked = [(ASKED[r][0], [picture(s) for s in ASKED[r][1]]) for r in rows]
    with torch.no_grad():
        expected = [model(**original(llava, *one)).logits[0] for one in asked]
    got = prompt_logits(ours, [Prompt.ask(q, shown) for q, shown in asked])
    worst = assert_same(got, expected)
    record_oracle(record_property, "static", "`LlavaForConditionalGeneration`", worst)
    if len(rows) == 1:
        assert len(got[0]) == len(expected[0])  # every position


def test_greedy_text_is_the_originals(llava: Any) -> None:
    folder, model, _ = llava
    ours = IPN.from_pretrained(f"llava:{folder}")
    asked = [(q, [picture(s) for s in seeds]) for q, seeds in ASKED]
    answers = ours.generate([Prompt.ask(q, shown) for q, shown in asked], max_new_tokens=8)
    for answer, one in zip(answers, asked, strict=True):
        inputs = original(llava, *one)
        made = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        new = made[0, inputs["input_ids"].shape[1] :].tolist()
        assert list(answer.ids) == new


def test_the_command_asks_it(llava: Any, tmp_path: Path) -> None:
    name = f"llava:{llava[0]}"
    expected = IPN.from_pretrained(name).ask(picture(1), "What?").text
    assert command_answer(name, picture(1), "What?", tmp_path) == expected != ""


def test_several_shards_hold_the_same(llava: Any, tmp_path: Path) -> None:
    save(tmp_path, shard="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    one, several = (IPN.from_pretrained(f"llava:{f}") for f in (llava[0], tmp_path))
    prompt = [Prompt.ask("What?", [picture(1)])]
    assert torch.equal(prompt_logits(one, prompt)[0], prompt_logits(several, prompt)[0])


LAYOUTS = {
    "published": [(r"^vision_tower\.", "vision_tower.vision_model.")],
    "newer": [
        (r"^vision_tower\.", "model.vision_tower.vision_model."),
        (r"^multi_modal_projector\.", "model.multi_modal_projector."),
        (r"^language_model\.lm_head", "lm_head"),
        (r"^language_model\.model\.", "model.language_model."),
    ],
}
"""Names that this transformers reads and does not write: those of llava-hf/llava-1.5-7b-hf, and
those that its classes have had since 4.52."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_versions_names_are_read(llava: Any, tmp_path: Path, layout: str) -> None:
    rename_tensors(llava[0], tmp_path / layout, LAYOUTS[layout])
    prompt = [Prompt.ask("What?", [picture(1)])]
    one, other = (IPN.from_pretrained(f"llava:{f}") for f in (llava[0], tmp_path / layout))
    assert torch.equal(prompt_logits(one, prompt)[0], prompt_logits(other, prompt)[0])


def test_a_hub_id_does_what_its_folder_does(
    llava: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted: list[tuple[str, list[str]]] = []

    def fetched(name: str, allow_patterns: list[str]) -> str:
        wanted.append((name, allow_patterns))
        return str(llava[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    ours = IPN.from_pretrained("llava:some-one/some-thing")
    assert {name for name, _ in wanted} == {"some-one/some-thing"}
    for path in llava[0].iterdir():
        assert any(path.match(pattern) for pattern in wanted[0][1]), path.name
    assert not any(Path("pytorch_model.bin").match(p) for _, some in wanted for p in some)
    prompt = [Prompt.ask("What?", [picture(1)])]
    theirs = IPN.from_pretrained(f"llava:{llava[0]}")
    assert torch.equal(prompt_logits(ours, prompt)[0], prompt_logits(theirs, prompt)[0])
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["backbone"]["weights"] == "llava:some-one/some-thing"
    assert saved["encoder"]["weights"] == "some-one/some-thing"


def test_what_was_imported_is_saved_and_loaded_as_any_model(llava: Any, tmp_path: Path) -> None:
    ours = IPN.from_pretrained(f"llava:{llava[0]}")
    ours.save_pretrained(tmp_path / "mine")
    again = IPN.from_pretrained(tmp_path / "mine")
    prompt = [Prompt.ask("What?", [picture(1)])]
    assert torch.equal(prompt_logits(ours, prompt)[0], prompt_logits(again, prompt)[0])
    held = (tmp_path / "mine" / "model.safetensors").stat().st_size
    assert held < (llava[0] / "model.safetensors").stat().st_size / 4  # neither LLM nor tower


def test_another_interaction_takes_its_place(llava: Any) -> None:
    name = f"llava:{llava[0]}"
    with pytest.raises(CheckpointError, match="no trained weights for interaction 'rvii'"):
        IPN.from_pretrained(name, interact="rvii")
    swapped = IPN.from_pretrained(name, interact="rvii", untrained=True)
    assert swapped.strategy == "rvii"
    assert swapped.config.prompt.after_image == "\n"
    assert swapped.ask(picture(1), "What?", max_new_tokens=2).tokens["dynamic"] > 0
    ours = IPN.from_pretrained(name)
    for key, value in ours.backbone.state_dict().items():
        assert torch.equal(value, swapped.backbone.state_dict()[key])


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy"),
        ({"vision_feature_layer": [-2, -1]}, "joins the vision tower's layers"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
    ],
)
def test_other_forms_are_refused_by_name(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    save(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=named):
        IPN.from_pretrained(f"llava:{tmp_path}")


def test_a_checkpoint_of_another_model_is_refused(llava: Any, tmp_path: Path) -> None:
    config = json.loads((llava[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config["text_config"]}))
    with pytest.raises(
        CheckpointError, match="holds a model of type 'llama', which llava does not"
    ):
        IPN.from_pretrained(f"llava:{tmp_path}")


def test_a_missing_tensor_is_named(llava: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for path in llava[0].iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    held = load_file(llava[0] / "model.safetensors")
    lacking = {k: v for k, v in held.items() if not k.endswith("linear_2.bias")}
    assert len(lacking) == len(held) - 1
    save_file(lacking, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor 'multi_modal_projector.linear_2.bias'"):
        IPN.from_pretrained(f"llava:{tmp_path}")


def test_wrong_names_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'llava'"):
        IPN.from_pretrained("lava:somewhere/here")
    with pytest.raises(UnknownNameError, match="not a known name"):
        IPN.from_pretrained("llava:nowhere")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((DownloadError, UnknownNameError)) as raised:
        IPN.from_pretrained("llava:some-one/some-thing")
    assert len(str(raised.value).splitlines()) == 1


def test_a_training_goes_on_from_its_tower_and_language_model(llava: Any, tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    line = {"image": "a.png", "question": "What is it?", "answer": "noise"}
    (tmp_path / "mine.jsonl").write_text(json.dumps(line) + "\n")
    made = train(
        EXAMPLE,
        [
            f"base=llava:{llava[0]}",
            f"data.0.task={tmp_path / 'mine.jsonl'}",
            "model.interact={width: 16, depth: 1, heads: 2}",
            "stages.align.steps=2",
            "precision=fp32",
        ],
        out=tmp_path / "run",
    )
    trained = IPN.from_pretrained(made)
    assert trained.strategy == "rvii"
    assert trained.config.backbone.weights == f"llava:{llava[0]}"
    original = IPN.from_pretrained(f"llava:{llava[0]}")
    for part in ("backbone", "encoder"):
        mine = getattr(trained, part).state_dict()
        for key, value in getattr(original, part).state_dict().items():
            assert torch.equal(value, mine[key]), key
    assert trained.ask(picture(1), "What is it?", max_new_tokens=2).tokens["dynamic"] == 5
