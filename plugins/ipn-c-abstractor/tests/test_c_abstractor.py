"""The connector `c-abstractor`: its contract, and the published sizes and steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ipn_c_abstractor.abstractor import CAbstractor, CAbstractorConfig
from ipn_c_abstractor.blocks import ResidualBlock
from PIL import Image
from torch import Tensor

from ipn_core.errors import ConfigError
from ipn_core.features import VisualFeatures
from ipn_core.model import IPN
from ipn_core.prompt import Prompt
from ipn_core.stages import Dims, PerceiveContext
from ipn_core.testing.contracts import ConnectorContract
from ipn_core.testing.oracles import record_oracle
from ipn_core.testing.tiny import TinyEncoder, TinyEncoderConfig, tiny_backbone
from ipn_core.training.checks import check_gradients
from ipn_core.training.parameters import choose

NOTHING = PerceiveContext([], [])
SMALL: dict[str, Any] = {"tokens": 4, "depth": 2, "hidden": 12, "grid": 3}


class TestCAbstractor(ConnectorContract):
    name = "c-abstractor"
    options = SMALL


class TestWidthKept(ConnectorContract):
    """As many channels as the features have: then the shortcuts are the input itself."""

    name = "c-abstractor"
    options = {"tokens": 9, "depth": 1, "hidden": 20, "mlp": 1, "grid": 4}  # noqa: RUF012 as declared


def build(width: int = 8, llm: int = 10, **options: Any) -> CAbstractor:
    """A small one whose every number is random."""
    torch.manual_seed(0)
    dims = Dims(Dv=width, D_in=llm, D_hidden=(llm, llm), D_out=llm)
    encoder = TinyEncoder(TinyEncoderConfig(width=width))
    config = CAbstractorConfig.parse({**SMALL, **options}, "perceive")
    model = CAbstractor(config, dims, encoder).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def picture(grid: tuple[int, int], width: int = 8, seed: int = 0) -> VisualFeatures:
    values = torch.randn(
        grid[0] * grid[1], width, generator=torch.Generator().manual_seed(seed + 100 * grid[1])
    )
    return VisualFeatures.pack([values], [grid], [0], 1)


# -- the published sizes -------------------------------------------------------------------------
# Honeybee's released configuration (khanrc/honeybee at 68a8d84, configs/model_config/c-abs.yaml:
# depth 3, mlp_depth 2, hidden_size 1024, pos_emb, no prenorm, no eos tokens) over CLIP ViT-L/14 at
# 224 pixels, whose 256 patches are 1024 wide, for a 4096 wide LLM. No parameter count is published
# that we could find (the released training prints one, and no output of it is there); the expected
# counts are those of what the released code builds with the timm 0.9.8 that it asks for.


def published_block(C: int) -> int:
    """Weights of a block of C channels in and out: 2.5·C² + 16.25·C."""
    pointwise = 2 * C * C  # 1 × 1 in, 1 × 1 out, no bias
    depthwise = 9 * C  # 3 × 3, each channel by itself, no bias
    gate = C * (C // 4) + C // 4 + (C // 4) * C + C  # two layers with biases
    norms = 3 * 2 * C
    return pointwise + depthwise + gate + norms


@pytest.mark.parametrize(
    ("tokens", "grid", "llm", "expected"),
    [
        (144, 16, 4096, 37_070_336),  # Honeybee-C-7B-M144: 224 pixels, Vicuna 7B
        (256, 16, 4096, 37_070_336),  # more tokens: the pooling has no weights
        (256, 24, 5120, 47_885_824),  # CLIP ViT-L/14 at 336 pixels, Vicuna 13B
        (576, 24, 5120, 47_885_824),  # a token a patch
    ],
)
def test_the_published_sizes(tokens: int, grid: int, llm: int, expected: int) -> None:
    count = 6 * published_block(1024)  # three before the pooling, three after it
    count += grid**2 * 1024  # a position a patch
    count += 1024 * llm + llm + llm * llm + llm  # two linear layers
    assert count == expected
    encoder = TinyEncoder(TinyEncoderConfig())
    dims = Dims(Dv=1024, D_in=llm, D_hidden=(llm, llm), D_out=llm)
    config = CAbstractorConfig(tokens=tokens, grid=grid)
    with torch.device("meta"):
        model = CAbstractor(config, dims, encoder)
        values = torch.empty(grid**2, 1024)
    theirs = {id(p) for p in encoder.parameters()}
    assert sum(p.numel() for p in model.parameters() if id(p) not in theirs) == count
    shapes: list[tuple[int, ...]] = []
    for part in (model.before, model.after):
        part.register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape)))
    seen = VisualFeatures.pack([values], [(grid, grid)], [0], 1)
    (found,) = model.connect(seen, NOTHING)
    side = int(tokens**0.5)
    assert shapes == [(1, 1024, grid, grid), (1, 1024, side, side)]
    assert found.shape == (tokens, llm)


def test_the_defaults_are_the_published_ones() -> None:
    assert CAbstractorConfig().model_dump() == {
        "tokens": 144,
        "depth": 3,
        "hidden": 1024,
        "mlp": 2,
        "grid": 16,
    }


# -- the published steps -------------------------------------------------------------------------


def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Layer norm over the channels of (C, h, w)."""
    apart = x - x.mean(0)
    unit = apart / (apart.square().mean(0) + 1e-5).sqrt()
    return unit * weight[:, None, None] + bias[:, None, None]


