"""What a server counts, in Prometheus' text."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKENS = (16, 64, 256, 1024, 2048, 4096, 8192, 16384, 32768)


class Metrics:
    """One server's numbers, in a registry of their own.

    Args:
        queued: gives the inputs that are not answered yet. indexed: gives the entries of the index.
    """

    def __init__(self, queued: Callable[[], int], indexed: Callable[[], int]):
        self.registry = CollectorRegistry()
        named = {"registry": self.registry, "namespace": "vlm2vec"}
        self.requests = Counter("requests", "Requests answered", ["path", "status"], **named)
        self.seconds = Histogram("request_seconds", "From a request's first byte to its answer", ["path"], buckets=SECONDS, **named)
        self.inputs = Counter("inputs", "Inputs embedded", **named)
        self.tokens = Counter("tokens", "Tokens embedded, those of pictures counted", **named)
        self.pass_tokens = Histogram("pass_tokens", "Tokens of one pass of the model", buckets=TOKENS, **named)
        self.pass_seconds = Histogram("pass_seconds", "Seconds of one pass of the model", buckets=SECONDS, **named)
        Gauge("queued_inputs", "Inputs that are not answered yet", **named).set_function(queued)
        Gauge("index_entries", "Entries of the index", **named).set_function(indexed)

    def passed(self, inputs: int, tokens: int, seconds: float) -> None:
        """Count a pass of the model."""
        self.inputs.inc(inputs)
        self.tokens.inc(tokens)
        self.pass_tokens.observe(tokens)
        self.pass_seconds.observe(seconds)

    def text(self) -> bytes:
        """The page /metrics."""
        return generate_latest(self.registry)
