"""The training set: examples joined point-in-time through a feature service, histories gathered
late from the log.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo import datasets
from feature_repo.contract import expectations, limits
from feature_repo.contract.arrow import NO_VALUE, arrow_type, micros
from feature_repo.contract.contract import TOKEN_ROW, TOKEN_VERSION, Contract
from feature_repo.contract.schema import (
    EVENT_TIMESTAMP,
    Column,
    DType,
    Examples,
    Table,
)
from feature_repo.errors import ExpectedError
from feature_repo.history.counts import Readings
from feature_repo.history.history import Histories, HistoryLog
from feature_repo.history.recall import Recall
from feature_repo.history.shares import Shares, changes_of
from feature_repo.history.sketch import Layout
from feature_repo.history.token_log import TokenLog
from feature_repo.home.catalogue import TokenSpec
from feature_repo.home.tables import JobFolder, digest_of
from feature_repo.settings import Settings
from modeling.errors import DataError
from modeling.inputs.columns import Index, Vocabulary, event_key, fitted, floats, whole
from modeling.inputs.encoder import GatherHistories, RequestColumns, events_of
from modeling.training_set.visible import visible_stats

if TYPE_CHECKING:
    from feast import FeatureStore

SPLITS = ("train", "validation", "test")
# The offline store that joins Arrow rows
OFFLINE_STORE = "feature_repo.store.offline_store.AsofDuckDBOfflineStore"
# Values of a column in buckets from which its quantiles come
SAMPLED_NUMBERS = 1 << 20


class JoinError(ExpectedError, RuntimeError):
    """The point-in-time join lost, added or moved rows."""


class StaleFeaturesError(ExpectedError, RuntimeError):
    """Built tables or registry do not fit the contract in force."""


@dataclass(frozen=True)
class JoinedRequests:
    """Requests of one period, or some of them, with their features as of each request, before they are
    numbers.

    Args:
        users: of each request.
        log: where their histories are.
        log_rows: row of each request's user in the log, -1 for none.
        history_ends: events known at each request.
        token_rows: row of each request's tokens in the token log, -1 for none; None where none are
            read.
    """

    requests: RequestColumns
    request_ids: pa.Array
    users: pa.Array
    log: HistoryLog
    log_rows: np.ndarray
    history_ends: np.ndarray
    token_rows: np.ndarray | None = None

    @property
    def history_lengths(self) -> np.ndarray:
        return np.where(self.log_rows < 0, 0, self.history_ends)


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
    # Feast's own stores take a data frame; ours takes the rows as they are.
    arrow = store.config.offline_store.type == OFFLINE_STORE
    joined = store.get_historical_features(
        entity_rows if arrow else entity_rows.to_pandas(),
        features,
        filter_by_created_timestamp=True,
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
        want = asked[name].combine_chunks()
        have = got[name].combine_chunks()
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
        self._shares: Shares | None = None

    @property
    def shares(self) -> Shares:
        """Shares of values over time, made at first use."""
        if self._shares is None:
            stats = self.item_stats("count_total")
            changes = changes_of(self.contract, stats, self.profiles())
            self._shares = Shares(Layout.of(self.contract), changes)
        return self._shares

    @property
    def log(self) -> HistoryLog:
        """The history log, opened at first use."""
        if self._log is None:
            self._log = HistoryLog(self.contract, JobFolder(self.settings.home, "user_history"))
        return self._log

    def profiles(self) -> pa.Table:
        """Rows of `item_profile`."""
        return JobFolder(self.settings.home, "events").read("item_profile")

    def item_stats(self, name: str) -> pa.Table:
        """One statistic of all items at all times: item, time and number."""
        columns = [self.contract.item.join_key, EVENT_TIMESTAMP, name]
        return JobFolder(self.settings.home, "item_stats").read("item_stats", columns)

    @property
    def digest(self) -> str:
        """Digest of all tables that training reads."""
        views = datasets.load(self.settings.dataset).views_digest(self.settings.data)
        return digest_of([views, {job: m.run_id for job, m in self.manifests.items()}])

    def pieces(
        self, most: int, every: tuple[int, int] = (1, 1), of_user: int | None = None
    ) -> Iterator[tuple[str, pa.Table]]:
        """Yield the examples of all periods in pieces, each of one period: whole requests, at most so many rows, or
        one request's. A period's pieces come in the order of its examples.

        Args:
            every: n and m: each n-th training request, each m-th of those that evaluate.
            of_user: requests of one user in a period at most, spread evenly over all of theirs.
        """
        folder = JobFolder(self.settings.home, "training_examples")
        waiting: dict[str, pa.Table] = {}
        for path in folder.paths("training_examples"):
            rows = folder.read_path(path)
            for split in SPLITS:
                own = rows.filter(pc.equal(rows["split"], split)).combine_chunks()
                # A user's requests stand in one part.
                chosen = _capped(own, self.contract.user.join_key, of_user)
                for piece in _cut(_each(chosen, every[split != "train"]), most):
                    before = waiting.pop(split, piece.slice(0, 0))
                    if len(before) and len(before) + len(piece) > most:
                        yield split, before
                        before = piece.slice(0, 0)
                    waiting[split] = pa.concat_tables([before, piece])
        yield from waiting.items()

    def examples_schema(self) -> pa.Schema:
        """Columns of `training_examples`.

        Raises:
            DataError: the job found no example.
        """
        folder = JobFolder(self.settings.home, "training_examples")
        for path in folder.paths("training_examples"):
            return folder.read_path(path).schema
        raise DataError("training_examples holds no request: look at the dataset's declaration")

    def join(
        self,
        store: FeatureStore,
        service: str,
        split: str,
        examples: pa.Table,
        tokens: TokenSpec | None = None,
    ) -> pa.Table:
        """Examples of one period with their features as of each request.

        Raises:
            JoinError: the offline store lost or moved rows.
        """
        contract = self.contract
        keys = [contract.user.join_key, contract.item.join_key, EVENT_TIMESTAMP]
        asked = examples.select(keys)
        if tokens is not None:
            version = pa.repeat(pa.scalar(tokens.version), len(asked))
            asked = asked.append_column(TOKEN_VERSION.join_key, version)
        joined = point_in_time_join(store, service, asked)
        shown = {c.name for c in contract.spec.shown_features}
        for column in (*contract.labels, *(c.name for c in contract.spec.context_features), *shown):
            # Of impressions nothing is known when somebody asks, so evaluation does without as well.
            known = split == "train" or column not in shown
            values = examples[column] if known else pa.nulls(len(examples), examples[column].type)
            joined = joined.append_column(column, values)
        return joined.append_column("request_id", examples["request_id"])

    def assemble(
        self,
        joined: pa.Table,
        request_ids: pa.Array | pa.ChunkedArray,
        tokens: TokenSpec | None = None,
        visible: int | None = None,
        counts: int | Literal["exact"] | None = None,
    ) -> JoinedRequests:
        """Group joined rows by request; rows of a request stand together.

        Args:
            joined: keys and time, labels, context, and features of users, items and impressions.
            visible: events before a request that anything may be read of, statistics of the user
                among it; default: all.
            counts: as `Sample` has them.
        """
        contract = self.contract
        log = self.log
        item = contract.item.join_key
        user = contract.user.join_key
        # 1. Requests: where each begins, its user and time, its candidates as item keys.
        joined = joined.combine_chunks()
        request_ids = whole(request_ids)
        starts = _request_starts(request_ids)
        offsets = np.r_[starts, len(request_ids)].astype(np.int64)
        first = pa.array(starts)
        candidates = joined[item].combine_chunks()
        keys, items = keys_of(candidates, log.items)
        users = joined[user].combine_chunks().take(first)
        ends = pc.fill_null(
            joined["history_end"].combine_chunks().take(first).cast(pa.int64()), 0
        ).to_numpy()
        rows = log.rows_of(users)
        times = micros(joined[EVENT_TIMESTAMP].combine_chunks().take(first))

        # 2. Histories, sketches and tokens are read late, of the requests of a batch alone.
        gather = late_gather(log, rows, ends, times, visible)
        layout = Layout.of(contract, None if counts == "exact" else counts)
        recall = Recall(log, layout, newest=visible, exact=counts == "exact")

        def read_sketch(
            chosen: np.ndarray, within: np.ndarray, codes: Sequence[np.ndarray]
        ) -> Readings:
            return recall.read(rows[chosen], ends[chosen], times[chosen], within, codes)

        owner_times = np.repeat(times, np.diff(offsets))

        def read_shares(codes: Sequence[np.ndarray], counts: np.ndarray) -> np.ndarray:
            return self.shares.read(codes, owner_times, counts)

        gather_tokens = None
        token_rows = None
        if tokens is not None:
            token_log = TokenLog(contract, self.settings.home, tokens.version)
            token_rows = pc.fill_null(
                joined[TOKEN_ROW.name].combine_chunks().take(first).cast(pa.int64()), -1
            ).to_numpy()

            if not (token_rows >= 0).any():
                raise StaleFeaturesError(
                    f"no request of this period has summary tokens of version {tokens.version}: build them as they were then with "
                    "`python -m beam_jobs summary_tokens --full --every_days 7`"
                )

            def gather_tokens(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
                return token_log.gather(token_rows[chosen], tokens.shape)

        # 3. Columns: once for each request, or for each candidate.
        of_request = (*contract.user_columns, *contract.spec.context_features)
        of_item = (*contract.item_columns, *contract.spec.shown_features)
        user_columns = {c.name: _stored(joined[c.name], c).take(first) for c in of_request}
        if visible is not None:
            user_columns |= visible_stats(log, rows, ends, times, visible)
        requests = RequestColumns(
            times=times,
            user_columns=user_columns,
            items=items,
            candidate_offsets=offsets,
            candidate_keys=keys,
            candidate_columns={c.name: _stored(joined[c.name], c) for c in of_item},
            gather=gather,
            labels=np.stack([floats(joined[name]) for name in contract.labels], axis=1),
            gather_tokens=gather_tokens,
            read_sketch=read_sketch,
            read_shares=read_shares,
        )
        return JoinedRequests(requests, request_ids.take(first), users, log, rows, ends, token_rows)

    def refuse_broken(self, joined: pa.Table, split: str) -> None:
        """Check every joined row against the contract's limits.

        Raises:
            GateError: a row is outside of them.
        """
        table = training_set_table(self.contract)
        checked = limits.check(table, joined.select([c.name for c in table.all_columns]))
        if len(checked.dead):
            findings = [
                f"  {reason}: {number:,} rows"
                for reason, number in Counter(checked.reasons).items()
            ]
            raise expectations.GateError(
                "\n".join([f"joined features of the {split} period break the contract:", *findings])
            )

    def gate(self, joined: Iterable[pa.Table], split: str) -> None:
        """Great Expectations over rows of a joined period.

        Raises:
            GateError: joined features break the contract.
        """
        suite = f"training_set_{split}"
        expectations.gate(
            training_set_table(self.contract),
            joined,
            self.settings.path("expectations"),
            0.0,
            suite=suite,
        )


def late_gather(
    log: HistoryLog, rows: np.ndarray, ends: np.ndarray, times: np.ndarray, visible: int | None
) -> GatherHistories:
    """Histories of a period's requests, read from the log when a batch asks for them.

    Args:
        rows: row of each request's user in the log, -1 for none.
        ends: events known at each request.
        times: of the requests, microseconds.
        visible: newest events before a request that are known; None: all.
    """

    def gather(chosen: np.ndarray, length: int) -> Histories:
        newest = length if visible is None else min(length, visible)
        return log.gather(rows[chosen], ends[chosen], newest, times=times[chosen])

    return gather


def _cut(rows: pa.Table, most: int) -> Iterator[pa.Table]:
    """Whole requests, at most so many rows at a time, or one request's."""
    bounds = np.r_[_request_starts(rows["request_id"]), len(rows)].astype(np.int64)
    start = 0
    while start < len(rows):
        last = int(np.searchsorted(bounds, start + most, side="right")) - 1
        stop = max(int(bounds[last]), int(bounds[bounds > start][0]))
        yield rows.slice(start, stop - start)
        start = stop


