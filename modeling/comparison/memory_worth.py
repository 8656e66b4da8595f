"""What a long memory is worth on one's own data: the same trees, trained anew with the newest 0, 10, 50, … and all
events of each user known, and what the ranking loses.

Trees read counts that fade, lifts and relations, so that a longer history can never hurt them by being old, and no
length has an easier task than another. Beside them stands a regression on the same numbers, and a network that reads
every event through summary tokens on top of the trees, which says whether there is more in a history than its counts.
Differences are paired over users. What is stored of a length is not measured again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from feature_repo.atomic import atomic_write
from feature_repo.home.code import code_digest
from feature_repo.home.tables import JobFolder, digest_of
from feature_repo.settings import Settings
from modeling.claims import difference
from modeling.comparison.memory_costs import (
    FEW_OWN,
    LengthCost,
    Trap,
    costs_of,
    name_of,
    share_of_few,
    traps_of,
)
from modeling.console import say
from modeling.errors import DataError
from modeling.evaluation.classic import QUICK_TREES, Classic, classic_scores, fit_trees
from modeling.inputs.encoder import Encoded
from modeling.inputs.shards import read_shard, write_shard
from modeling.inputs.tasks import primary_number
from modeling.metrics import PerUser, per_user
from modeling.recipes import SERVICE
from modeling.recipes.trees import vista_addressed_trees
from modeling.recipes.vista import vista_addressed
from modeling.training.trainer import Trainer, predict
from modeling.training.training_run import build_model
from modeling.training.trees import fit_blend
from modeling.training_set.dataset import SPLITS, Warehouse
from modeling.training_set.lengths import Lengths, lengths_of
from modeling.training_set.sample import Sample

METRICS = ("ndcg@10", "gauc")
ALL_REQUESTS = "all requests"
TREES = "trees"
REGRESSION = "regression"
BOTH = "trees and a network"
# Requests of one user, where a few users have most of them
OF_USER = 50
# Days between the newest event and a request that begins anew
PAUSE_DAYS = 1.0
# Requests of a kind without which nothing is said of it
LEAST = 50
# Of what any history is worth, a recommended length may lose so much
MOST_LOST = 0.1
RESAMPLES = 1_000
# The network whose tokens are asked about
NETWORK = vista_addressed()
# What makes and reads them
WITH_TOKENS = vista_addressed_trees().name


class TooFewError(DataError):
    """There are too few requests to say anything."""


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Args:
        lengths: newest events that are known; None: all.
        requests: of the sample, in training and in each period that evaluates.
        readers: trained at every length; with all events trees are trained twice.
        network: whether a network that reads every event is trained too.
    """

    lengths: tuple[int | None, ...]
    requests: tuple[int, int]
    readers: tuple[str, ...] = (TREES, REGRESSION)
    network: bool = True


# Ten minutes at a million events; two minutes; half a minute, for a picture
EFFORTS = {
    "full": Effort((0, 10, 50, 200, 500, None), (8_000, 4_000)),
    "quick": Effort((0, 10, 50, None), (2_000, 1_000)),
    "small": Effort((0, 10, 50, None), (1_000, 600), readers=(TREES,), network=False),
}


@dataclass(frozen=True)
class ShareKept:
    """The share that one length keeps of what all events are worth over none, on one kind of requests.

    Args:
        value: of the metric at this length.
        share: of the worth; NaN where all events are worth nothing.
        low, high: 95 % of resamples of users.
    """

    value: float
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Worth:
    """The worth of a history on one kind of requests.

    Args:
        requests: how many have a positive.
        all_events, low, high: metric with all events less that with none, and its 95 % interval.
        kept: by length, as `name_of` spells it.
    """

    kind: str
    metric: str
    requests: int
    all_events: float
    low: float
    high: float
    kept: dict[str, ShareKept]


