"""Numbers of the server, as Prometheus reads them. Any thread."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from kvswap.app.stats import RunStats

_TTFT_S = (0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 300, 1800)


class Metrics:
    """Counters of one server."""

    def __init__(self, waiting: Callable[[], int], running: Callable[[], bool]) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "kvswap_requests", "Requests by path and HTTP status", ["path", "status"], registry=self._registry
        )
        self._prompt = Counter("kvswap_prompt_tokens", "Tokens of prompts", registry=self._registry)
        self._cached = Counter(
            "kvswap_cached_tokens", "Tokens of prompts that were stored already", registry=self._registry
        )
        self._generated = Counter("kvswap_generated_tokens", "Tokens of answers", registry=self._registry)
        self._ttft = Histogram(
            "kvswap_first_token_seconds", "Time to the first token", buckets=_TTFT_S, registry=self._registry
        )
        gauge = Gauge("kvswap_waiting_requests", "Requests that wait for their turn", registry=self._registry)
        gauge.set_function(waiting)
        gauge = Gauge("kvswap_running_requests", "Requests that the model works on", registry=self._registry)
        gauge.set_function(lambda: float(running()))

    def answered(self, stats: RunStats) -> None:
        """Count one answer."""
        self._prompt.inc(stats.prompt_tokens)
        self._cached.inc(stats.stored_tokens)
        self._generated.inc(stats.new_tokens)
        self._ttft.observe(stats.ttft_s)

    def text(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self._registry)