def silu(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def by_hand(block: ResidualBlock, x: Tensor) -> Tensor:
    """One block of RegNet on a map (C, h, w), from its equations."""
    own = dict(block.named_parameters())

    def pointwise(part: str, y: Tensor) -> Tensor:
        y = torch.einsum("oi,ihw->ohw", own[f"{part}.0.weight"][:, :, 0, 0], y)
        return norm(y, own[f"{part}.1.weight"], own[f"{part}.1.bias"])

    y = silu(pointwise("reduce", x))
    h, w = y.shape[1:]
    around = F.pad(y, (1, 1, 1, 1))
    kernel = own["mix.0.weight"]  # (C, 1, 3, 3)
    y = sum(
        kernel[:, 0, i, j, None, None] * around[:, i : i + h, j : j + w]
        for i in range(3)
        for j in range(3)
    )
    y = silu(norm(y, own["mix.1.weight"], own["mix.1.bias"]))
    inner = silu(own["gate.0.weight"] @ y.mean((1, 2)) + own["gate.0.bias"])
    y = y * (own["gate.2.weight"] @ inner + own["gate.2.bias"]).sigmoid()[:, None, None]
    same = "shortcut.0.weight" not in own
    return silu(pointwise("expand", y) + (x if same else pointwise("shortcut", x)))


@pytest.mark.parametrize("hidden", [8, 12])
@pytest.mark.parametrize(("grid", "n"), [((4, 4), 2), ((4, 6), 2), ((6, 3), 3)])
def test_the_published_steps(hidden: int, grid: tuple[int, int], n: int) -> None:
    model = build(hidden=hidden, grid=4, tokens=n * n)
    seen = picture(grid)
    positions = model._positions(grid)
    x = (seen.values + positions).T.reshape(8, *grid)
    for block in model.before:
        x = by_hand(block, x)
    h, w = grid[0] // n, grid[1] // n
    cells = [
        x[:, r * h : (r + 1) * h, c * w : (c + 1) * w].mean((1, 2))
        for r in range(n)
        for c in range(n)
    ]
    x = torch.stack(cells, dim=1).reshape(hidden, n, n)
    for block in model.after:
        x = by_hand(block, x)
    first, last = model.mlp[0], model.mlp[2]
    tokens = silu(x.flatten(1).T @ first.weight.T + first.bias) @ last.weight.T + last.bias
    torch.testing.assert_close(model.connect(seen, NOTHING)[0], tokens, rtol=1e-4, atol=1e-5)


def wave(start: float, *shape: int) -> Tensor:
    """Numbers that stand for weights, the same on every machine."""
    count = torch.Size(shape).numel()
    return torch.sin(start + 0.7 * torch.arange(count, dtype=torch.float64) ** 1.1).reshape(shape)


def test_the_released_code_says_the_same(record_property: Any) -> None:
    """What `CAbstractor` of khanrc/honeybee at 68a8d84 gave, on timm 0.9.8, for these weights.

    Its names of ours: `net.0` and `net.2` are `before` and `after`, `b1` the block 0, `conv1` to
    `conv3` are `reduce`, `mix` and `expand`, `se` is `gate`, `readout` is `mlp`.
    """
    model = build(6, 5, tokens=4, depth=2, hidden=8, grid=4).double()
    mine = {k: p for k, p in model.named_parameters() if not k.startswith("encoder.")}
    with torch.no_grad():
        for index, name in enumerate(sorted(mine)):
            mine[name].copy_(wave(index, *mine[name].shape))
    seen = VisualFeatures.pack([wave(0.5, 16, 6)], [(4, 4)], [0], 1)
    released = [
        [-1.670927107, 2.670790705, 2.466661210, 0.233161276, -1.688525881],
        [-1.268634067, 3.268393074, 2.008198584, -0.716124049, -2.020550368],
        [-1.425389677, 3.756686237, 2.085956153, -1.111563327, -2.374224258],
        [-1.584321976, 2.794628108, 2.395323652, 0.036255525, -1.791100176],
    ]
    (found,) = model.connect(seen, NOTHING)
    expected = torch.tensor(released, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    worst = float((found - expected).abs().max() / expected.abs().max())
    record_oracle(record_property, "c-abstractor", "recorded tokens of the released code", worst)


# -- ours: any grid ------------------------------------------------------------------------------


def test_positions_follow_the_grid_of_each_picture() -> None:
    model = build(grid=4)
    assert model._positions((4, 4)) is model.positions
    with torch.no_grad():  # a slope from left to right in the first channel, flat in the others
        model.positions.zero_()
        model.positions.view(4, 4, -1)[:, :, 0] = torch.arange(4.0)
    for h, w in ((2, 4), (4, 8), (7, 5), (1, 4)):
        found = model._positions((h, w)).reshape(h, w, -1)
        torch.testing.assert_close(found, found[:1].expand(h, -1, -1))  # no slope downwards
        assert (found[0, 1:, 0] > found[0, :-1, 0]).all()
        assert not found[:, :, 1:].any()
    torch.testing.assert_close(model._positions((2, 4))[:4, 0], torch.arange(4.0))


def test_a_coarser_grid_leaves_no_position_out() -> None:
    model = build(grid=9)
    model._positions((1, 1)).sum().backward()
    assert (model.positions.grad > 0).all()


@pytest.mark.parametrize("grid", [(1, 1), (2, 9), (1, 32), (5, 5)])
def test_grids_of_any_sides_give_n_by_n(grid: tuple[int, int]) -> None:
    found = build().connect(picture(grid), NOTHING)[0]
    assert found.shape == (4, 10)
    assert found.isfinite().all()


def test_pictures_of_one_grid_go_through_together_and_shared_ones_once() -> None:
    model = build()
    grids = [(3, 3), (2, 4), (3, 3), (2, 4)]
    values = [picture(g, seed=i).values for i, g in enumerate(grids)]
    seen = VisualFeatures.pack(values, grids, [0, 0, 1, 2], 3).select([2, 0, 1, 0])
    calls: list[tuple[int, ...]] = []
    for part in (model.before, model.after):
        part.register_forward_hook(lambda m, args, out: calls.append(tuple(args[0].shape)))
    found = model.connect(seen, NOTHING)
    assert calls == [(2, 8, 2, 4), (2, 8, 3, 3), (4, 12, 2, 2)]
    order = [3, 0, 1, 2, 0, 1]
    for tokens, index in zip(found, order, strict=True):
        (alone,) = model.connect(picture(grids[index], seed=index), NOTHING)
        torch.testing.assert_close(tokens, alone, rtol=1e-4, atol=1e-5)
    assert found[1] is found[4]  # the same tensor, which is what sharing goes by
    assert model.connect(VisualFeatures.pack([torch.zeros(0, 8)], [], [], 2), NOTHING) == []


def test_configs_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match="must be a square number, such as 100 or 121, got 120"):
        build(tokens=120)
    with pytest.raises(ConfigError, match=r"unknown key 'perceive\.dept'.*did you mean 'depth'"):
        build(dept=2)


# -- in a model ----------------------------------------------------------------------------------


def test_it_learns_is_saved_and_answers_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = IPN.from_config(
        {
            "strategy": "c-abstractor",
            "backbone": "tiny",
            "encoder": "tiny",
            "perceive": {"tokens": 4, "depth": 1, "hidden": 8, "grid": 4},
        },
        backbone=tiny_backbone("llama"),
        encoder=TinyEncoder(TinyEncoderConfig()),
    )
    assert model.strategy == "c-abstractor"
    assert model.perceiver.static_tokens == 4
    wide, tall = Image.new("RGB", (48, 24), (200, 40, 10)), Image.new("RGB", (20, 40), (9, 99, 9))
    chosen = choose(model, ["perceive", "slots.image"])
    prompt = Prompt.ask("What is it?", [wide, tall]).then_assistant("a dog", learn=True)
    loss, _ = model.train()([prompt])
    loss.backward()
    check_gradients(model, chosen)
    torch.optim.SGD(chosen.values(), 0.01).step()
    model.eval().save_pretrained(tmp_path)
    again = IPN.from_pretrained(tmp_path, backbone=model.backbone, encoder=model.encoder)
    one, other = (m.ask(wide, "What is it?", max_new_tokens=4) for m in (model, again))
    assert one.ids == other.ids
    for mine, theirs in zip(
        model.perceive([[wide, tall]], ["?"]).tokens,
        again.perceive([[wide, tall]], ["?"]).tokens,
        strict=True,
    ):
        assert torch.equal(mine, theirs)