@dataclass(frozen=True)
class NetworkGain:
    """What a network adds to trees.

    Args:
        by_metric: value, and the ends of its 95 % interval over users.
        request_ms: CPU milliseconds of the numbers and the score of a request, trees included.
        token_bytes: of summary tokens, of a user.
    """

    by_metric: dict[str, tuple[float, float, float]]
    request_ms: float
    token_bytes: int


@dataclass(frozen=True)
class Measured:
    """All that is measured.

    Args:
        readers: metrics of each reader at each length.
        noise: of two trainings on the same events, the greater distance by metric.
        network: what a network that reads every event adds to the trees, by metric; None where none was trained.
        cost: by length.
    """

    dataset: str
    requests: dict[str, int]
    worth: list[Worth]
    readers: dict[str, dict[str, dict[str, float]]]
    noise: dict[str, float]
    network: NetworkGain | None
    cost: dict[str, LengthCost]
    median_events: float
    traps: list[Trap]

    def of_all(self, metric: str) -> Worth:
        """The worth of a history on all requests."""
        return next(one for one in self.worth if (one.kind, one.metric) == (ALL_REQUESTS, metric))


def measure_memory(settings: Settings, effort: Effort = EFFORTS["full"]) -> Measured:
    """Measure, or read what is stored of each length.

    Raises:
        TableNotBuiltError: a Beam job has not run.
        DataError: a period has no positive.
        TooFewError: the test period has too few.
    """
    from feature_repo.store.store import open_store

    warehouse = Warehouse(settings)
    sample = _sample(warehouse, effort.requests)
    runs = _runs(effort)
    folder = _folder(settings, warehouse, sample)
    # 1. What is not stored yet.
    missing = [run for run in runs if not (folder / run.file).exists()]
    about = folder / "requests.arrow"
    if missing or not about.exists():
        with lengths_of(settings, open_store(settings), SERVICE, sample) as opened:
            if not about.exists():
                write_shard(about, _about_requests(warehouse, opened))
            _measure_runs(opened, missing, folder)
    else:
        say("memory: up to date")
    # 2. What it comes to.
    asked = read_shard(about)
    number = len(np.unique(asked["request"][asked["labels"] == 1]))
    if number < LEAST:
        raise TooFewError(
            f"the test period has {number} requests with a positive, too few to say anything of {LEAST} or more: move test_from "
            f"({warehouse.contract.spec.requests.test_from}) to an earlier time in the dataset module"
        )
    scores = {run: read_shard(folder / run.file) for run in runs}
    return _decided(warehouse, asked, scores, sample)


def _folder(settings: Settings, warehouse: Warehouse, sample: Sample) -> Path:
    """Where scores of this sample of these tables are kept, by this code."""
    code = code_digest(
        "modeling.comparison.memory_worth", f"feature_repo.datasets.{settings.dataset}"
    )
    made_of = [warehouse.digest, warehouse.contract.fingerprint, asdict(sample), code]
    folder = Path(settings.path("memory", digest_of(made_of)))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@dataclass(frozen=True)
class _Run:
    """One training."""

    reader: str
    length: int | None
    seed: int

    @property
    def file(self) -> str:
        return f"{self.reader.replace(' ', '_')}-{name_of(self.length).replace(',', '')}-{self.seed}.arrow"


# Trees of another seed on the same events, and what reads every event
AGAIN = _Run(TREES, None, 2)
NETWORK_TOO = _Run(BOTH, None, 1)


def _runs(effort: Effort) -> list[_Run]:
    """Every reader at every length; with all events the trees twice, and the network."""
    each = [_Run(reader, length, 1) for length in effort.lengths for reader in effort.readers]
    return [*each, AGAIN, *([NETWORK_TOO] if effort.network else [])]


