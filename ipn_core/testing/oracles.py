"""For oracles: what a model of ours computes, to be held against the original's own forward."""

from __future__ import annotations

import contextlib
import copy
import io
import re
import shutil
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ipn_core.testing.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from PIL import Image
    from transformers import PreTrainedTokenizerBase

    from ipn_core.model import IPN
    from ipn_core.prompt import Prompt

__all__ = [
    "assert_same",
    "bert_tokenizer",
    "command_answer",
    "llama_tokenizer",
    "prompt_logits",
    "randomise",
    "record_oracle",
    "rename_tensors",
    "tokenizer_with",
]

TOLERANCE = 1e-4
"""Of the largest expected value."""


@torch.no_grad()
def prompt_logits(model: IPN, prompts: Sequence[Prompt]) -> list[Tensor]:
    """Run prompts as one batch through the engine.

    Returns:
        For each prompt (T, vocabulary) in fp32, one row a position. In a batch, what the prompts
        begin with may be missing: the engine runs it once for all of them.
    """
    plans = [model.planner.plan(prompt) for prompt in prompts]
    percept = model.perceive([p.images for p in plans], [p.question for p in plans])
    prefix = model.engine.prefix(plans, percept)
    mask = torch.cat([prefix.state.mask, prefix.mask], dim=1)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -prefix.mask.shape[1] :]
    with model.engine.layers(prefix.state, percept):
        out = model.backbone.extend(prefix.embeds, prefix.state.cache, positions, mask)
    logits = model.backbone.logits(out.last)
    return [row[real] for row, real in zip(logits, prefix.mask, strict=True)]


def command_answer(model: str, image: Image.Image, question: str, folder: Path) -> str:
    """Return what `ipn ask IMAGE QUESTION --model MODEL` prints.

    Args:
        model: as a user names it, such as "llava:SOURCE".
        image: is saved first.
        question: is asked.
        folder: for the picture.

    Raises:
        AssertionError: the command fails.
    """
    from ipn_core.cli import main

    image.save(folder / "asked.png")
    out, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(told):
        code = main(["ask", str(folder / "asked.png"), question, "--model", model])
    assert code == 0, told.getvalue()
    return out.getvalue().removesuffix("\n")


def assert_same(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Compare what two implementations compute, such as the logits of prompts.

    Args:
        got: (T, width) each, such as from `prompt_logits`.
        expected: the original's, of at least as many positions; they end together.

    Returns:
        The largest difference, as a fraction of the largest expected value.

    Raises:
        AssertionError: it is over `TOLERANCE`.
    """
    worst = 0.0
    for ours, theirs in zip(got, expected, strict=True):
        assert 0 < len(ours) <= len(theirs), (ours.shape, theirs.shape)
        tail = theirs[-len(ours) :].float()
        assert ours.shape == tail.shape, (ours.shape, tail.shape)
        worst = max(worst, float((ours - tail).abs().max() / tail.abs().max()))
    assert worst <= TOLERANCE, f"they differ by {worst:.1e} of the largest value"
    return worst


def record_oracle(
    record_property: Callable[[str, object], None], strategy: str, original: str, difference: float
) -> None:
    """Record in pytest's report what a strategy was held against, for the table of strategies.

    Args:
        record_property: pytest's fixture.
        strategy: the strategy.
        original: what computed the expected values, such as a class of transformers.
        difference: the largest, as a fraction of the largest expected value.
    """
    record_property("oracle", f"{strategy} | {original} | {difference:.2e}")


def rename_tensors(folder: Path, target: Path, rules: Sequence[tuple[str, str]]) -> None:
    """Copy a checkpoint of one file with its tensors renamed, as another version had them.

    Args:
        folder: of the checkpoint.
        target: is made.
        rules: regular expressions and what replaces them; of each name the first that is in it.

    Raises:
        AssertionError: a rule fits no name.
    """
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    used, renamed = set(), {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        rule = next((rule for rule in rules if re.search(rule[0], name)), ("$", ""))
        used.add(rule)
        renamed[re.sub(*rule, name, count=1)] = tensor
    assert used >= set(rules), f"no name for {set(rules) - used}"
    save_file(renamed, target / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0, scale: float = 0.2) -> None:
    """Add noise to every parameter: what starts at zero or one would hide a mistake."""
    noise = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.add_(scale * torch.randn(parameter.shape, generator=noise))


def llama_tokenizer(*specials: str, bos: str = "<s>", pad: str = "<pad>") -> Any:
    """Return a tokenizer of characters that treats spaces as LLaMA's does.

    It puts `bos` before a text, and a space before the text's first word alone.

    Args:
        specials: further special tokens, such as "<image>".
        bos: what begins a text, one of its words.
        pad: what fills up.
    """
    from transformers import LlamaTokenizer

    letters = string.ascii_letters + string.digits + "?,.:'"
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters, "▁"]
    tokenizer = LlamaTokenizer(
        {word: i for i, word in enumerate(words)},
        [],
        bos_token=bos,
        unk_token="<unk>",
        add_bos_token=True,
    )
    tokenizer.add_special_tokens({"pad_token": pad, "additional_special_tokens": list(specials)})
    return tokenizer


def bert_tokenizer() -> Any:
    """Return a tokenizer of characters that treats texts as BERT's uncased one does.

    It cuts long texts on the left, as that of InstructBLIP's Q-Former does.
    """
    from transformers import BertTokenizer

    letters = string.ascii_lowercase + string.digits + "?,.'"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    return BertTokenizer({word: i for i, word in enumerate(words)}, truncation_side="left")


def tokenizer_with(folder: Path, *specials: str, chat: bool = False) -> PreTrainedTokenizerBase:
    """Save the tiny tokenizer with further special tokens, as a real checkpoint has them.

    Args:
        folder: the checkpoint's.
        specials: such as "<image>".
        chat: whether it has a chat template.
    """
    tokenizer: Any = copy.deepcopy(tiny_tokenizer(chat=chat))
    tokenizer.add_special_tokens({"additional_special_tokens": list(specials)})
    tokenizer.save_pretrained(folder)
    found: PreTrainedTokenizerBase = tokenizer
    return found
