"""What `/metrics` tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from nanochat.serve.answers import Answer
from nanochat.serve.engine import Engine

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_RATES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)


class Metrics:
    """Counts of one server."""

    def __init__(self, engines: dict[str, Engine]) -> None:
        self.registry = CollectorRegistry()
        self._engines = engines
        self.requests = Counter(
            "nanochat_requests", "Requests by endpoint and status.", ("path", "status"), registry=self.registry
        )
        self._tokens = Counter(
            "nanochat_tokens", "Tokens read (prompt), read from the cache (reused) and written (answer).",
            ("model", "kind"), registry=self.registry,
        )  # fmt: skip
        self._first = Histogram(
            "nanochat_time_to_first_token_seconds", "From the request to its first token.",
            ("model",), registry=self.registry, buckets=_SECONDS,
        )  # fmt: skip
        self._rate = Histogram(
            "nanochat_tokens_per_second", "Tokens of one answer per second, from its first token on.",
            ("model",), registry=self.registry, buckets=_RATES,
        )  # fmt: skip
        self.registry.register(self)  # type: ignore[arg-type]

    def collect(self):
        """Prometheus asks here for what the engines count."""
        for name, text, of in (
            ("nanochat_requests_waiting", "Requests without a slot.", lambda engine: engine.waiting),
            ("nanochat_requests_running", "Requests with a slot.", lambda engine: engine.running),
            ("nanochat_slots", "Requests that run at once at most.", lambda engine: engine.model.backend.slots),
        ):
            family = GaugeMetricFamily(name, text, labels=("model",))
            for model, engine in self._engines.items():
                family.add_metric((model,), of(engine))
            yield family
        drafts = CounterMetricFamily("nanochat_drafts", "Drafted tokens by result.", labels=("model", "result"))
        for model, engine in self._engines.items():
            found = engine.scheduler.drafting
            drafts.add_metric((model, "accepted"), found.accepted)
            drafts.add_metric((model, "rejected"), found.drafted - found.accepted)
        yield drafts

    def answered(self, answer: Answer, end: float) -> None:
        """Count an answer that has ended at `end` on the clock of `Request.submitted`."""
        name, request = answer.engine.model.name, answer.request
        self._tokens.labels(name, "prompt").inc(len(request.prompt) - request.reused)
        self._tokens.labels(name, "reused").inc(request.reused)
        self._tokens.labels(name, "answer").inc(answer.written)
        if answer.first is not None:
            self._first.labels(name).observe(answer.first - request.submitted)
            if answer.written > 1 and end > answer.first:
                self._rate.labels(name).observe((answer.written - 1) / (end - answer.first))

    def text(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self.registry)