def _sample(warehouse: Warehouse, most: tuple[int, int]) -> Sample:
    """So many requests at most, evenly spread; of each user few, where a few users have most of them."""
    found = JobFolder(warehouse.settings.home, "training_examples").require().counts
    users = len(warehouse.log.users)
    # More than the cap on average, or most of them of a few: then some have far more.
    everybody = found["requests_train"] > OF_USER * max(users, 1)
    capped = everybody or share_of_few(warehouse.log) > FEW_OWN
    left = {
        period: min(found[f"requests_{period}"], OF_USER * users if capped else np.inf)
        for period in ("train", "test")
    }
    every = tuple(max(1, round(left[period] / n)) for period, n in zip(left, most, strict=True))
    return Sample(every=(every[0], every[1]), of_user=OF_USER if capped else None)


def _about_requests(warehouse: Warehouse, opened: Lengths) -> dict[str, np.ndarray]:
    """The test requests, as far as kinds are made of them."""
    joined = opened.requests("test")
    encoded = opened.encoded("test")
    names = list(opened.encoder.dense_names)
    number = primary_number(warehouse.contract.spec)
    sizes = np.diff(joined.requests.candidate_offsets)
    users = joined.users.dictionary_encode().indices.to_numpy()
    days = np.asarray(encoded.dense_BG)[:, list(opened.encoder.user_dense_names).index("days_ago")]
    dense = np.asarray(encoded.candidate_dense)
    ever = dense[:, names.index("life_item_days_ago")]
    recent = opened.requests("test", 50)
    newest = np.asarray(opened.encoder.featurise(recent.requests).candidate_dense)
    return {
        "labels": np.asarray(encoded.labels)[:, number],
        "request": np.repeat(np.arange(len(sizes)), sizes),
        "user": users.repeat(sizes),
        "days": np.expm1(days).repeat(sizes),
        "events": joined.history_lengths.repeat(sizes),
        "never_had": np.isnan(ever).astype(np.int8),
        "not_lately": np.isnan(newest[:, names.index("life_item_days_ago")]).astype(np.int8),
    }


def _measure_runs(opened: Lengths, runs: Sequence[_Run], folder: Path) -> None:
    """Train and score what is missing, length by length."""
    for length in dict.fromkeys(run.length for run in runs):
        say(f"memory: {name_of(length)} events of each user")
        started = time.process_time()
        periods = opened.all_encoded(length)
        spent = time.process_time() - started
        numbers_ms = 1000 * spent / sum(len(period) for period in periods.values())
        for run in runs:
            if run.length == length:
                found = _scored(opened, run, periods, folder)
                each = numbers_ms + found.request_ms
                write_shard(
                    folder / run.file,
                    {
                        "scores": found.scores_N.astype(np.float32),
                        "ms": np.full(len(found.scores_N), each, np.float32),
                        "token_bytes": np.full(len(found.scores_N), found.token_bytes, np.int32),
                    },
                )


class _Scored(NamedTuple):
    """Scores of all test candidates.

    Args:
        request_ms: CPU milliseconds of scoring a request.
        token_bytes: of a user's summary tokens.
    """

    scores_N: np.ndarray
    request_ms: float = 0.0
    token_bytes: int = 0


def _scored(opened: Lengths, run: _Run, periods: Mapping[str, Encoded], folder: Path) -> _Scored:
    train, validation, test = (periods[name] for name in SPLITS)
    number = primary_number(opened.encoder.contract.spec)
    if run.reader == BOTH:
        return _with_network(opened, periods, folder, run.seed)
    if run.reader == REGRESSION:
        kind: Classic = "logistic regression"
        return _Scored(
            classic_scores(kind, opened.encoder, train, validation, test, number, run.seed)
        )
    score = fit_trees(QUICK_TREES, opened.encoder, train, validation, number, run.seed)
    return _timed(score, test)


def _timed(score: Callable[[Encoded], np.ndarray], test: Encoded, token_bytes: int = 0) -> _Scored:
    started = time.process_time()
    scores = score(test)
    spent = time.process_time() - started
    return _Scored(scores, 1000 * spent / max(len(test), 1), token_bytes)


