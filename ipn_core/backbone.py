"""What the core needs from a language model: embed, extend a cache, widths, layers, chat format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ipn_core.checkpointing import checkpointed
from ipn_core.errors import CheckpointError, ConfigError, first_line

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

    from ipn_core.config import BackboneConfig, LoraConfig
    from ipn_core.lora import Lora
    from ipn_core.plugins import Registry

__all__ = ["Backbone", "Extended", "LayerCallback", "load_tokenizer"]

LayerCallback = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, hidden (B, T, D), positions (B, T)) -> the hidden states that the layer shall read."""


@dataclass(frozen=True, eq=False)
class Extended:
    """What one forward over new tokens gave.

    Attributes:
        last: (B, T, D_out) hidden states after the final norm, what the language head reads.
        hidden: the other layers that were asked for, by index.
    """

    last: Tensor
    hidden: dict[int, Tensor]


class Backbone(nn.Module):
    """A frozen causal language model of transformers, driven through its key-value cache.

    Subclasses say where the decoder's layers are and which chat format stands in for a tokenizer
    without a template. The model stays in eval mode and without gradients while stages train.

    Attributes:
        lm: the language model.
        tokenizer: its tokenizer.
        lora: the adapter that `adapt` has put on it, or None. It may train; nothing else may.
        checkpointing: whether training keeps of each layer only its inputs, and computes the rest
            again in the backward pass.
    """

    MODEL_TYPES: ClassVar[tuple[str, ...]] = ()
    """The transformers `model_type`s that this adapter accepts."""

    TEMPLATE: ClassVar[str] = ""
    """Jinja chat template for tokenizers that have none."""

    SHARES: ClassVar[bool] = False
    """Whether the attention layers hand what the cache gives them to transformers' attention
    function as it is, so that rows may share what lies in it (`ipn_core.shared_cache`)."""

    def __init__(self, lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__()
        kind = str(lm.config.model_type)
        if self.MODEL_TYPES and kind not in self.MODEL_TYPES:
            raise ConfigError(
                f"backbone {type(self).__name__} takes {' or '.join(self.MODEL_TYPES)} models; "
                f"these weights are of type '{kind}'. Name another backbone (see 'ipn plugins')."
            )
        # Before the language model, so that its weights are called after it.
        self.register_module("lora", None)
        self.lora: Lora | None
        self.lm = lm.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.checkpointing = False
        self._refuse_checkpointing()

    # -- loading ---------------------------------------------------------------------------------

    @classmethod
    def load(cls, config: BackboneConfig, registry: Registry | None = None) -> Self:
        """Load weights and tokenizer from a known name, a folder, a hub id or an import.

        Args:
            config: names them.
            registry: where known names are looked up, by default everything installed.

        Raises:
            CheckpointError: files are missing, damaged or pickled, or the weights do not fill
                every tensor that their config asks for; these are named.
            UserError: there is nothing of that name, it is of another architecture, or this machine
                cannot hold it as the config asks.
            DownloadError: they could not be fetched.
        """
        from transformers import AutoModelForCausalLM

        from ipn_core.importing import find_import
        from ipn_core.lora import peft_reasons
        from ipn_core.plugins import get_registry
        from ipn_core.pretrained import load_named
        from ipn_core.quantization import load_options

        if config.weights is None:
            raise ConfigError(
                "backbone.weights is missing: give a name of 'ipn models list', a folder or a "
                "hub id."
            )
        what = f"the weights '{config.weights}'"
        options = load_options(config)
        if config.lora is not None and (reasons := peft_reasons()):
            raise ConfigError(f"backbone.lora: {'; '.join(reasons)}.")
        imported = find_import(config.weights, registry or get_registry())
        source: Path | str
        if imported is not None:
            if len(options) > 1:
                raise ConfigError(
                    f"{what} are a part of an imported model, which loads whole and on one device: "
                    "leave backbone.quantize and backbone.device_map out, or save it first."
                )
            lm, source = imported.language_model(**options), imported.folder
        else:
            lm, source = load_named(AutoModelForCausalLM, config.weights, what, registry, **options)
        backbone = cls(lm, load_tokenizer(source, what))
        if config.lora is not None:
            backbone.adapt(config.lora)
        return backbone

    def adapt(self, config: LoraConfig) -> None:
        """Put a low-rank adapter with new weights on the language model; it may train.

        Raises:
            ConfigError: there is one already, the package peft is missing, or a target names no
                linear layer.
        """
        from ipn_core.lora import Lora

        if self.lora is not None:
            raise ConfigError("this backbone has an adapter already; load it anew for another.")
        self.lora = Lora(self.lm, config)

    # -- sizes -----------------------------------------------------------------------------------

    @property
    def D_in(self) -> int:
        """Width of the input embeddings."""
        return int(self._embedding.shape[1])

    @property
    def D_out(self) -> int:
        """Width of the hidden states that the language head reads."""
        return int(self.lm.get_output_embeddings().weight.shape[1])

    @property
    def D_hidden(self) -> tuple[int, ...]:
        """Width of the hidden states by layer; the last entry is after the final norm."""
        width = int(self.lm.config.hidden_size)
        return (*[width] * len(self.layers), self.D_out)

    @property
    def kv_heads(self) -> int:
        """Key-value heads of each layer."""
        config = self.lm.config
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        config = self.lm.config
        width = getattr(config, "head_dim", None)
        return int(width or config.hidden_size // config.num_attention_heads)

    @property
    def max_positions(self) -> int:
        """The longest prompt plus answer that the model was built for, in tokens."""
        return int(self.lm.config.max_position_embeddings)

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The decoder's layers, first to last."""
        raise NotImplementedError

    @property
    def _embedding(self) -> Tensor:
        weight: Tensor = self.lm.get_input_embeddings().weight
        return weight

    @property
    def device(self) -> torch.device:
        """Where the inputs go."""
        return self._embedding.device

    def base_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the weights that the config names, an adapter's left out: they never train."""
        own = set() if self.lora is None else {id(p) for p in self.lora.parameters()}
        return (p for p in self.lm.parameters() if id(p) not in own)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weights are held in."""
        return self._embedding.dtype

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        found = self.lm.generation_config.eos_token_id
        if found is None:
            found = self.tokenizer.eos_token_id
        if found is None:
            return ()
        return tuple(found) if isinstance(found, (list, tuple)) else (int(found),)

    @property
    def template(self) -> str:
        """The chat template: the tokenizer's, or the family's where it has none."""
        return str(self.tokenizer.chat_template or self.TEMPLATE)

    # -- running ---------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: a frozen model must not drop units (OPT does by default).

        An adapter may, in `mode`, while it trains.
        """
        super().train(False)
        if self.lora is not None:
            self.lora.train(mode and any(p.requires_grad for p in self.lora.parameters()))
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Stay where a device map or quantization has put the weights, and as they are."""
        placed = getattr(self.lm, "hf_device_map", None) or getattr(self.lm, "is_quantized", False)
        return self if placed else super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    @property
    def words(self) -> Tensor:
        """The input embeddings (vocabulary, D_in) of all tokens; nothing learns through them."""
        table: Tensor = self.lm.get_input_embeddings().weight
        return table.detach()

    def embed(self, ids: Tensor) -> Tensor:
        """Look tokens up: ids (B, T) -> (B, T, D_in), which the caller may write into."""
        embedded: Tensor = self.lm.get_input_embeddings()(ids)
        return embedded

    def new_cache(self) -> Cache:
        """Return an empty key-value cache for this model."""
        from transformers import DynamicCache

        from ipn_core.growing_cache import growing

        return growing(DynamicCache(config=self.lm.config))

    @property
    def shares(self) -> bool:
        """Whether rows may share what lies in the cache now: nothing is learned through it."""
        kind = getattr(self.lm.config, "_attn_implementation", None)
        return self.SHARES and kind in ("sdpa", "eager") and not torch.is_grad_enabled()

    def extend(
        self,
        embeds: Tensor,
        cache: Cache,
        positions: Tensor,
        mask: Tensor | None,
        layers: Sequence[int] = (),
    ) -> Extended:
        """Run the model over new tokens only and keep their keys and values.

        Args:
            embeds: (B, T, D_in) the new tokens.
            cache: holds the C tokens before them; grows to C + T.
            positions: (B, T) position of each new token, padding not counted.
            mask: (B, C + T) True for real tokens, None if all are.
            layers: further hidden layers to return, counted as transformers does.
        """
        from ipn_core.shared_cache import reading

        self._refuse_checkpointing()
        before = int(cache.get_seq_length())
        count = len(self.layers)
        inner = sorted({i % (count + 1) for i in layers} - {count})
        again = self.checkpointing and torch.is_grad_enabled()
        with checkpointed(self.layers, cache) if again else reading(self.lm, cache):
            output = self.lm.base_model(
                inputs_embeds=embeds,
                attention_mask=None if mask is None else mask.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                output_hidden_states=bool(inner),
            )
        after = int(cache.get_seq_length())
        if after != before + embeds.shape[1]:
            raise AssertionError(
                f"the key-value cache went from {before} to {after} tokens over a segment of "
                f"{embeds.shape[1]}; something between the layers dropped it"
            )
        # With a device map the last layers may lie elsewhere; what comes out is where it went in.
        hidden = {i: output.hidden_states[i].to(embeds.device) for i in inner}
        return Extended(output.last_hidden_state.to(embeds.device), hidden)

    @property
    def takes_keys(self) -> bool:
        """Whether `remember` works: whether the family says how keys carry their positions."""
        return type(self).place_keys is not Backbone.place_keys

    def place_keys(self, keys: Tensor, positions: Tensor) -> Tensor:
        """Give keys the code of their positions, as far as this family keeps it in the cache.

        Args:
            keys: (B, layers, C, H_kv, D_head) as the layers' key projections give them.
            positions: (B, C) where they stand.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not say how keys carry positions; override place_keys"
        )

    def remember(self, keys: Tensor, values: Tensor, positions: Tensor, cache: Cache) -> None:
        """Put keys and values straight into a cache, for tokens that are never processed.

        Args:
            keys: (B, layers, C, H_kv, D_head) without positions.
            values: the same shape.
            positions: (B, C) where they stand.
            cache: holds something already; grows by C.
        """
        before = int(cache.get_seq_length())
        placed, values = self.place_keys(keys, positions).transpose(2, 3), values.transpose(2, 3)
        for layer in range(len(self.layers)):
            held: Any = cache.layers[layer]
            cache.update(placed[:, layer].to(held.keys), values[:, layer].to(held.values), layer)
        grown = {int(cache.get_seq_length(layer)) - before for layer in range(len(self.layers))}
        if grown != {keys.shape[2]}:
            raise AssertionError(
                f"the key-value cache grew by {grown} over {keys.shape[2]} positions"
            )

    def logits(self, last: Tensor) -> Tensor:
        """Apply the language head: (…, D_out) -> (…, vocabulary), in fp32."""
        scores: Tensor = self.lm.get_output_embeddings()(last)
        return scores.to(last.device).float()

    @contextmanager
    def layer_callback(self, layers: Sequence[int], callback: LayerCallback) -> Iterator[None]:
        """Let `callback` change what chosen layers read, in every forward inside the block.

        It works alike in prefill, decoding and beam search, because it hangs on the layers.
        """

        def hook(index: int) -> Any:
            def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
                hidden = args[0] if args else kwargs["hidden_states"]
                here = self.device
                changed = callback(index, hidden.to(here), kwargs["position_ids"].to(here))
                changed = changed.to(hidden.device)
                if args:
                    return (changed, *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": changed}

            return before

        handles = [
            self.layers[i].register_forward_pre_hook(hook(i), with_kwargs=True) for i in layers
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _refuse_checkpointing(self) -> None:
        # With gradient checkpointing transformers drops the cache in train mode: the prefix would
        # silently vanish from the second segment.
        if any(getattr(m, "gradient_checkpointing", False) for m in self.lm.modules()):
            raise ConfigError(
                "the backbone has transformers' gradient checkpointing on, which empties the "
                "key-value cache: call gradient_checkpointing_disable() on it. 'checkpointing: "
                "true' in a training keeps the cache."
            )


def load_tokenizer(source: Path | str, what: str, inner: str = "") -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies beside some weights.

    Args:
        source: a folder or a hub id.
        what: names the weights in errors, such as "the weights 'smollm2'".
        inner: the folder in it where the tokenizer's files lie.

    Raises:
        CheckpointError: there is none, or it is damaged.
        UserError: the hub has no such repository, or cannot be reached.
    """
    from transformers import AutoTokenizer

    from ipn_core.locate import hub_error

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, subfolder=inner, trust_remote_code=False
        )
        return tokenizer
    except Exception as error:
        found = hub_error(what, error, source) if isinstance(source, str) else None
        why = first_line(error).rstrip(".")
        if isinstance(source, Path) and not any((source / inner).glob("*token*")):
            why = f"there is none in '{source / inner}'"
        raise found or CheckpointError(
            f"the tokenizer of {what} cannot be loaded: {why}. Put the files beside the weights "
            "that its save_pretrained writes, such as tokenizer.json."
        ) from error
