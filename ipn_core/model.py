"""`IPN`: a backbone and four stages, and the ways to ask it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import pluggy
import torch
from torch import Tensor, nn

from ipn_core.answer import Answer, Answers
from ipn_core.clock import Clock
from ipn_core.config import BackboneConfig, ComponentConfig, IPNConfig
from ipn_core.dialogue import Dialogue
from ipn_core.engine import Engine
from ipn_core.errors import (
    ConfigError,
    IPNError,
    PromptError,
    ShapeError,
    StageError,
    near,
)
from ipn_core.faults import naming, ran
from ipn_core.fitting import check_fit, declared, refuse, sizes
from ipn_core.generate import decode
from ipn_core.hooks import PROJECT, StageSpec
from ipn_core.images import load_image
from ipn_core.look_again import LookHead
from ipn_core.plan import Planner
from ipn_core.plugins import Registry, get_registry
from ipn_core.prompt import Prompt
from ipn_core.slots import Slots, request_words
from ipn_core.stages import (
    Connector,
    Dims,
    Injector,
    Interaction,
    PerceiveContext,
    Perceiver,
    Percept,
    Requester,
    VisionEncoder,
)
from ipn_core.subject import Subject
from ipn_core.tasks import Picture
from ipn_core.vocabulary import Vocabulary

if TYPE_CHECKING:
    from ipn_core.backbone import Backbone
    from ipn_core.features import VisualFeatures
    from ipn_core.prefixes import PrefixCache

__all__ = ["IPN"]


class IPN(nn.Module):
    """A frozen language model that can look at pictures.

    Attributes:
        config: everything that makes the model, resolved.
        backbone: the LLM; frozen.
        perceiver, requester, interaction, injector: the four stages; requester and interaction
            are None for strategies without a round, and so is the injector unless it works
            between the layers.
        slots: the learned embeddings of `<img>`, `<img-q>`, `<img-d>`.
        look_head: decides whether to look again; None unless `layout.look_again`.
        pm: the model's own plugin manager; wrap a stage by registering a wrapper on it.
        name: what the model was loaded as, for reports.

    Raises:
        ConfigError: the parts do not fit together.
    """

    def __init__(
        self,
        config: IPNConfig,
        backbone: Backbone,
        perceiver: Perceiver,
        requester: Requester | None = None,
        interaction: Interaction | None = None,
        injector: Injector | None = None,
        name: str = "",
        registry: Registry | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.perceiver = perceiver
        self.requester = requester
        self.interaction = interaction
        self.injector = injector
        self.name = name
        self._registry = registry
        check_fit(self)
        vocabulary = Vocabulary.of(backbone)
        with self.driving("embed"):
            words = request_words(vocabulary, config.layout)
        self.slots = Slots(
            config.layout.request,
            config.layout.dynamic,
            backbone.lm.get_input_embeddings().weight,
            words,
        ).to(backbone.device)
        self.look_head: LookHead | None = None
        if config.layout.look_again:
            self.look_head = LookHead(backbone.D_out).to(backbone.device)
        self.pm = pluggy.PluginManager(PROJECT)
        self.pm.add_hookspecs(StageSpec)
        for part in (self.encoder, *self.borrowed):
            part.requires_grad_(False)
        for stage in (perceiver, requester, interaction, injector):
            if stage is not None:
                with self.driving("embed"):
                    stage.meet(vocabulary)
                stage.to(backbone.device)
                self.pm.register(stage)
        self.planner = Planner(
            backbone.tokenizer, backbone.template, config.layout, config.prompt, backbone.eos_ids
        )
        self.engine = Engine(self)
        self.eval()

    # -- building --------------------------------------------------------------------------------

    @classmethod
    def from_config(
        cls,
        config: IPNConfig | Mapping[str, Any],
        *,
        backbone: Backbone | None = None,
        encoder: VisionEncoder | None = None,
        registry: Registry | None = None,
        name: str = "",
    ) -> Self:
        """Build a model with new stages.

        Args:
            config: a config, or a mapping in which a strategy's preset is filled in.
            backbone: a ready backbone, else the one that the config names is loaded.
            encoder: a ready encoder, else the one that the config names is built.
            registry: where names are looked up, by default everything installed.
            name: what to call the model in reports.

        Raises:
            UserError: a name is unknown, a key is wrong, or a component cannot be built.
        """
        registry = registry or get_registry()
        if not isinstance(config, IPNConfig):
            config = IPNConfig.resolve(config, registry, "model")
        if backbone is None:
            component = registry.get("backbone", config.backbone.name)
            adapter = component.load()
            with component.building():
                _check_options(config.backbone, component.load_config())
                backbone = adapter.load(config.backbone, registry)
                # An adapter that does not know its own sizes was not built.
                _ = backbone.D_hidden, backbone.template, backbone.eos_ids
        elif config.backbone.lora is not None and backbone.lora is None:
            raise ConfigError(
                "the config asks for backbone.lora, and the backbone given has no adapter: call "
                "its adapt() first, on one that no other model shares."
            )
        build = _Builder(registry)
        if encoder is None:
            encoder = build("perceiver", config.encoder)
        build.dims = sizes(backbone, encoder, config.layout)
        perceiver: Perceiver = encoder
        if config.perceive is not None:
            perceiver = build("perceiver", config.perceive, encoder)
        requester = interaction = injector = None
        if config.layout.rounds:
            requester = build("requester", config.request)
            interaction = build("interaction", config.interact)
        if config.inject is not None:
            injector = build("injector", config.inject)
            injector.begin(backbone.words)
        return cls(config, backbone, perceiver, requester, interaction, injector, name, registry)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        interact: str | None = None,
        untrained: bool = False,
        backbone: Backbone | None = None,
        encoder: VisionEncoder | None = None,
        registry: Registry | None = None,
    ) -> Self:
        """Load a model by name, folder, hub id, or `importer:source`.

        Args:
            source: a name of `ipn models list`, a checkpoint folder, a hub id, or a published
                checkpoint, such as `llava:llava-hf/llava-1.5-7b-hf`.
            interact: which of its strategies; by default the one it names first.
            untrained: build `interact` with new weights when there are none for it.
            backbone: a ready one to share among models.
            encoder: a ready one to share among models.
            registry: where names are looked up.

        Raises:
            CheckpointError: a file is missing, damaged, pickled, or does not fit the config.
            UnknownNameError: there is no such model, or no such strategy in it.
        """
        from ipn_core.checkpoint import load

        return load(
            cls,
            source,
            interact=interact,
            untrained=untrained,
            backbone=backbone,
            encoder=encoder,
            registry=registry,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the config and everything trained; backbone and encoder are named, not copied."""
        from ipn_core.checkpoint import save

        save(self, Path(folder))

    # -- parts -----------------------------------------------------------------------------------

    @property
    def encoder(self) -> VisionEncoder:
        """The vision encoder inside the perceiver."""
        inner = self.perceiver
        found = inner.encoder if isinstance(inner, Connector) else inner
        assert isinstance(found, VisionEncoder)
        return found

    @property
    def strategy(self) -> str:
        """The strategy's name, or the interaction's where the config started from no preset."""
        if self.config.strategy:
            return self.config.strategy
        config = self.config
        part = config.interact or config.inject or config.perceive or config.encoder
        return part.name

    @property
    def stage_dtype(self) -> torch.dtype:
        """The dtype of the stages' weights; requests and messages are cast at the borders."""
        return self.slots.request.dtype

    @property
    def borrowed(self) -> tuple[nn.Module, ...]:
        """The parts of all stages whose weights the config names; see `Stage.borrowed`."""
        stages = (self.perceiver, self.requester, self.interaction, self.injector)
        return tuple(part for stage in stages if stage is not None for part in stage.borrowed)

    def trained_state(self) -> dict[str, Tensor]:
        """Everything that belongs into a checkpoint: all but what the config names."""
        named = {id(part) for part in self._named()}
        skipped = tuple(f"{name}." for name, part in self.named_modules() if id(part) in named)
        return {k: v for k, v in self.state_dict().items() if not k.startswith(skipped)}

    def _named(self) -> Iterator[nn.Module]:
        """The language model, a frozen encoder, and what stages borrow."""
        yield from (self.backbone.lm, *self.borrowed)
        if not any(p.requires_grad for p in self.encoder.parameters()):
            yield self.encoder

    def label(self, stage: str) -> str:
        """Return who brought a stage or the backbone: "plugin ipn-rvii 0.1.0", for messages."""
        kind, part = {
            "encode": ("perceiver", self.config.encoder),
            "perceive": ("perceiver", self.config.perceive or self.config.encoder),
            "request": ("requester", self.config.request),
            "interact": ("interaction", self.config.interact),
            "inject": ("injector", self.config.inject),
            "backbone": ("backbone", self.config.backbone),
        }[stage]
        registry = self._registry or get_registry()
        found = registry.entries(kind).get(part.name) if part else None
        return f"plugin {found.plugin.label}" if found else "a local class"

    def train(self, mode: bool = True) -> Self:
        """Set the stages' mode; what is frozen because the config names it stays in eval mode."""
        super().train(mode)
        for part in self._named():
            part.eval()
        # It knows what of it is frozen.
        self.backbone.train(mode)
        return self

    @contextlib.contextmanager
    def observing(self, plugin: object) -> Iterator[object]:
        """Register a plugin with wrappers around stages for the length of the block."""
        self.pm.register(plugin)
        try:
            yield plugin
        finally:
            self.pm.unregister(plugin)

    # -- asking ----------------------------------------------------------------------------------

    def perceive(
        self,
        images: Sequence[Sequence[Any]],
        questions: Sequence[str],
        features: VisualFeatures | None = None,
    ) -> Percept:
        """Perceive the pictures of a batch.

        Args:
            images: for each sample, its pictures (paths, bytes, PIL images, arrays, `Picture`s).
            questions: for each sample, its question.
            features: what the encoder makes of them, if it is known.
        """
        opened = [[_open(image) for image in row] for row in images] if features is None else []
        context = PerceiveContext(opened, list(questions), features)
        percept: Percept = self.call("perceive", context=context)
        got, pictures = percept.tokens, len(percept.features.images)
        D = self.backbone.D_in
        if got is not None and [one.shape[1:] for one in got] != [torch.Size([D])] * pictures:
            raise ShapeError(
                f"stage perceive of {self.label('perceive')} ({type(self.perceiver).__name__}) "
                f"returned tokens of {[tuple(one.shape) for one in got]}, expected (S, {D}) for "
                f"each of {pictures} picture(s)."
            )
        if opened and self.encoder.placed and self.perceiver.placed:
            shown = (self.encoder.shows(image.size) for row in opened for image in row)
            percept = replace(percept, boxes=tuple(shown))
        return percept

    def call(self, stage: str, **arguments: Any) -> Any:
        """Call a stage's hook: "perceive", "request", "interact" or "inject".

        Raises:
            StageError: the stage or a wrapper around it failed; the text names it.
        """
        with self.running(stage):
            return getattr(self.pm.hook, stage)(**arguments)

    @contextlib.contextmanager
    def running(self, stage: str) -> Iterator[None]:
        """Name who brought a stage in whatever goes wrong while the block runs it.

        Raises:
            StageError: anything but an `IPNError`, which speaks for itself, was raised.
        """
        try:
            yield
        except IPNError:
            raise
        except Exception as error:
            who = self.label(stage)
            # A connector, and an interaction that looks again, call the encoder themselves.
            if ran(self.encoder, error):
                stage, who = "perceive", self.label("encode")
            raise StageError(
                f"stage {stage} of {who} failed: {type(error).__name__}: {error}"
            ) from error

    def driving(
        self, method: str, lm: nn.Module | None = None
    ) -> contextlib.AbstractContextManager[None]:
        """Name who brought the backbone in whatever goes wrong while the block runs a method of it.

        Args:
            method: such as "extend".
            lm: where transformers runs the model in the block, the one whose `method` is meant.

        Raises:
            StageError: see `ipn_core.faults.naming`.
        """
        name = self.config.backbone.name
        return naming(lambda: f"backbone '{name}' of {self.label('backbone')}", method, lm)

    def ask(self, image: Any, question: str, **options: Any) -> Answer:
        """Ask one question about one picture.

        Args:
            image: a path, bytes, a PIL image, an array (h, w, 3), or several in a list.
            question: the user's words.
            options: transformers' generation options.
        """
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        prompt = Prompt.ask(question, images, order=self.config.layout.order)
        return self.generate([prompt], **options)[0]

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], **options: Any) -> Answers:
        """Answer a batch of prompts.

        Args:
            prompts: of any length, with any number of pictures each.
            options: transformers' generation options; with several sequences a prompt, the
                answers of one prompt stand side by side.

        Raises:
            UserError: there is no prompt, or one of them or an option is wrong.
        """
        if not prompts:
            raise PromptError("there is no prompt to answer. Give at least one.")
        clock = Clock(self.backbone.device)
        plans = [self.planner.plan(prompt) for prompt in prompts]
        percept = self.perceive([p.images for p in plans], [p.question for p in plans])
        clock.lap("perceive")
        answers, _, _ = decode(self, plans, percept, options, clock)
        return answers

    def dialogue(self, images: Sequence[Any] = ()) -> Dialogue:
        """Start a dialogue about pictures; see `Dialogue.ask`."""
        return Dialogue(self, images)

    def about(self, images: Sequence[Any]) -> Subject:
        """Read pictures that many questions are to be asked about; see `Subject.ask`."""
        return Subject(self, images)

    def forward(
        self,
        prompts: Sequence[Prompt],
        features: VisualFeatures | None = None,
        prefixes: PrefixCache | None = None,
    ) -> tuple[Tensor, int]:
        """Return the summed loss of the answers to learn and the number of their tokens.

        Args:
            prompts: each ends with an answer to learn.
            features: what the encoder makes of their pictures, if it is known.
            prefixes: keeps what the LLM makes of beginnings that never change, if given.
        """
        plans = [self.planner.plan(prompt) for prompt in prompts]
        percept = self.perceive([p.images for p in plans], [p.question for p in plans], features)
        loss, count, _ = self.engine.loss(plans, percept, prefixes)
        return loss, count