def _with_network(
    opened: Lengths, periods: Mapping[str, Encoded], folder: Path, seed: int
) -> _Scored:
    """A network that reads every event through tokens, blended with the trees, as a recipe would have it."""
    train, validation, test = (periods[name] for name in SPLITS)
    encoder = opened.encoder_of(NETWORK.history_length)
    training = replace(NETWORK.training, seed=seed)
    network = build_model(NETWORK, encoder, train)
    trainer = Trainer(network, encoder, training, folder / "network", "memory")
    summary = trainer.fit(train, validation)
    trees = asdict(QUICK_TREES)
    both = fit_blend(network, summary, trees, encoder, training, train, validation)
    number = primary_number(encoder.contract.spec)
    assert network.token_shape is not None
    tokens, width = network.token_shape
    # As they are stored, in half precision
    return _timed(
        lambda period: predict(both.blend, encoder, period)[:, number], test, 2 * tokens * width
    )


def _decided(
    warehouse: Warehouse,
    about: Mapping[str, np.ndarray],
    scores: Mapping[_Run, Mapping[str, np.ndarray]],
    sample: Sample,
) -> Measured:
    """Compare the stored scores."""
    trees = {
        run.length: found for run, found in scores.items() if run.reader == TREES and run.seed == 1
    }
    of_trees = {length: found["scores"] for length, found in trees.items()}
    worth = [
        found for kind, chosen in _kinds(about) for found in _worths(kind, about, chosen, of_trees)
    ]
    # 1. Each reader on all requests.
    everything = np.ones(len(about["labels"]), bool)
    sums = {run: _sums(about, found["scores"], everything) for run, found in scores.items()}
    readers: dict[str, dict[str, dict[str, float]]] = {}
    for run, found in sums.items():
        if run.seed == 1:
            figures = {metric: found[metric].value for metric in METRICS}
            readers.setdefault(run.reader, {})[name_of(run.length)] = figures
    # 2. Two trainings on the same events, and what a network adds to the first.
    one = sums[_Run(TREES, None, 1)]
    noise = {metric: abs(one[metric].value - sums[AGAIN][metric].value) for metric in METRICS}
    added = None
    if NETWORK_TOO in sums:
        by_metric = {
            metric: difference("network", metric, sums[NETWORK_TOO][metric], one[metric])
            for metric in METRICS
        }
        stored = scores[NETWORK_TOO]
        added = NetworkGain(
            {metric: (found.value, found.low, found.high) for metric, found in by_metric.items()},
            float(stored["ms"][0]),
            int(stored["token_bytes"][0]),
        )
    # 3. What lengths cost.
    cost = costs_of(warehouse, {length: float(found["ms"][0]) for length, found in trees.items()})
    # 4. What misleads.
    first = np.flatnonzero(np.diff(about["request"], prepend=-1))
    traps = traps_of(warehouse.log, about["days"][first], sample)
    return Measured(
        warehouse.contract.spec.title,
        {"test": len(np.unique(about["request"])), "of_user": sample.of_user or 0},
        worth,
        readers,
        noise,
        added,
        cost,
        float(np.median(warehouse.log.lengths)),
        list(traps),
    )


