"""Counters of a server, for Prometheus at `/metrics`."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKENS = tuple(2**power for power in range(6, 18))
SEQUENCES = tuple(2**power for power in range(13))


class Metrics:
    """The counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self._waiting = Gauge("polar_inputs_in_flight", "Inputs accepted and not answered yet", registry=registry)
        self._ready = Gauge("polar_ready", "1 while requests are accepted", registry=registry)
        self._rewards = Counter("polar_rewards", "Rewards answered", registry=registry)
        self._truncated = Counter("polar_truncated", "Inputs of which something was cut", registry=registry)
        self._failures = Counter("polar_failures", "Inputs whose reward could not be computed", registry=registry)
        self._reloads = Counter("polar_reloads", "Attempts to load a checkpoint", ["result"], registry=registry)
        self._seconds = Histogram(
            "polar_request_seconds",
            "From the last byte in to the answer",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self._requests = Counter(
            "polar_requests", "Answers by route and HTTP status", ["route", "status"], registry=registry
        )
        self._batch_tokens = Histogram(
            "polar_batch_tokens", "Tokens that a batch computed", buckets=TOKENS, registry=registry
        )
        self._batch_size = Histogram("polar_batch_size", "Inputs in a batch", buckets=SEQUENCES, registry=registry)
        self._input_tokens = Counter("polar_input_tokens", "Tokens of the inputs", registry=registry)
        self._forwarded = Counter(
            "polar_forwarded_tokens",
            "Tokens computed; less than those of the inputs, as prefixes are shared",
            registry=registry,
        )

    def watch(self, in_flight: Callable[[], float], ready: Callable[[], float]) -> None:
        """Take these values whenever the metrics are read."""
        self._waiting.set_function(in_flight)
        self._ready.set_function(ready)

    def count_batch(self, *, sequences: int, tokens: int, forwarded: int) -> None:
        """Count a computed batch."""
        self._batch_size.observe(sequences)
        self._batch_tokens.observe(forwarded)
        self._input_tokens.inc(tokens)
        self._forwarded.inc(forwarded)

    def count_failure(self) -> None:
        """Count an input without a reward."""
        self._failures.inc()

    def count_rewards(self, rewards: int, truncated: int) -> None:
        """Count rewards, and those of truncated inputs."""
        self._rewards.inc(rewards)
        self._truncated.inc(truncated)

    def count_request(self, route: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._seconds.labels(route).observe(seconds)
        self._requests.labels(route, str(status)).inc()

    def count_reload(self, *, succeeded: bool) -> None:
        """Count a checkpoint that was loaded, or refused."""
        self._reloads.labels("loaded" if succeeded else "refused").inc()

    def text(self) -> bytes:
        """Return all of them in the text format of Prometheus."""
        return generate_latest(self._registry)

    def value(self, name: str) -> float:
        """Return one sample by its full name, such as `polar_forwarded_tokens_total`."""
        return self._registry.get_sample_value(name) or 0.0
