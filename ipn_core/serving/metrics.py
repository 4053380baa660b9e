"""What `/metrics` tells, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Metrics"]

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Counters of one server; two in one process do not meet."""

    def __init__(self, depth: Callable[[], int]) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self.requests = Counter(
            "ipn_requests", "Requests by HTTP status.", ["status"], registry=registry
        )
        self.tokens = Counter(
            "ipn_tokens", "Tokens of prompts, and of answers.", ["kind"], registry=registry
        )
        self.cancelled = Counter(
            "ipn_cancelled", "Answers whose reader went away.", registry=registry
        )
        self.first_token = Histogram(
            "ipn_first_token_seconds",
            "From the request to the first piece of its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.answer = Histogram(
            "ipn_answer_seconds",
            "From the request to the end of its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch = Histogram(
            "ipn_batch_size",
            "Requests answered together.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.busy = Counter(
            "ipn_busy_seconds", "Seconds in which the model computed.", registry=registry
        )
        queue = Gauge("ipn_waiting", "Requests that wait for the model.", registry=registry)
        queue.set_function(depth)

    def note_batch(self, size: int, seconds: float) -> None:
        """Count a batch."""
        self.batch.observe(size)
        self.busy.inc(seconds)

    def text(self) -> bytes:
        """Return all of it in Prometheus' format."""
        return generate_latest(self._registry)