def _kinds(about: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Kinds of requests, or of candidates: which of all candidates each one asks about, bool."""
    yield ALL_REQUESTS, np.ones(len(about["labels"]), bool)
    yield "what comes next", about["days"] <= PAUSE_DAYS
    yield "the first after a pause", about["days"] > PAUSE_DAYS
    yield "items not among the newest 50", about["not_lately"] == 1
    yield "items never had", about["never_had"] == 1
    bounds = np.quantile(about["events"], [0, 0.25, 0.5, 0.75, 1])
    quarter = np.clip(np.searchsorted(bounds, about["events"], side="right") - 1, 0, 3)
    for number in range(4):
        low, high = bounds[number], bounds[number + 1]
        yield f"users of {low:,.0f} to {high:,.0f} events", quarter == number


def _worths(
    kind: str,
    about: Mapping[str, np.ndarray],
    chosen: np.ndarray,
    scores: Mapping[int | None, np.ndarray],
) -> Iterator[Worth]:
    """The worth of a history on candidates of a kind; nothing where they are too few."""
    if not (chosen & ~np.isnan(about["labels"])).any():
        return
    sums = {length: _sums(about, found, chosen) for length, found in scores.items()}
    requests = int(sums[None]["ndcg@10"].weight.sum())
    if requests < LEAST:
        return
    for metric in METRICS:
        drawn = _resampled({length: found[metric] for length, found in sums.items()})
        none, whole = drawn[0], drawn[None]
        gain = whole - none
        value = sums[None][metric].value - sums[0][metric].value
        kept = {}
        for length, found in sums.items():
            if length == 0:
                continue
            at = found[metric].value
            # Shares of what is not clear of nothing are no shares.
            clear = np.percentile(gain, 2.5) > 0
            shares = (drawn[length] - none) / np.where(gain > 0, gain, np.nan)
            low, high = np.nanpercentile(shares, [2.5, 97.5]) if clear else (np.nan, np.nan)
            share = (at - sums[0][metric].value) / value if clear else np.nan
            kept[name_of(length)] = ShareKept(at, float(share), float(low), float(high))
        low, high = np.percentile(gain, [2.5, 97.5])
        yield Worth(kind, metric, requests, value, float(low), float(high), kept)


def _resampled(sums: Mapping[int | None, PerUser]) -> dict[int | None, np.ndarray]:
    """The metric of resamples of users, the same ones for every length."""
    rng = np.random.default_rng(0)
    first = next(iter(sums.values()))
    users = first.total.shape[1]
    times = rng.multinomial(users, np.full(users, 1 / users), RESAMPLES).astype(np.float64)
    # A draw of users none of whom has weight is left out by a tiny one.
    return {
        length: (times @ one.total[0]) / np.maximum(times @ one.weight[0], 1e-9)
        for length, one in sums.items()
    }


def _sums(
    about: Mapping[str, np.ndarray], scores: np.ndarray, chosen: np.ndarray
) -> dict[str, PerUser]:
    """Metrics by user over chosen candidates."""
    chosen = chosen & ~np.isnan(about["labels"])
    request = about["request"][chosen]
    starts = np.flatnonzero(np.r_[True, np.diff(request) != 0][: len(request)])
    offsets = np.r_[starts, len(request)]
    _, users = np.unique(about["user"][chosen][starts], return_inverse=True)
    return per_user(about["labels"][chosen], scores[chosen].astype(np.float64), offsets, users)


def write_measured(measured: Measured, path: Path) -> None:
    """All figures as JSON."""
    with atomic_write(path) as draft:
        draft.write_text(json.dumps(asdict(measured), indent=1))


def recommended(measured: Measured, metric: str = "ndcg@10") -> str | None:
    """The shortest length that surely loses at most a tenth of what all events are worth; all events where each shorter
    length surely loses more. None: cannot tell.

    A share is sure where neither resampled users nor the noise between two trainings would change it.
    """
    whole = measured.of_all(metric)
    if whole.low <= 0:
        return None
    for name in _shorter(whole):
        if whole.kept[name].low - _noise(measured, metric) >= 1 - MOST_LOST:
            return name
    return None if may_do(measured, metric) else name_of(None)


def may_do(measured: Measured, metric: str = "ndcg@10") -> list[str]:
    """Lengths below all that do not surely lose more than a tenth."""
    whole = measured.of_all(metric)
    noise = _noise(measured, metric)
    return [name for name in _shorter(whole) if whole.kept[name].high + noise >= 1 - MOST_LOST]


def _shorter(whole: Worth) -> list[str]:
    return [name for name in whole.kept if name != name_of(None)]


def _noise(measured: Measured, metric: str) -> float:
    """Of two trainings on the same events, as a share of what all events are worth."""
    return measured.noise[metric] / measured.of_all(metric).all_events
