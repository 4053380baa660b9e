"""Contracts: what a component of each kind must do, as tests that plugins inherit."""

from ipn_core.testing.contracts.attention import AttentionContract
from ipn_core.testing.contracts.backbone import BackboneContract
from ipn_core.testing.contracts.clause import ContractError
from ipn_core.testing.contracts.connector import ConnectorContract
from ipn_core.testing.contracts.encoder import EncoderContract
from ipn_core.testing.contracts.injector import InjectorContract
from ipn_core.testing.contracts.interaction import InteractionContract
from ipn_core.testing.contracts.requester import RequesterContract
from ipn_core.testing.contracts.task import TaskContract

__all__ = [
    "AttentionContract",
    "BackboneContract",
    "ConnectorContract",
    "ContractError",
    "EncoderContract",
    "InjectorContract",
    "InteractionContract",
    "RequesterContract",
    "TaskContract",
]
