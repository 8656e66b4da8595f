"""Was what the server saw what the tables say? Logged requests, computed anew as of their time.

`audit` compares every number that the model was given, feature by feature; `replay` ranks the logged
requests with a different bundle and says how far its lists part from those that were served.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract.arrow import arrow_type
from feature_repo.contract.schema import EVENT_TIMESTAMP
from feature_repo.errors import ExpectedError
from feature_repo.history.transforms import USER_FEATURES
from feature_repo.settings import Settings
from feature_repo.store.store import open_store
from modeling.bundle.bundle import Bundle
from modeling.inputs.encoder import Encoded
from modeling.inputs.tasks import ranking_logits
from modeling.summaries.as_served import as_served
from modeling.training.trainer import predict
from modeling.training_set.dataset import Warehouse
from serving.api.degraded import Degraded
from serving.ranking.shadow import rank_correlation

# Two float32 numbers that differ by no more are taken for equal.
RELATIVE = 1e-4
ABSOLUTE = 1e-5
# Without these a request's numbers are what the tables say; with any other something was missing.
AS_THE_TABLES = {Degraded.STALE_FEATURES.value, Degraded.UNKNOWN_ITEMS.value}


class NothingToAuditError(ExpectedError, LookupError):
    """No logged request can be computed anew."""


@dataclass(frozen=True)
class Mismatch:
    """One feature over all logged requests."""

    feature: str
    compared: int
    differ: int
    largest: float

    @property
    def rate(self) -> float:
        return self.differ / max(self.compared, 1)


@dataclass(frozen=True)
class Audit:
    """The outcome of an audit.

    Args:
        skipped: requests that were served without something, which the tables have.
    """

    requests: int
    skipped: int
    features: list[Mismatch]


def audit(settings: Settings, log: pa.Table, bundle: Bundle) -> Audit:
    """Compare the log with the tables.

    Raises:
        NothingToAuditError: no request of the bundle's was served with all it needs.
    """
    chosen = comparable(log, bundle)
    encoded = recomputed(settings, chosen, bundle)
    logged_names = json.loads((log.schema.metadata or {})[b"dense_names"])
    names = bundle.encoder.dense_names
    if list(names) != logged_names:
        raise NothingToAuditError(
            f"the log has the features {logged_names}, bundle {bundle.name} has {list(names)}: audit with the bundle that served"
        )
    served = flat(chosen["candidate_dense"]).reshape(-1, len(names))
    found = _mismatches(names, served, np.asarray(encoded.candidate_dense))
    user_names = [*USER_FEATURES, *bundle.encoder.request.dense_names]
    of_user = flat(chosen["user_dense"]).reshape(-1, len(user_names))
    found += _mismatches([f"user: {n}" for n in user_names], of_user, np.asarray(encoded.dense_BG))
    found.sort(key=lambda one: (-one.rate, one.feature))
    return Audit(len(chosen), len(log) - len(chosen), found)


@dataclass(frozen=True)
class Replay:
    """The distance between a bundle's lists and the served ones.

    Args:
        same_first: share of the requests with the same item at the top.
        rank_correlation: Spearman's, mean over requests of more than one candidate.
        overlap_10: mean share of the served ten that are among the other's ten.
    """

    requests: int
    same_first: float
    rank_correlation: float
    overlap_10: float


def replay(settings: Settings, log: pa.Table, bundle: Bundle) -> Replay:
    """Rank logged requests with a bundle, from the tables as of each request.

    Raises:
        NothingToAuditError: no request can be ranked anew.
    """
    chosen = comparable(log, None)
    encoded = as_served(bundle.model, bundle.encoder, recomputed(settings, chosen, bundle))
    logits = ranking_logits(
        bundle.encoder.contract.spec, predict(bundle.model, bundle.encoder, encoded)
    )
    same = []
    correlation = []
    overlap = []
    offsets = encoded.candidate_offsets
    for number, row in enumerate(chosen.select(["candidates", "ranked"]).to_pylist()):
        scores = logits[offsets[number] : offsets[number + 1]]
        order = [row["candidates"][at] for at in np.argsort(-scores, kind="stable")]
        same.append(order[0] == row["ranked"][0])
        overlap.append(len(set(order[:10]) & set(row["ranked"][:10])) / min(10, len(row["ranked"])))
        if (found := rank_correlation(row["ranked"], order)) is not None:
            correlation.append(found)
    mean = float(np.mean(correlation)) if correlation else float("nan")
    return Replay(len(chosen), float(np.mean(same)), mean, float(np.mean(overlap)))


def comparable(log: pa.Table, bundle: Bundle | None) -> pa.Table:
    """Select requests that were served with all that the tables have, by a bundle or by any.

    Raises:
        NothingToAuditError: no request is left.
    """
    whole = [set(reasons) <= AS_THE_TABLES for reasons in log["degraded"].to_pylist()]
    kept = pc.and_(pa.array(whole), pc.greater(pc.list_value_length(log["scores"]), 0))
    if bundle is not None:
        kept = pc.and_(kept, pc.equal(log["bundle"], bundle.name))
    chosen = log.filter(kept)
    if not len(chosen):
        raise NothingToAuditError(
            f"none of {len(log):,} logged requests was served whole"
            + (f" by {bundle.name}" if bundle is not None else "")
            + f"; they were served by {sorted(set(log['bundle'].to_pylist()))}"
        )
    return chosen


def recomputed(settings: Settings, log: pa.Table, bundle: Bundle) -> Encoded:
    """The numbers of logged requests, from the offline store as of each request."""
    contract = bundle.encoder.contract
    encoder = bundle.encoder
    # 1. One row for each request and candidate, in the shape of training examples.
    lengths = pc.list_value_length(log["candidates"]).to_numpy().astype(np.int64)
    row = pa.array(np.repeat(np.arange(len(log)), lengths))
    user = contract.user.join_key
    item = contract.item.join_key
    examples = pa.table(
        {
            user: log[user].take(row).cast(arrow_type(contract.user.dtype)),
            item: pc.list_flatten(log["candidates"]).cast(arrow_type(contract.item.dtype)),
            EVENT_TIMESTAMP: log["request_timestamp"].take(row),
            "request_id": log["request_id"].take(row),
            **{c.name: log[c.name].take(row) for c in contract.spec.context_features},
            # What came of it is not known here, and nothing is of impressions.
            **{name: pa.nulls(len(row), pa.int8()) for name in contract.labels},
            **{
                c.name: pa.nulls(len(row), arrow_type(c.dtype))
                for c in contract.spec.shown_features
            },
        }
    )
    # 2. Join the features as of each request, as a training set does.
    warehouse = Warehouse(settings)
    store = open_store(settings)
    service = bundle.manifest["service"]
    joined = warehouse.join(store, service, "test", examples)
    # The request's id is no feature: it only says which rows belong together.
    split = warehouse.assemble(joined.drop_columns("request_id"), joined["request_id"])
    # How many events were known decides which of them are read.
    return replace(encoder.featurise(split.requests), history_lengths=split.history_lengths)


def flat(lists: pa.ChunkedArray) -> np.ndarray:
    """All numbers of a column of lists."""
    found: np.ndarray = pc.list_flatten(lists).to_numpy()
    return found


def _mismatches(
    names: list[str] | tuple[str, ...], served: np.ndarray, now: np.ndarray
) -> list[Mismatch]:
    """Count the numbers that differ, by column; missing equals missing."""
    close = np.isclose(served, now, rtol=RELATIVE, atol=ABSOLUTE, equal_nan=True)
    apart = np.nan_to_num(np.abs(served - now), nan=0.0, posinf=np.inf)
    return [
        Mismatch(name, len(served), int((~close[:, at]).sum()), float(apart[:, at].max(initial=0)))
        for at, name in enumerate(names)
    ]
