"""One model on many machines: replicas of `ipn serve` behind Ray Serve's address.

    serve run ipn_core.serving.ray:application model=starter

A deployment file says how many replicas there are and what each may use; see
examples/ray-serve.yaml. With IPN_API_KEY set in a replica's environment, requests must bring it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field
from ray import serve

if TYPE_CHECKING:
    from ray.serve import Application
    from starlette.applications import Starlette

__all__ = ["Settings", "application"]


class Settings(BaseModel):
    """What each replica serves; the options of `ipn serve` that do not concern its address.

    Attributes:
        model: a known model, a folder that all machines reach, or a hub id.
        interact: one of its strategies, None for its default.
        batch: requests that a replica answers together at most.
        waiting: requests that may wait in it; a further one gets 429.
        max_tokens: of an answer at most.
        max_body: megabytes of a request at most.
        body_seconds: in which a request must have come.
        hosts: values of the header Host that are accepted; none for all, as it is not known here
            by which address the cluster is asked. They keep out pages in a browser that reach it
            by a name of their own.
        device, dtype: where it runs, and in which format; see `ipn_core.placing`.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = "starter"
    interact: str | None = None
    batch: int = Field(default=16, ge=1)
    waiting: int = Field(default=64, ge=1)
    max_tokens: int = Field(default=256, ge=1)
    max_body: int = Field(default=20, ge=1)
    body_seconds: int = Field(default=60, ge=1)
    hosts: tuple[str, ...] = ()
    device: str | None = None
    dtype: str | None = None


def application(args: Mapping[str, Any]) -> Application:
    """Build the application that a deployment file names.

    Args:
        args: those of the file, as `Settings` has them.

    Raises:
        pydantic.ValidationError: a setting is unknown or out of range.
    """
    settings = Settings.model_validate(args)

    def replica() -> Starlette:
        # In the replica's process, on its machine.
        from ipn_core.model import IPN
        from ipn_core.placing import place
        from ipn_core.serving.app import create_app
        from ipn_core.serving.protocol import Limits

        model = IPN.from_pretrained(settings.model, interact=settings.interact)
        return create_app(
            place(model, settings.device, settings.dtype),
            limits=Limits(
                body=settings.max_body * 1_000_000,
                seconds=settings.body_seconds,
                tokens=settings.max_tokens,
            ),
            batch=settings.batch,
            waiting=settings.waiting,
            hosts=settings.hosts,
            key=os.environ.get("IPN_API_KEY") or None,
        )

    deployment = serve.deployment(serve.ingress(replica)(), name="ipn")
    return deployment.bind()
