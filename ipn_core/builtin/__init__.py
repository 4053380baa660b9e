"""The core's own components, registered through the same hook as anybody's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ipn_core.hooks import hookimpl

if TYPE_CHECKING:
    from ipn_core.plugins import Registrar

__all__ = ["register"]


@hookimpl
def register(registry: Registrar) -> None:
    """Add the attention backends, the requesters, the injectors and the objectives."""
    registry.attention("eager", "ipn_core.attention.eager:Eager")
    registry.attention("flex", "ipn_core.attention.flex:Flex")
    registry.attention("sdpa", "ipn_core.attention.sdpa:SDPA")
    registry.attention("sdpa-cudnn", "ipn_core.attention.sdpa:SDPACudnn")
    registry.attention("sdpa-efficient", "ipn_core.attention.sdpa:SDPAEfficient")
    registry.attention("sdpa-flash", "ipn_core.attention.sdpa:SDPAFlash")
    registry.attention("sdpa-math", "ipn_core.attention.sdpa:SDPAMath")
    registry.attention("xformers", "ipn_core.attention.xformers:XFormers")
    registry.attention("xformers-blackwell", "ipn_core.attention.xformers:XFormersBlackwell")
    registry.attention("xformers-ck", "ipn_core.attention.xformers:XFormersCK")
    registry.attention("xformers-cutlass", "ipn_core.attention.xformers:XFormersCutlass")
    registry.attention("xformers-flash", "ipn_core.attention.xformers:XFormersFlash")
    registry.attention("xformers-flash3", "ipn_core.attention.xformers:XFormersFlash3")
    registry.attention("xformers-splitk", "ipn_core.attention.xformers:XFormersSplitK")
    registry.requester("hidden-state", "ipn_core.builtin.requesters:HiddenState")
    registry.requester("constant", "ipn_core.builtin.requesters:Constant")
    registry.requester("shuffled", "ipn_core.builtin.requesters:Shuffled")
    registry.injector("layers", "ipn_core.builtin.layers:CrossLayers")
    registry.injector("prefix-kv", "ipn_core.builtin.prefix_kv:PrefixKV")
    registry.injector("tokens", "ipn_core.builtin.injectors:TokenInjector")
    objectives = "ipn_core.training.objectives"
    registry.objective("answer-embedding", f"{objectives}:AnswerEmbedding")
    registry.objective("image-text", "ipn_core.training.image_text:ImageText")
    registry.objective("language", f"{objectives}:Language")
    registry.objective("look-again", f"{objectives}:LookAgain")
    registry.objective("request-image", f"{objectives}:RequestImage")
    registry.objective("verbalise", f"{objectives}:Verbalise")