class _Builder:
    """Builds components from their configs, with errors that name the plugin.

    Attributes:
        dims: what the next stage is made for; None before the encoder, which knows no model.
    """

    def __init__(self, registry: Registry) -> None:
        self.registry = registry
        self.dims: Dims | None = None

    def __call__(self, kind: str, spec: ComponentConfig | None, *more: Any) -> Any:
        assert spec is not None
        component = self.registry.get(kind, spec.name)
        target, schema = component.load(), component.load_config()
        with component.building():
            config = self._config(schema or target.Config, kind, spec)
            if self.dims is None:
                built = target(config)
                _ = built.width  # one that does not know its own size was not built
                return built
            refuse(f"{kind} '{spec.name}'", target.not_supported_reasons(config, self.dims))
            built = target(config, self.dims, *more)
            self.dims = declared(self.dims, built)
        return built

    @staticmethod
    def _config(schema: Any, kind: str, spec: ComponentConfig) -> Any:
        options = spec.options
        if schema is not None:
            return schema.parse(options, f"{kind} {spec.name}")
        if options:
            raise ConfigError(
                f"{kind} '{spec.name}' takes no options, got {', '.join(sorted(options))}."
            )
        return None


def _check_options(given: BackboneConfig, schema: Any) -> None:
    """Refuse keys that are neither every backbone's nor of the config registered with this one."""
    if schema is None:
        known = type(given).model_fields
        for key in given.options:
            raise ConfigError(
                f"unknown key 'backbone.{key}': allowed are {', '.join(known)}{near(key, known)}."
            )
    else:
        schema.parse(given.options, f"backbone {given.name}")


def _open(image: Any) -> Any:
    return image.load() if isinstance(image, Picture) else load_image(image)
