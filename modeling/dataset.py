"""The training set: examples joined point-in-time through a feature service, histories gathered
late from the log.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo import datasets
from feature_repo.arrow import NO_VALUE, arrow_type, micros
from feature_repo.errors import ExpectedError
from feature_repo.history import Histories, HistoryLog
from feature_repo.recall import Recall
from feature_repo.schema import (
    EVENT_TIMESTAMP,
    TOKEN_ROW,
    TOKEN_VERSION,
    Column,
    Contract,
    DType,
    Examples,
    Table,
)
from feature_repo.settings import Settings
from feature_repo.tables import JobFolder, digest_of
from feature_repo.token_log import TokenLog
from modeling.batch import RequestColumns, events_of
from modeling.columns import Index, Vocabulary, event_key, fitted, floats
from modeling.errors import DataError

if TYPE_CHECKING:
    from feast import FeatureStore

FREQUENCY_EVENTS = 1 << 19  # that the baseline of own frequency reads at a time
SPLITS = ("train", "validation", "test")


class JoinError(ExpectedError, RuntimeError):
    """The point-in-time join lost, added or moved rows."""


class StaleFeaturesError(ExpectedError, RuntimeError):
    """Built tables or registry do not fit the contract in force."""


@dataclass(frozen=True)
class Split:
    """One period's requests, with what evaluation needs beside the model's inputs."""

    requests: RequestColumns
    request_ids: pa.Array
    users: pa.Array
    purchases_of_candidate: (
        np.ndarray
    )  # N: the user's own earlier events of the first action with the candidate
    history_lengths: np.ndarray  # B: events known before the request


def point_in_time_join(store: FeatureStore, service: str, entity_rows: pa.Table) -> pa.Table:
    """Features of every row as of its time, through Feast, rows complete and in order.

    Args:
        entity_rows: join keys and `event_timestamp`.

    Raises:
        JoinError: the store returned another number or order of rows.
        StaleFeaturesError: the registry knows no such service.
    """
    from feast.errors import FeatureServiceNotFoundException

    try:
        features = store.get_feature_service(service)
    except FeatureServiceNotFoundException as error:
        raise StaleFeaturesError(
            f"the registry has no feature service {service!r}: run `python -m feature_repo apply`"
        ) from error
    frame = entity_rows.to_pandas()
    joined = store.get_historical_features(
        frame, features, filter_by_created_timestamp=True
    ).to_arrow()
    check_rows(entity_rows, joined)
    return joined


def check_rows(asked: pa.Table, got: pa.Table) -> None:
    """Every row asked for is there, once, in its place.

    Raises:
        JoinError: it is not.
    """
    if got.num_rows != asked.num_rows:
        raise JoinError(
            f"the point-in-time join returned {got.num_rows:,} rows for {asked.num_rows:,}: this offline store cannot be trained from"
        )
    for name in asked.column_names:
        want, have = asked[name].combine_chunks(), got[name].combine_chunks()
        if pa.types.is_timestamp(want.type):
            same = bool((micros(want) == micros(have.cast(want.type))).all())
        else:
            same = want.equals(have.cast(want.type))
        if not same:
            raise JoinError(
                f"the point-in-time join changed the order or values of {name!r}: this offline store cannot be trained from"
            )


class Warehouse:
    """The built tables of the settings in force, opened for training and evaluation.

    Raises:
        TableNotBuiltError: a Beam job has not run.
        StaleTableError: tables were built under another contract.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.contract: Contract = datasets.load_contract(settings.dataset)
        self.manifests = {
            job: JobFolder(settings.home, job).require(self.contract)
            for job in ("events", "user_history", "item_stats", "training_examples")
        }
        self._log: HistoryLog | None = None

    @property
    def log(self) -> HistoryLog:
        """The history log, opened at first use."""
        if self._log is None:
            self._log = HistoryLog(self.contract, JobFolder(self.settings.home, "user_history"))
        return self._log

    @property
    def digest(self) -> str:
        """Digest of all tables that training reads."""
        views = datasets.load(self.settings.dataset).views_digest(self.settings.data)
        return digest_of([views, {job: m.run_id for job, m in self.manifests.items()}])

    def examples(self, split: str) -> pa.Table:
        """Training examples of one period, candidates of a request together."""
        if split not in SPLITS:
            raise ValueError(f"split must be one of {SPLITS}, not {split!r}")
        rows = JobFolder(self.settings.home, "training_examples").read("training_examples")
        return rows.filter(pc.equal(rows["split"], split)).combine_chunks()

    def split(
        self,
        store: FeatureStore,
        service: str,
        split: str,
        tokens: tuple[str, tuple[int, int]] | None = None,
    ) -> Split:
        """One period, joined and ready to encode.

        Args:
            tokens: version and shape of the summary tokens to read, as they were at each request;
                the service must join `token_rows`.

        Raises:
            JoinError: the offline store lost or moved rows.
            GateError: joined features break the contract.
        """
        examples = self.examples(split)
        contract = self.contract
        keys = [contract.user.join_key, contract.item.join_key, EVENT_TIMESTAMP]
        asked = examples.select(keys)
        if tokens is not None:
            version = pa.repeat(pa.scalar(tokens[0]), len(asked))
            asked = asked.append_column(TOKEN_VERSION.join_key, version)
        joined = point_in_time_join(store, service, asked)
        shown = {c.name for c in contract.spec.shown_features}
        for column in (*contract.labels, *(c.name for c in contract.spec.context_features), *shown):
            # Of impressions nothing is known when somebody asks, so evaluation does without as well.
            known = split == "train" or column not in shown
            values = examples[column] if known else pa.nulls(len(examples), examples[column].type)
            joined = joined.append_column(column, values)
        self._gate(joined, split)
        return self.assemble(joined, examples["request_id"].combine_chunks(), tokens)

    def assemble(
        self,
        joined: pa.Table,
        request_ids: pa.Array,
        tokens: tuple[str, tuple[int, int]] | None = None,
    ) -> Split:
        """Group joined rows by request; rows of a request stand together.

        Args:
            joined: keys and time, labels, context, and features of users, items and impressions.
        """
        contract, log = self.contract, self.log
        item, user = contract.item.join_key, contract.user.join_key
        joined = joined.combine_chunks()
        ids = request_ids.dictionary_encode().indices.to_numpy()
        starts = np.flatnonzero(np.r_[True, np.diff(ids) != 0][: len(ids)])
        offsets = np.r_[starts, len(ids)].astype(np.int64)
        first = pa.array(starts)
        candidates = joined[item].combine_chunks()
        keys, items = keys_of(candidates, log.items)
        users = joined[user].combine_chunks().take(first)
        ends = pc.fill_null(
            joined["history_end"].combine_chunks().take(first).cast(pa.int64()), 0
        ).to_numpy()
        rows = log.rows_of(users)
        times = micros(joined[EVENT_TIMESTAMP].combine_chunks().take(first))

        def gather(chosen: np.ndarray, length: int) -> Histories:
            return log.gather(rows[chosen], ends[chosen], length)

        recall = Recall(log)

        def read_memory(
            chosen: np.ndarray, within: np.ndarray, codes: Sequence[np.ndarray]
        ) -> np.ndarray:
            return recall.read(rows[chosen], ends[chosen], times[chosen], within, codes)

        gather_tokens = None
        if tokens is not None:
            token_log = TokenLog(contract, self.settings.home, tokens[0])
            token_rows = pc.fill_null(
                joined[TOKEN_ROW.name].combine_chunks().take(first).cast(pa.int64()), -1
            ).to_numpy()

            if not (token_rows >= 0).any():
                raise StaleFeaturesError(
                    f"no request of this period has summary tokens of version {tokens[0]}: build them as they were then with "
                    "`python -m beam_jobs summary_tokens --full --every_days 7`"
                )

            def gather_tokens(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
                return token_log.gather(token_rows[chosen], tokens[1])

        of_request = (*contract.user_columns, *contract.spec.context_features)
        of_item = (*contract.item_columns, *contract.spec.shown_features)
        requests = RequestColumns(
            times=times,
            user_columns={c.name: _stored(joined[c.name], c).take(first) for c in of_request},
            items=items,
            candidate_offsets=offsets,
            candidate_keys=keys,
            candidate_columns={c.name: _stored(joined[c.name], c) for c in of_item},
            gather=gather,
            labels=np.stack([floats(joined[name]) for name in contract.labels], axis=1),
            gather_tokens=gather_tokens,
            read_memory=read_memory,
        )
        own = own_frequency(log, rows, ends, offsets, keys)
        return Split(requests, request_ids.take(first), users, own, np.where(rows < 0, 0, ends))

    def _gate(self, joined: pa.Table, split: str) -> None:
        from feature_repo import expectations

        suite = f"training_set_{split}"
        expectations.gate(
            training_set_table(self.contract),
            [joined],
            self.settings.path("expectations"),
            0.0,
            suite=suite,
        )


def _stored(column: pa.ChunkedArray, declared: Column) -> pa.Array:
    """A joined column in one chunk and of the contract's type: a store may widen it on the way."""
    return column.combine_chunks().cast(arrow_type(declared.dtype))


def refuse_without_positives(contract: Contract, name: str, split: Split) -> None:
    """Refuse a period from which nothing can be learned, chosen or measured.

    Raises:
        DataError: it has no request with a positive.
    """
    rules, labels = contract.spec.requests, split.requests.labels
    for number, task in enumerate(contract.spec.tasks):
        ranked = contract.spec.weights.get(task.name, 0) > 0
        if ranked and (labels is None or not (labels[:, number] == 1).any()):
            raise DataError(
                f"the {name} period has no positive example of {task.name}: move validation_from ({rules.validation_from}) or "
                f"test_from ({rules.test_from}) in the dataset module to where the data is"
            )


def training_set_table(contract: Contract) -> Table:
    """The contract of a joined training set: keys, labels and features, where a missing value is one
    that is not yet known.
    """
    examples = contract.table("training_examples")
    joined: list[Column] = [contract.user.column, contract.item.column]
    joined += [examples.column(name) for name in contract.labels]
    features = (*contract.user_columns, *contract.item_columns, *contract.spec.context_features)
    lists = (DType.BYTES, DType.STRING_LIST, DType.FLOAT32_LIST)
    joined += [replace(c, nullable=True) for c in features if c.dtype not in lists]
    return Table("training_set", "Examples joined point-in-time to their features.", tuple(joined))


def keys_of(candidates: pa.Array, items: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """Item keys of candidates: their place in `items`, or a new place after it; and `items` with
    the new ones.
    """
    keys = pc.index_in(candidates, items)
    new = pc.unique(candidates.filter(keys.is_null()))
    if len(new):
        items = pa.concat_arrays([items, new.cast(items.type)])
        keys = pc.index_in(candidates, items)
    return keys.to_numpy().astype(np.int64), items


def own_frequency(
    log: HistoryLog,
    rows: np.ndarray,
    ends: np.ndarray,
    offsets: np.ndarray,
    keys: np.ndarray,
    max_events: int = FREQUENCY_EVENTS,
) -> np.ndarray:
    """How often each candidate occurs in the user's whole earlier history, by the first action; a
    baseline's feature.

    Each user's events are read once, however many requests they have, and no more than `max_events`
    (or one user's) at a time: memory follows the longest history, not the number of requests.
    """
    counts = np.zeros(len(keys), np.int64)
    owner = np.repeat(np.arange(len(rows)), np.diff(offsets))  # request of each candidate
    asked = np.flatnonzero(rows[owner] >= 0)
    asked = asked[np.argsort(rows[owner[asked]], kind="stable")]  # candidates of one user together
    users, first = np.unique(rows[owner[asked]], return_index=True)
    bounds = np.r_[first, len(asked)].astype(np.int64)
    for start, stop in _groups(log.lengths[users], max_events):
        chosen = asked[bounds[start] : bounds[stop]]
        histories = log.gather(
            users[start:stop], log.lengths[users[start:stop]], columns=("action",)
        )
        acted = np.flatnonzero(histories.columns["action"] == 0)
        place = np.arange(len(histories.item_keys)) - np.repeat(
            histories.offsets[:-1], histories.lengths
        )
        holder = np.repeat(np.arange(stop - start), histories.lengths)
        span = int(max(histories.item_keys.max(initial=0), keys.max(initial=0))) + 1
        pairs = (holder * span + histories.item_keys)[acted]
        order = np.argsort(pairs, kind="stable")  # of one user and item, oldest first
        pairs, place = pairs[order], place[acted][order]
        # Of the user's events with the item, those that lie before the request: both parts of the
        # key are in order.
        wanted = (np.searchsorted(users[start:stop], rows[owner[chosen]])) * span + keys[chosen]
        low = np.searchsorted(pairs, wanted, "left")
        high = np.searchsorted(pairs, wanted, "right")
        counts[chosen] = _count_below(place, low, high, ends[owner[chosen]])
    return counts


def _groups(lengths: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Ranges of users with at most so many events together, or one user long."""
    start, events = 0, 0
    for index, length in enumerate(lengths.tolist()):
        if index > start and events + length > most:
            yield start, index
            start, events = index, 0
        events += length
    if len(lengths):
        yield start, len(lengths)


def _count_below(
    values: np.ndarray, low: np.ndarray, high: np.ndarray, limits: np.ndarray
) -> np.ndarray:
    """For each range `[low, high)` of values in ascending order: how many lie below a limit, by
    bisection of all at once.
    """
    left, right = low.copy(), high.copy()
    while (open_ := left < right).any():
        middle = (left + right) // 2
        below = np.zeros(len(left), bool)
        below[open_] = values[middle[open_]] < limits[open_]
        left = np.where(open_ & below, middle + 1, left)
        right = np.where(open_ & ~below, middle, right)
    return left - low


def vocabularies(contract: Contract, train: Split, min_item_count: int) -> dict[str, Index]:
    """Vocabularies and quantiles of every column that a ranker looks up, from the training period
    alone.
    """
    requests, rules = train.requests, contract.spec.requests
    labels = requests.labels
    assert labels is not None
    # Drawn negatives say nothing of which items there is enough to learn about.
    drawn = rules.examples is Examples.ACTIONS
    keys = requests.candidate_keys
    told = keys[(labels == 1).any(axis=1)] if drawn else keys
    found: dict[str, Index] = {
        contract.item.join_key: Vocabulary.of(requests.items.take(pa.array(told)), min_item_count)
    }
    for columns, values in (
        (contract.request_features, requests.user_columns),
        (contract.candidate_features, requests.candidate_columns),
    ):
        found |= {c.name: fitted(c, values[c.name]) for c in columns if c.is_categorical}
    categorical = [c for c in contract.event_features if c.is_categorical]
    if categorical:
        events = events_of(requests.gather, len(requests), contract.spec.num_history_online)
        for column in categorical:
            codes = events.columns[column.name].ravel()
            known = codes if column.buckets else codes[codes != NO_VALUE]
            found[event_key(column.name)] = fitted(column, pa.array(known))
    return found
