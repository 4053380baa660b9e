"""Low-rank adapters on a frozen LLM (LoRA, arXiv 2106.09685), through the package peft.

`peft` puts them into the LLM's linear layers; here they are found again as one module, so that the
adapter is trained, saved and switched off apart from the weights that it adapts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from ipn_core.errors import ConfigError, near

if TYPE_CHECKING:
    from ipn_core.config import LoraConfig

__all__ = ["Lora", "peft_reasons"]


def peft_reasons() -> list[str]:
    """Say why no adapter can be put on; empty if one can."""
    try:
        import peft  # noqa: F401
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "peft"
        why = "is not installed" if missing else f"cannot be imported ({error})"
        return [f"the package peft {why}; pip install 'ipn-core[lora]'"]
    return []


class Lora(nn.Module):
    """The weights of an adapter, in a tree that follows the modules that they adapt.

    At the start the adapted model gives what the plain one gives, because one of the two factors
    is zero.
    """

    def __init__(self, lm: nn.Module, config: LoraConfig) -> None:
        """Put an adapter with new weights into a language model, and freeze everything else in it.

        Args:
            lm: is changed in place.
            config: rank, scale, dropout and which modules.

        Raises:
            ConfigError: peft is missing, or a target names no linear layer.
        """
        super().__init__()
        if reasons := peft_reasons():
            raise ConfigError(f"backbone.lora: {'; '.join(reasons)}.")
        import peft
        from peft.tuners.lora import LoraLayer

        names = {name.rpartition(".")[2] for name, m in lm.named_modules() if _adaptable(m)}
        for target in config.targets:
            if target not in names:
                raise ConfigError(
                    f"backbone.lora.targets: '{target}' names no linear layer of this LLM"
                    f"{near(target, names)}: it has {', '.join(sorted(names))}."
                )
        wanted = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=list(config.targets),
        )
        peft.inject_adapter_in_model(wanted, lm)
        # Not registered: they stay children of the language model.
        self._layers: list[Any] = [m for m in lm.modules() if isinstance(m, LoraLayer)]
        for name, module in lm.named_modules():
            if isinstance(module, LoraLayer):
                self._plant(f"{name}.A".split("."), module.lora_A)
                self._plant(f"{name}.B".split("."), module.lora_B)
                self._plant(f"{name}.dropout".split("."), module.lora_dropout)
        # The master weights of what trains are fp32, whatever the LLM is held in.
        self.float()

    def _plant(self, path: list[str], module: nn.ModuleDict) -> None:
        """Make the one adapter of a layer reachable under its path."""
        at: nn.Module = self
        for name in path[:-1]:
            if name not in at._modules:
                at.add_module(name, nn.Module())
            at = at.get_submodule(name)
        (inner,) = module.values()
        at.add_module(path[-1], inner)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Let the language model run without the adapter inside the block."""
        trains = [(p, p.requires_grad) for p in self.parameters()]
        for layer in self._layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.enable_adapters(True)
            # peft lets every adapter train that it switches on.
            for parameter, trained in trains:
                parameter.requires_grad_(trained)


def _adaptable(module: nn.Module) -> bool:
    # Quantised layers are subclasses of it, too.
    return isinstance(module, nn.Linear)
