"""The injector `verbatim`: a message whose tokens are words already."""

from __future__ import annotations

from ipn_core import Dims, Injector, VisualMessage
from ipn_core.config import Config
from ipn_core.stages import InjectContext, Injection

__all__ = ["Verbatim", "VerbatimConfig"]


class VerbatimConfig(Config):
    """Nothing to set."""


class Verbatim(Injector):
    """Fill the K `<img-d>` slots: `slots + message`.

    The message's tokens are input embeddings of the LLM; what is learned is the slots' own, so that
    they can tell the LLM what to do with them.
    """

    Config = VerbatimConfig

    @classmethod
    def not_supported_reasons(cls, config: VerbatimConfig, dims: Dims) -> list[str]:
        """It needs a message of words, one for each slot."""
        reasons = super().not_supported_reasons(config, dims)
        if not reasons and (dims.M, dims.Dm) != (dims.K, dims.D_in):
            reasons.append(
                f"the message has {dims.M} tokens {dims.Dm} wide, and it needs one for each of "
                f"{dims.K} slots, as wide as the LLM's embeddings, {dims.D_in}: use 'tokens'"
            )
        return reasons

    def forward(self, message: VisualMessage, context: InjectContext) -> Injection:
        """Hand (B, K, D_in) on."""
        return Injection(message.values + context.slots)
