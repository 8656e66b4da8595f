"""Counters and histograms of a process, or of several that count together."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.registry import Collector

from serving.api.messages import RankRequest, RankResponse
from serving.api.settings import SHARED

Mode = Literal["livesum", "livemin", "livemax"]
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


# Buckets of a request's time, in deadlines: finest where it matters whether an answer came in time
SHARES_OF_DEADLINE = (
    0.01,
    0.02,
    0.04,
    0.08,
    0.16,
    0.25,
    0.4,
    0.6,
    0.8,
    0.9,
    1.0,
    1.1,
    1.5,
    2,
    4,
    20,
)
STORE_ERRORS = ("no_time", "timeout", "connection", "refused", "damaged", "other")
EVENT_OUTCOMES = ("added", "known", "waiting", "rejected", "failed")
# As Prometheus' own libraries name them; of several processes together
PROCESS = {
    "process_resident_memory_bytes": "resident memory",
    "process_open_fds": "open files and connections",
    "process_start_time_seconds": "start of the oldest process, since 1970",
}
OUTCOMES = ("answered", "rejected", "refused", "failed")


def outcome_of(status: int) -> str:
    """What became of a request: answered; rejected, as it was wrong; refused, as there was no place or no bundle;
    failed.

    >>> outcome_of(503)
    'refused'
    """
    if status == 503:
        return "refused"
    if status >= 500 or not status:
        return "failed"
    return "rejected" if status >= 400 else "answered"


class Metrics:
    """Counters and histograms of one process; labels never carry ids.

    Args:
        deadline_s: of a request, around which its times are told apart.
    """

    def __init__(self, deadline_s: float = 0.25) -> None:
        self.registry = CollectorRegistry()
        # Of several processes each answers for all: their counters lie in files that all read.
        self.shared = SHARED in os.environ
        count = self._counter
        gauge = self._gauge
        # 1. Counters, to which requests add as they are answered.
        self.requests = count("requests", "requests by route and status", "route", "status")
        self.left = count("clients_left", "clients that left before their answer")
        self.degraded = count("degraded", "answers by what they had to do without", "reason")
        self.unknown_items = count("unknown_items", "candidates that the store does not know")
        self.candidates = count("candidates", "candidates scored")
        self.shadow = count(
            "shadow",
            "requests that another bundle was asked beside: compared, same_first, dropped, failed",
            "outcome",
        )
        self.store_errors = count(
            "store_errors", "reads of a user that failed, by why the store gave none", "kind"
        )
        self.events = count("events", "events that were sent, by what became of them", "outcome")
        # Totals that others count: `advance` brings them here.
        self.swaps = count("bundle_swaps", "bundles swapped in since the start")
        self.logged = count("served_logged", "requests in the served-feature log")
        self.log_dropped = count("served_log_dropped", "requests it had no room for")
        self.states = count("user_states", "users by how their encoding came about", "outcome")
        self.events_without_tokens = count(
            "events_without_tokens",
            "events that summary tokens do not know until the job has run",
            "reason",
        )
        self.steps = count(
            "model_steps",
            "steps of the model by what took them: compiled code, or the model itself",
            "step",
            "by",
        )
        self._advanced: dict[tuple[Counter, str], float] = {}
        # 2. Gauges, each with how the values of several processes become one.
        self.bundle = gauge("bundle_info", "processes that rank with a bundle", "livesum", "bundle")
        self.ready = gauge("ready", "whether every process takes requests", "livemin")
        self.under_way = gauge("requests_under_way", "requests being answered", "livesum")
        self.most_under_way = gauge(
            "requests_most", "requests under way for which there is a place", "livesum"
        )
        self.events_under_way = gauge(
            "events_under_way", "callers whose events are being taken", "livesum"
        )
        self.refused = gauge("bundles_refused", "bundles that could not be served", "livemax")
        self.moved = gauge(
            "feature_moved",
            "how far the stored values of a column are from those that the live bundle learned from, 0 to 1",
            "livemax",
            "column",
        )
        self.state_bytes = gauge("user_state_bytes", "of encoded users that are kept", "livesum")
        self.items_as_of = gauge(
            "items_timestamp_seconds", "as of when the newest features of items are", "livemin"
        )
        self.materialized = gauge(
            "materialized_timestamp_seconds", "when the tables were sent online last", "livemax"
        )
        self.tokens_built = gauge(
            "tokens_built_timestamp_seconds",
            "when the job built the summary tokens that the live bundle reads",
            "livemax",
        )
        self._cpu = Counter(
            "process_cpu_seconds", "CPU time, of users and of the system", registry=self.registry
        )
        self._of_process = {name: self._of_this_process(name) for name in PROCESS}
        # 3. Histograms of stage times and of the shadow's lists.
        self.seconds = Histogram(
            "memoir_stage_seconds",
            "time by stage",
            ["stage"],
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
            registry=self.registry,
        )
        self.whole = Histogram(
            "memoir_request_seconds",
            "time of a whole request, by route and what became of it",
            ["route", "outcome"],
            buckets=[round(share * deadline_s, 6) for share in SHARES_OF_DEADLINE],
            registry=self.registry,
        )
        self.shadow_correlation = Histogram(
            "memoir_shadow_rank_correlation",
            "of its list with the one that was served",
            # The buckets are finest near 1, where a drop from 0.99 to 0.9 must show.
            buckets=(-0.5, 0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.999, 1.0),
            registry=self.registry,
        )

    def prepare(self, routes: Iterable[str], reasons: Iterable[str]) -> None:
        """Let every series exist from the start, at 0: a rate of one that appears with its first value is lost."""
        for route in routes:
            self.requests.labels(route, "200")
            for outcome in OUTCOMES:
                self.whole.labels(route, outcome)
        series = (
            (self.degraded, reasons),
            (self.store_errors, STORE_ERRORS),
            (self.events, EVENT_OUTCOMES),
            (self.shadow, ("compared", "same_first", "dropped", "failed")),
            (self.seconds, STAGES),
        )
        for metric, labels in series:
            for label in labels:
                metric.labels(label)

    def advance(self, counter: Counter, total: float, whose: str = "") -> None:
        """Bring a counter up to what somebody else has counted.

        Args:
            whose: which of several that count it, such as a bundle.
        """
        key = (counter, whose)
        counter.inc(max(total - self._advanced.get(key, 0.0), 0.0))
        self._advanced[key] = total

    def observe_process(self) -> None:
        """Take memory, CPU time and open files of this process."""
        for metric in ProcessCollector(registry=None).collect():
            for sample in metric.samples:
                if sample.name == "process_cpu_seconds_total":
                    # What a worker used stays used when it has ended.
                    self.advance(self._cpu, sample.value)
                elif sample.name in self._of_process:
                    self._of_process[sample.name].set(sample.value)

    def _of_this_process(self, name: str) -> Gauge:
        mode: Mode = "livemin" if name == "process_start_time_seconds" else "livesum"
        return Gauge(name, PROCESS[name], registry=self.registry, multiprocess_mode=mode)

    def count(self, asked: RankRequest, answer: RankResponse) -> None:
        """Count an answer of a ranking."""
        for reason in answer.degraded:
            self.degraded.labels(reason).inc()
        self.unknown_items.inc(len(answer.unknown_items))
        self.candidates.inc(len(asked.candidates))
        for stage in STAGES:
            self.seconds.labels(stage).observe(getattr(answer.timings_ms, stage) / 1000)

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count a request that ended, however it did."""
        self.requests.labels(route, str(status)).inc()
        self.whole.labels(route, outcome_of(status)).observe(seconds)

    def forget_bundle(self, name: str) -> None:
        """Show nothing any more of a bundle that is loaded no longer."""
        self.bundle.labels(name).set(0)
        if not self.shared:
            self.bundle.remove(name)

    def _counter(self, name: str, doc: str, *labels: str) -> Counter:
        return Counter(f"memoir_{name}", doc, labels, registry=self.registry)

    def _gauge(self, name: str, doc: str, together: Mode, *labels: str) -> Gauge:
        # `together`: what the values of several processes come to.
        return Gauge(
            f"memoir_{name}", doc, labels, registry=self.registry, multiprocess_mode=together
        )

    def text(self) -> bytes:
        if not self.shared:
            return generate_latest(self.registry)
        from prometheus_client.multiprocess import MultiProcessCollector

        forget_dead_processes(Path(os.environ["PROMETHEUS_MULTIPROC_DIR"]))
        whole = CollectorRegistry()
        whole.register(_Loaded(MultiProcessCollector(CollectorRegistry())))  # type: ignore[no-untyped-call]
        return generate_latest(whole)


def forget_dead_processes(folder: Path) -> None:
    """Remove the gauges of processes that have ended, however they did: a dead one is not ready for ever, and has no
    bundle and no bytes. What was counted stays counted.

    Args:
        folder: in which prometheus_client keeps a file for each process and kind of number.
    """
    from prometheus_client.multiprocess import mark_process_dead

    for file in folder.glob("gauge_live*_*.db"):
        pid = int(file.stem.rpartition("_")[2])
        if not _is_alive(pid):
            # Another process may be at it.
            with suppress(FileNotFoundError):
                mark_process_dead(pid, str(folder))  # type: ignore[no-untyped-call]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another account's
    return True


class _Loaded(Collector):
    """Counts of all processes together, without bundles that no process ranks with: from files that
    they share nothing can be removed.
    """

    def __init__(self, every: Collector) -> None:
        self._every = every

    def collect(self) -> Iterator[Metric]:
        for metric in self._every.collect():
            if metric.name == "memoir_bundle_info":
                metric.samples = [sample for sample in metric.samples if sample.value]
            yield metric