def _each(rows: pa.Table, every: int) -> pa.Table:
    if every == 1:
        return rows
    starts = _request_starts(rows["request_id"])
    number = np.repeat(np.arange(len(starts)), np.diff(np.r_[starts, len(rows)]))
    return rows.filter(pa.array(number % every == 0)).combine_chunks()


def _capped(rows: pa.Table, user: str, most: int | None) -> pa.Table:
    """At most so many requests of each user, spread evenly."""
    if most is None or not len(rows):
        return rows
    starts = _request_starts(rows["request_id"])
    owner = whole(rows[user]).dictionary_encode().indices.to_numpy()[starts]
    number = np.bincount(owner)[owner]
    order = np.argsort(owner, kind="stable")
    first = np.searchsorted(owner[order], owner)
    place = np.empty(len(starts), np.int64)
    place[order] = np.arange(len(starts))
    rank = place - first
    kept = (rank + 1) * most // number > rank * most // number
    kept |= number <= most
    lengths = np.diff(np.r_[starts, len(rows)])
    return rows.filter(pa.array(kept.repeat(lengths))).combine_chunks()


def _request_starts(request_ids: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Rows at which another request begins."""
    ids = whole(request_ids).dictionary_encode().indices.to_numpy()
    return np.flatnonzero(np.r_[True, np.diff(ids) != 0][: len(ids)])


def _stored(column: pa.ChunkedArray, declared: Column) -> pa.Array:
    """A joined column in one chunk and of the contract's type: a store may widen it on the way."""
    return column.combine_chunks().cast(arrow_type(declared.dtype))


def refuse_nothing_positive(contract: Contract, name: str, positives: np.ndarray) -> None:
    """Refuse a period from which nothing can be learned, chosen or measured.

    Args:
        positives: number of each task's.

    Raises:
        DataError: a task that is ranked by has none.
    """
    rules = contract.spec.requests
    for number, task in enumerate(contract.spec.tasks):
        ranked = contract.spec.weights.get(task.name, 0) > 0
        if ranked and not positives[number]:
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


class Fitting:
    """Vocabularies and quantiles of every column that a ranker looks up, from the training period
    alone, piece by piece.

    Args:
        min_item_count: rarer items share one embedding.

    Example:
        >>> fitting = Fitting(contract, min_item_count=5)
        >>> for piece in pieces:
        ...     fitting.add(piece.requests)
        >>> encoder = Encoder(contract, fitting.found(), history_length=128)
    """

    def __init__(self, contract: Contract, min_item_count: int) -> None:
        self.contract = contract
        self.min_item_count = min_item_count
        # Id and number of rows
        self._items: pa.Table | None = None
        self._values: dict[str, pa.Array] = {}

    def add(self, requests: RequestColumns) -> None:
        """Take a piece's values into account."""
        contract = self.contract
        labels = requests.labels
        assert labels is not None
        # Drawn negatives say nothing of which items there is enough to learn about.
        drawn = contract.spec.requests.examples is Examples.ACTIONS
        keys = requests.candidate_keys
        positive = keys[(labels == 1).any(axis=1)] if drawn else keys
        number = np.bincount(positive, minlength=len(requests.items))
        counted = pa.table({"item": requests.items, "number": number}).filter(pa.array(number > 0))
        # Merged with the counts so far, so that memory follows items, not rows.
        both = counted if self._items is None else pa.concat_tables([self._items, counted])
        sums = both.group_by("item").aggregate([("number", "sum")])
        self._items = sums.select(["item", "number_sum"]).rename_columns(["item", "number"])
        for columns, values in (
            (contract.request_features, requests.user_columns),
            (contract.candidate_features, requests.candidate_columns),
        ):
            for column in columns:
                if column.is_categorical:
                    self._collect(column, column.name, values[column.name])
        categorical = [c for c in contract.event_features if c.is_categorical]
        if categorical:
            # Of a sample of requests, so that few histories are read.
            events = events_of(requests.gather, len(requests), contract.spec.num_history_online)
            for column in categorical:
                codes = events.columns[column.name].ravel()
                known = codes if column.buckets else codes[codes != NO_VALUE]
                self._collect(column, event_key(column.name), pa.array(known))

    def found(self) -> dict[str, Index]:
        """An index for the items, and for each categorical column."""
        contract = self.contract
        assert self._items is not None
        often = self._items.filter(pc.greater_equal(self._items["number"], self.min_item_count))
        indices: dict[str, Index] = {
            contract.item.join_key: Vocabulary(whole(often["item"]).sort())
        }
        for column in (*contract.request_features, *contract.candidate_features):
            if column.is_categorical:
                indices[column.name] = fitted(column, self._values[column.name])
        for column in contract.event_features:
            if column.is_categorical:
                key = event_key(column.name)
                indices[key] = fitted(column, self._values[key])
        return indices

    def _collect(self, column: Column, key: str, values: pa.Array) -> None:
        """Collect each value of a category once, and an evenly spread sample of numbers in buckets."""
        if column.hashed is not None:
            values = values.slice(0, 0)
        if pa.types.is_list(values.type):
            values = pc.list_flatten(values)
        before = self._values.get(key, values.slice(0, 0))
        both = pa.concat_arrays([before, values])
        if column.buckets is None:
            self._values[key] = pc.unique(both)
            return
        step = -(-len(both) // SAMPLED_NUMBERS) or 1
        self._values[key] = both.take(pa.array(np.arange(0, len(both), step)))
