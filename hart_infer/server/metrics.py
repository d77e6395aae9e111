"""What Prometheus may read at /metrics."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
ROWS = (1, 2, 4, 8, 16, 32, 64)
PREFIX = "hart_infer"


class EngineMetrics:
    """One model's."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.queued = metrics.queued.labels(model)
        self.batch_rows = metrics.batch_rows.labels(model)
        self.batch_seconds = metrics.batch_seconds.labels(model)
        self.waited = metrics.waited.labels(model)
        self.drawn = metrics.rows.labels(model, "drawn")
        self.failed = metrics.rows.labels(model, "failed")
        self.dropped = metrics.rows.labels(model, "dropped")
        self.restarts = metrics.restarts.labels(model)


class Metrics:
    """All of a server's, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(f"{PREFIX}_requests", "Requests by route and status", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            f"{PREFIX}_request_seconds", "Time to the end of the answer", ["route"], buckets=SECONDS, registry=registry
        )
        self.queued = Gauge(f"{PREFIX}_queued_rows", "Pictures and answers that wait", ["model"], registry=registry)
        self.batch_rows = Histogram(f"{PREFIX}_batch_rows", "Rows drawn together", ["model"], buckets=ROWS, registry=registry)
        self.batch_seconds = Histogram(
            f"{PREFIX}_batch_seconds", "Time the worker took for a batch", ["model"], buckets=SECONDS, registry=registry
        )
        self.waited = Histogram(
            f"{PREFIX}_wait_seconds", "Time of a row in the queue", ["model"], buckets=SECONDS, registry=registry
        )
        self.rows = Counter(f"{PREFIX}_rows", "Rows by what became of them", ["model", "outcome"], registry=registry)
        self.restarts = Counter(f"{PREFIX}_worker_restarts", "Workers that died", ["model"], registry=registry)

    def page(self) -> bytes:
        """Return all values in Prometheus's text format."""
        return generate_latest(self.registry)
