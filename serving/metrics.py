"""Counters and histograms of a process, or of several that count together."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from serving.settings import SHARED

STAGES = (
    "queue",
    "user_read",
    "model_wait",
    "item_read",
    "features",
    "encode_user",
    "score",
    "sort",
)


class Metrics:
    """Counters and histograms of one process; labels never carry ids."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        # Of several processes each answers for all: their counters lie in files that all read.
        self.shared = SHARED in os.environ
        self.requests = Counter(
            "memoir_requests",
            "requests by route and status",
            ["route", "status"],
            registry=self.registry,
        )
        self.left = Counter(
            "memoir_clients_left", "clients that left before their answer", registry=self.registry
        )
        self.degraded = Counter(
            "memoir_degraded",
            "answers by what they had to do without",
            ["reason"],
            registry=self.registry,
        )
        self.unknown_items = Counter(
            "memoir_unknown_items",
            "candidates that the store does not know",
            registry=self.registry,
        )
        self.candidates = Counter("memoir_candidates", "candidates scored", registry=self.registry)
        buckets = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
        self.seconds = Histogram(
            "memoir_stage_seconds",
            "time by stage",
            ["stage"],
            buckets=buckets,
            registry=self.registry,
        )
        self.bundle = Gauge(
            "memoir_bundle_info",
            "processes that rank with a bundle",
            ["bundle"],
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.ready = Gauge(
            "memoir_ready",
            "whether requests should come here, to every process",
            registry=self.registry,
            multiprocess_mode="livemin",
        )
        self.under_way = Gauge(
            "memoir_requests_under_way",
            "requests being answered",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.swaps = Gauge(
            "memoir_bundle_swaps",
            "bundles swapped in since the start",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.shadow = Counter(
            "memoir_shadow",
            "requests that another bundle was asked beside: compared, same_first, dropped, failed",
            ["outcome"],
            registry=self.registry,
        )
        self.shadow_correlation = Histogram(
            "memoir_shadow_rank_correlation",
            "of its list with the one that was served",
            buckets=(-0.5, 0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1.0),
            registry=self.registry,
        )
        self.logged = Gauge(
            "memoir_served_logged",
            "requests in the served-feature log",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.log_dropped = Gauge(
            "memoir_served_log_dropped",
            "requests that it had no room for",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.refused = Gauge(
            "memoir_bundles_refused",
            "bundles that could not be served",
            registry=self.registry,
            multiprocess_mode="livemax",
        )

    def text(self) -> bytes:
        """As Prometheus reads them."""
        if not self.shared:
            return generate_latest(self.registry)
        from prometheus_client.multiprocess import MultiProcessCollector

        whole = CollectorRegistry()
        MultiProcessCollector(whole)  # type: ignore[no-untyped-call]
        return generate_latest(whole)
