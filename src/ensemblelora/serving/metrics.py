"""What a server counts, in Prometheus' format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["Metrics", "make_metrics", "render_metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, eq=False)
class Metrics:
    """One server's counters; a process may have several servers."""

    registry: CollectorRegistry
    requests: Counter
    """by route and status"""
    request_seconds: Histogram
    """by route"""
    refusals: Counter
    """by reason"""
    answers: Counter
    """by task, and whether it was named or routed"""
    batch_rows: Histogram
    batch_seconds: Histogram


def make_metrics(n_waiting_rows: Callable[[], float]) -> Metrics:
    """Make a server's counters, all at zero; how many rows wait is asked when it is wanted."""
    registry = CollectorRegistry()
    waiting = Gauge("ensemblelora_waiting_rows", "Rows that no batch has taken yet.", registry=registry)
    waiting.set_function(n_waiting_rows)
    return Metrics(
        registry=registry,
        requests=Counter(
            "ensemblelora_requests", "Requests answered, also by a refusal.", ["route", "status"], registry=registry
        ),
        request_seconds=Histogram(
            "ensemblelora_request_seconds",
            "From a request's first byte to its answer's last.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        ),
        refusals=Counter("ensemblelora_refusals", "Requests that were refused.", ["reason"], registry=registry),
        answers=Counter("ensemblelora_answers", "Rows answered.", ["task", "routed"], registry=registry),
        batch_rows=Histogram("ensemblelora_batch_rows", "Rows answered together.", buckets=_ROWS, registry=registry),
        batch_seconds=Histogram(
            "ensemblelora_batch_seconds", "Time a batch had the model.", buckets=_SECONDS, registry=registry
        ),
    )


def render_metrics(metrics: Metrics) -> bytes:
    """All counters as text."""
    return generate_latest(metrics.registry)
