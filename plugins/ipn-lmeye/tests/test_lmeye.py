"""The interaction `lmeye`: its contract, and the released code's steps on CLIP itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ipn_lmeye.lmeye import LMEye, LMEyeConfig
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPVisionConfig

from ipn_core.errors import CheckpointError, ConfigError, UnknownNameError
from ipn_core.features import VisualFeatures
from ipn_core.model import IPN
from ipn_core.prompt import Prompt
from ipn_core.stages import Dims, InjectContext, Request
from ipn_core.testing.contracts import InteractionContract
from ipn_core.testing.oracles import assert_same, record_oracle
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig, tiny_backbone, tiny_picture
from ipn_core.training.checks import check_gradients
from ipn_core.training.parameters import choose

TEXT = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
    "projection_dim": 20,
    "bos_token_id": 58,
    "eos_token_id": 59,
}
VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 20,
}
DIMS = Dims(Dv=18, D_in=32, D_hidden=(32, 32), D_out=32, K=5, D_request=32)


class TestLMEye(InteractionContract):
    name = "lmeye"
    options = {"width": 16, "depth": 2, "heads": 4}  # noqa: RUF012 the contract declares it


def clip_model() -> CLIPModel:
    """A whole CLIP model, every number random, biases and norms too."""
    torch.manual_seed(3)
    clip = CLIPModel(
        CLIPConfig(
            text_config=CLIPTextConfig(**TEXT),
            vision_config=CLIPVisionConfig(**VISION),
            projection_dim=20,
        )
    )
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return clip.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CLIP's weights on the disk."""
    made = tmp_path_factory.mktemp("clip")
    clip_model().save_pretrained(made)
    return made


def build(folder: Path, dims: Dims = DIMS) -> LMEye:
    torch.manual_seed(1)
    return LMEye(LMEyeConfig(weights=str(folder)), dims).eval()


def q_former(lengths: tuple[int, ...]) -> VisualFeatures:
    """Tokens of a row for each sample, as a Q-Former makes them; none where the length is 0."""
    torch.manual_seed(4)
    shown = [(row, n) for row, n in enumerate(lengths) if n]
    return VisualFeatures.pack(
        [torch.randn(n, DIMS.Dv) for _, n in shown],
        [(1, n) for _, n in shown],
        [row for row, _ in shown],
        len(lengths),
    )


def released(ours: LMEye, request: Tensor, tokens: Tensor) -> Tensor:
    """The steps of the released code for one sample: `CLIPTextModel` itself does the rest.

    Args:
        request: (D,) the hidden state at `<img-q>`.
        tokens: (P, Dv) the Q-Former's outputs.
    """
    clip, K = clip_model(), DIMS.K
    # Its text is as many exclamation marks as there are tokens in between, and only counts them.
    ids = torch.tensor([[58] + [7] * (len(tokens) + K) + [59]])
    base = clip.text_model.embeddings(ids)
    pre_query = ours.ask(request[None]).view(1, K, -1)
    query_output = ours.see(tokens[None])
    hidden_states = torch.cat([base[:, :1], query_output, pre_query, base[:, -1:]], dim=1)
    clip.text_model.embeddings.register_forward_hook(lambda *_: hidden_states)
    output = clip.text_model(input_ids=ids).last_hidden_state
    assert output.shape[1] == len(tokens) + K + 2
    return clip.text_projection(output[:, -K:])[0]


@pytest.mark.parametrize("lengths", [(32,), (32, 32), (32, 7, 0, 1)])
def test_it_does_the_released_steps(
    folder: Path, lengths: tuple[int, ...], record_property: Any
) -> None:
    model, seen = build(folder), q_former(lengths)
    asked = Request(torch.randn(len(lengths), 1, 32))
    message = model(asked, seen).values
    assert message.shape == (len(lengths), 5, 20)
    patches, mask = seen.padded()
    for row in range(len(lengths)):
        expected = released(model, asked.values[row, 0], patches[row][mask[row]])
        worst = assert_same([message[row].detach()], [expected.detach()])
        record_oracle(record_property, "lmeye", "the released steps on `CLIPTextModel`", worst)


def test_the_last_five_are_four_requests_and_the_end(folder: Path) -> None:
    # A change of the k-th request token moves the outputs from its own place on: the first is
    # not among the outputs, and moves all of them.
    model, seen = build(folder), q_former((32,))
    asked = Request(torch.randn(1, 1, 32))
    before = model(asked, seen).values
    for token in range(5):
        with torch.no_grad():
            model.ask.bias[24 * token] += 5
        moved = (model(asked, seen).values - before)[0].abs().amax(-1) > 1e-4
        assert moved.tolist() == [place >= token - 1 for place in range(5)]
        with torch.no_grad():
            model.ask.bias[24 * token] -= 5


def test_past_the_last_position_the_end_token_stays_there(folder: Path) -> None:
    model = build(folder)  # 48 positions, and 41 + 5 + 1 is the last of them
    asked = Request(torch.randn(1, 1, 32))
    ends = [model._ends(q_former((n,)))[1] for n in (40, 41, 42, 60)]
    assert not torch.equal(ends[0], ends[1])
    assert torch.equal(ends[1], ends[2])
    assert torch.equal(ends[1], ends[3])
    assert model(asked, q_former((60,))).values.isfinite().all()


def test_the_injector_adds_one_linear_map_to_the_slots() -> None:
    model = assemble()
    linear = model.injector.linear
    assert isinstance(model.injector.norm, nn.Identity)
    seen, asked = model.perceive([[picture()]], ["?"]).features, Request(torch.randn(1, 1, 32))
    message = model.interaction(asked, seen)
    slots = model.slots.dynamic
    tokens = model.injector(message, InjectContext(slots)).tokens
    expected = message.values @ linear.weight.T + linear.bias + slots
    torch.testing.assert_close(tokens, expected)


def picture() -> Image.Image:
    return tiny_picture(5, (48, 24))


def assemble(**interact: Any) -> IPN:
    torch.manual_seed(0)
    small: dict[str, Any] = interact or {"width": 16, "depth": 1, "heads": 2}
    return IPN.from_config(
        {"strategy": "lmeye", "backbone": "tiny", "encoder": "tiny", "interact": small},
        backbone=tiny_backbone("llama"),
        encoder=TinyEncoder(TinyEncoderConfig()),
    )


def learn(model: IPN) -> dict[str, nn.Parameter]:
    """Train a model as far as the first backward pass, and return what is trained."""
    chosen = choose(model, ["interact", "inject", "slots.request", "slots.dynamic"])
    model.train()
    loss, _ = model([Prompt.ask("What is it?", [picture()]).then_assistant("a dog", learn=True)])
    loss.backward()
    check_gradients(model, chosen)
    return chosen


def test_a_named_encoder_is_frozen_and_in_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    model = assemble(weights=str(folder))
    chosen = learn(model)
    assert sorted(n for n in chosen if n.startswith("interaction.")) == [
        "interaction.ask.bias",
        "interaction.ask.weight",
        "interaction.see.bias",
        "interaction.see.weight",
    ]
    assert not model.interaction.clip.training
    assert model.interaction.training
    torch.optim.SGD(chosen.values(), 0.1).step()
    for name, tensor in clip_model().text_model.state_dict().items():
        assert torch.equal(model.interaction.clip.text_model.state_dict()[name], tensor), name
    assert not any("clip" in name for name in model.trained_state())
    model.eval().save_pretrained(tmp_path)
    again = IPN.from_pretrained(tmp_path, backbone=model.backbone, encoder=model.encoder)
    assert again.config.interact.options == {"weights": str(folder)}
    asked, seen = Request(torch.randn(1, 1, 32)), model.perceive([[picture()]], ["?"]).features
    assert torch.equal(again.interaction(asked, seen).values, model.interaction(asked, seen).values)
    with pytest.raises(ConfigError, match=r"'interact\.clip' names nothing that can be trained"):
        choose(model, ["interact.clip"])


def test_a_new_encoder_is_trained_and_saved(tmp_path: Path) -> None:
    model = assemble()
    assert {n for n in model.trained_state() if "clip" in n} <= set(learn(model))
    model.eval().save_pretrained(tmp_path)
    again = IPN.from_pretrained(tmp_path, backbone=model.backbone, encoder=model.encoder)
    one, other = (m.ask(picture(), "What is it?", max_new_tokens=4).ids for m in (model, again))
    assert one == other


def test_several_request_tokens_are_read_together(folder: Path) -> None:
    model, seen = build(folder, replace(DIMS, R=3)), q_former((32,))
    asked = torch.randn(1, 3, 32)
    before = model(Request(asked), seen).values
    for place in range(3):
        other = asked.clone()
        other[:, place] += 1
        assert (model(Request(other), seen).values - before).abs().max() > 1e-4


def test_wrong_configs_and_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="weights bring their own sizes: leave out heads, width"):
        LMEyeConfig.parse({"weights": "a/b", "width": 8, "heads": 2}, "interact")
    with pytest.raises(ConfigError, match="width must be a multiple of heads, got 10 and 4"):
        LMEyeConfig.parse({"width": 10}, "interact")
    with pytest.raises(UnknownNameError, match="unknown weights 'clip'"):
        build(Path("clip"))
    CLIPTextModel(CLIPTextConfig(**TEXT)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"do not fit.*missing text_projection\.weight"):
        build(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"are pickled \(pytorch_model\.bin\)"):
        build(tmp_path)
