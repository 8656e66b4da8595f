"""Stored columns → numbers → batches, the same way for training and serving: `RequestColumns →
featurise → collate → Batch`; there is no second path.

What a kind of column becomes is said in `columns.py`; shape letters in `batch.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from feature_repo.contract.arrow import arrow_type, value_codes
from feature_repo.contract.contract import Contract
from feature_repo.history import user_stats
from feature_repo.history.counts import Readings
from feature_repo.history.history import Histories, as_numbers
from feature_repo.history.sketch import Layout
from feature_repo.history.transforms import (
    CONTEXT_FIELDS,
    USER_FEATURES,
    context_fields,
    event_ages,
    squash,
    user_features,
)
from modeling.inputs.batch import Batch, Candidates, FeatureSizes, UserInputs
from modeling.inputs.between import Between, Compared
from modeling.inputs.columns import (
    Index,
    Vocabulary,
    ages,
    floats,
    group_of,
    within,
)
from modeling.inputs.items import ItemNumbers, ReadShares, by_column, with_shares
from modeling.inputs.relations import Relations
from modeling.inputs.shards import Rows

GatherHistories = Callable[[np.ndarray, int], Histories]
GatherTokens = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
# (request numbers, offsets of their candidates, the candidates' codes for each column that a sketch
# counts) → what each user's sketch says of them, N × columns × counts
ReadSketch = Callable[[np.ndarray, np.ndarray, Sequence[np.ndarray]], Readings]
# Requests whose histories decide how events are scaled, and which values they have
SAMPLED_REQUESTS = 4_096


@dataclass(frozen=True, kw_only=True)
class RequestInputs:
    """Requests, all but their candidates' own columns. Candidates of request b are
    `[candidate_offsets[b], candidate_offsets[b + 1])`.

    Equal items have equal keys among `candidate_keys` and the histories' `item_keys`.
    """

    # int64 microseconds, B
    times: np.ndarray
    # Features and statistics of users, context; B
    user_columns: dict[str, pa.Array]
    candidate_offsets: np.ndarray
    candidate_keys: np.ndarray
    # (request numbers, length) → their newest events
    gather: GatherHistories
    # N × T; NaN where a task is undefined
    labels: np.ndarray | None = None
    # Request numbers → tokens_BSX, and which have some
    gather_tokens: GatherTokens | None = None
    # None: nothing is known of the users' whole past
    read_sketch: ReadSketch | None = None

    def __len__(self) -> int:
        return len(self.times)


@dataclass(frozen=True, kw_only=True)
class RequestColumns(RequestInputs):
    """Requests as the stores give them.

    Args:
        items: item ids by item key.
        candidate_columns: features and statistics of items, impressions; N.
        read_shares: of the candidates' values, as of the requests; None: they are not known.
    """

    items: pa.Array
    candidate_columns: dict[str, pa.Array]
    read_shares: ReadShares | None = None


@dataclass(frozen=True)
class Encoded:
    """Requests as numbers, flat, in memory or on disk; `collate` pads any selection of them into a
    Batch.
    """

    times: np.ndarray
    field_BU: Rows
    dense_BG: Rows
    candidate_offsets: np.ndarray
    candidate_item: Rows
    candidate_category: Rows
    candidate_dense: Rows
    labels: Rows  # N × T
    item_of_key: np.ndarray
    gather: GatherHistories
    gather_tokens: GatherTokens | None = None
    # Events known at each request; None: not known
    history_lengths: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.times)

    @property
    def num_candidates(self) -> np.ndarray:
        return np.diff(self.candidate_offsets)

    @property
    def events_known(self) -> np.ndarray:
        """Events known at each request; 0 where that is not known."""
        none = np.zeros(len(self), np.int64)
        return none if self.history_lengths is None else self.history_lengths


@dataclass(frozen=True)
class Window:
    """Which events of a history are read: the newest `length`, but that the first one's place is a multiple of `block`.

    >>> Window(4, block=2)(np.array([3, 4, 5, 6, 7]))
    array([3, 4, 3, 4, 3])
    """

    length: int
    block: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.block <= self.length:
            raise ValueError(
                f"history_block is {self.block}: it is at least 1, and at most history_length, {self.length}"
            )

    def __call__(self, known_B: np.ndarray) -> np.ndarray:
        """How many of the newest events are read of histories of so many."""
        beyond = np.maximum(known_B - self.length, 0)
        return known_B + -beyond // self.block * self.block


class Encoder:
    """Turns stored columns into model inputs, the same way for training and serving.

    Args:
        vocabularies: by column name; the item id's under the item's join key, event columns' under `event_key`.
        history_length: events that the model reads; match features read all that are kept online.
        tokens: number and width of stored summary tokens, where the model reads some.
        relations: of items; default: nothing is known of them.
        history_block: see `Window`.
    """

    def __init__(
        self,
        contract: Contract,
        vocabularies: dict[str, Index],
        history_length: int,
        tokens: tuple[int, int] = (0, 0),
        relations: Relations | None = None,
        history_block: int = 1,
    ) -> None:
        self.contract = contract
        self.relations = relations or Relations.none(arrow_type(contract.item.dtype))
        self.between = Between(contract, self.relations)
        self.vocabularies = vocabularies
        self.history_length = history_length
        self.window = Window(history_length, history_block)
        self.tokens = tokens
        self.item_key = contract.item.join_key
        self.request = group_of(contract.request_features, vocabularies)
        self.candidate = group_of(contract.candidate_features, vocabularies)
        self.event = group_of(contract.event_features, vocabularies, events=True)
        categorical = [c for c in contract.item_columns if c.kind and c.is_categorical]
        self.own_item = group_of(categorical, vocabularies)
        self.stat_columns = tuple(c.name for c in contract.table("item_stats").columns)

    @property
    def items(self) -> Vocabulary:
        """Items that have a row of their own."""
        found = self.vocabularies[self.item_key]
        assert isinstance(found, Vocabulary)
        return found

    @property
    def user_dense_names(self) -> tuple[str, ...]:
        """Numbers of a request: of its user and its context."""
        return (*USER_FEATURES, *self.request.dense_names)

    @property
    def dense_names(self) -> tuple[str, ...]:
        """Names of the dense candidate features, in order."""
        return (*self.stat_columns, *self.between.names, *self.candidate.dense_names)

    @property
    def sizes(self) -> FeatureSizes:
        """Sizes that a model is built for."""
        request = self.request.sizes
        candidate = self.candidate.sizes
        context = tuple(CONTEXT_FIELDS.values())
        return FeatureSizes(
            items=self.items.size,
            actions=len(self.contract.spec.actions),
            history_length=self.history_length,
            request=replace(
                request,
                categories=(*request.categories, *context),
                slots=(*request.slots, *(1 for _ in context)),
                numbers=len(USER_FEATURES) + request.numbers,
            ),
            candidate=replace(
                candidate,
                numbers=len(self.dense_names) - len(self.candidate.dense_names) + candidate.numbers,
            ),
            event=self.event.sizes,
            item=self.own_item.sizes,
            tasks=len(self.contract.spec.tasks),
            tokens=self.tokens,
        )

    def featurise(self, requests: RequestColumns, chunk: int = 1024) -> Encoded:
        """Numbers for all requests at once."""
        candidates = self.item_numbers(
            requests.candidate_columns, requests.items, requests.candidate_keys
        )
        if requests.read_shares is not None:
            candidates = with_shares(self.contract, candidates, requests.read_shares)
        return self.encode(
            requests,
            candidates,
            self.items.indices_of(requests.items),
            self.relations.rows_of(requests.items),
            chunk,
        )

    def item_numbers(
        self, columns: dict[str, pa.Array], ids: pa.Array, keys: np.ndarray | None = None
    ) -> ItemNumbers:
        """Numbers of items; their shares are not known yet (`with_shares`).

        Args:
            columns: their features and statistics, N.
            ids: item ids; by `keys`, N of them, where these are given.
        """
        rows = self.items.indices_of(ids)
        relation_rows = self.relations.rows_of(ids)
        codes = value_codes(ids)
        # Each id is looked up once, however many candidates it stands for.
        if keys is not None:
            rows = rows[keys]
            relation_rows = relation_rows[keys]
            codes = codes[keys]
        number = len(rows)
        dense = np.empty((number, len(self.stat_columns) + self.candidate.sizes.dense), np.float32)
        for index, name in enumerate(self.stat_columns):
            dense[:, index] = squash(floats(columns[name]))
        # An age counts from a request, which is not known here.
        dense[:, len(self.stat_columns) :] = self.candidate.dense(
            columns, np.zeros(number, np.int64)
        )
        moments = [as_numbers(c, columns[c.name]) for c in self.candidate.aging]
        # As they are, beside the squashed ones: match features calculate with them.
        stats = [floats(columns[name]) for name in ("count_total", "other_total")]
        value = self.contract.spec.stat_value
        stats.append(floats(columns[f"mean_{value}"]) if value else np.full(number, np.nan))
        known = ~(np.isnan(stats[0]) & np.isnan(floats(columns["item_known"])))
        remembered = [as_numbers(c, columns[c.name]) for c in self.contract.remembered]
        return ItemNumbers(
            vocabulary_row=rows,
            relation_row=relation_rows,
            category=self.candidate.categories(columns, number).astype(np.int32),
            dense=dense,
            moments=np.stack(moments, axis=1) if moments else np.zeros((number, 0), np.int64),
            stats=np.stack(stats, axis=1),
            known=known,
            codes=np.column_stack([codes, *remembered]),
            shares=np.full((number, len(Layout.of(self.contract).names)), np.nan, np.float32),
        )

    def encode(
        self,
        requests: RequestInputs,
        candidates: ItemNumbers,
        item_of_key: np.ndarray,
        relation_of_key: np.ndarray,
        chunk: int = 1024,
    ) -> Encoded:
        """Numbers for all requests at once; what reads histories goes chunk by chunk, so that they
        are never all in memory.

        Args:
            candidates: of all requests, N.
            item_of_key: row of the vocabulary of each item key.
            relation_of_key: row of the relations of each item key.
        """
        number = len(requests)
        offsets = requests.candidate_offsets
        keys = requests.candidate_keys
        # 1. Columns as they are stored.
        fields_BU = np.concatenate(
            [
                self.request.categories(requests.user_columns, number),
                context_fields(requests.times),
            ],
            axis=1,
        )
        own_BG = self.request.dense(requests.user_columns, requests.times)
        dense_BG = np.empty((number, len(USER_FEATURES) + own_BG.shape[1]), np.float32)
        dense_BG[:, len(USER_FEATURES) :] = own_BG
        dense = np.empty((len(keys), len(self.dense_names)), np.float32)
        stats = len(self.stat_columns)
        between = slice(stats, stats + len(self.between.names))
        dense[:, :stats] = candidates.dense[:, :stats]
        dense[:, between.stop :] = candidates.dense[:, stats:]
        if self.candidate.aging:
            owner_times = np.repeat(requests.times, np.diff(offsets))
            for place, moments in zip(
                self.candidate.aging_places, candidates.moments.T, strict=True
            ):
                dense[:, between.stop + place] = ages(moments, owner_times)

        # 2. What is between a request's history and its candidates.
        user = _user_stats(self.contract, requests)
        for start in range(0, number, chunk):
            chosen = np.arange(start, min(start + chunk, number))
            rows = slice(offsets[start], offsets[chosen[-1] + 1])
            asked = Compared(
                times=requests.times[chosen],
                histories=requests.gather(chosen, self.contract.spec.num_history_online),
                offsets=offsets[start : chosen[-1] + 2] - offsets[start],
                keys=keys[rows],
                candidates=candidates.take(rows),
                user_mean=user[-1][chosen],
                relation_of_key=relation_of_key,
            )
            readings = None
            if requests.read_sketch is not None:
                codes = by_column(self.contract, asked.candidates.codes)
                readings = requests.read_sketch(chosen, asked.offsets, codes)
            dense[rows, between] = self.between.numbers(asked, readings)
            dense_BG[chosen, : len(USER_FEATURES)] = user_features(
                asked.histories, asked.times, *(row[chosen] for row in user)
            )
        tasks = len(self.contract.spec.tasks)
        labels = np.zeros((len(keys), tasks)) if requests.labels is None else requests.labels
        return Encoded(
            times=requests.times,
            field_BU=fields_BU,
            dense_BG=dense_BG,
            candidate_offsets=offsets,
            candidate_item=candidates.vocabulary_row,
            candidate_category=candidates.category,
            candidate_dense=dense,
            labels=labels.astype(np.float32),
            item_of_key=item_of_key,
            gather=requests.gather,
            gather_tokens=requests.gather_tokens,
        )

    def events_read(self, encoded: Encoded) -> np.ndarray:
        """How many events a model reads of each request's history."""
        return self.window(encoded.events_known)

    def collate(self, encoded: Encoded, chosen: np.ndarray) -> Batch:
        """Pad the chosen requests into a Batch.

        Args:
            chosen: request numbers, in the order of the batch.
        """
        # 1. Users: histories, fields, and stored tokens where these are read.
        histories = encoded.gather(chosen, self.history_length)
        if self.window.block > 1 and encoded.history_lengths is not None:
            histories = histories.newest(self.window(encoded.history_lengths[chosen]))
        user = self.user_inputs(
            histories,
            encoded.times[chosen],
            encoded.field_BU[chosen],
            encoded.dense_BG[chosen],
            encoded.item_of_key,
        )
        if encoded.gather_tokens is not None:
            tokens, has = encoded.gather_tokens(chosen)
            user = replace(
                user,
                tokens_BSX=torch.from_numpy(tokens),
                has_tokens_B=None if has.all() else torch.from_numpy(has),
            )
        # 2. Candidates: the flat rows of the chosen requests, padded to B × C.
        lengths = encoded.num_candidates[chosen]
        width = max(int(lengths.max(initial=0)), 1)
        mask = np.arange(width) < lengths[:, None]
        flat = np.repeat(encoded.candidate_offsets[chosen], lengths) + within(lengths)
        pad = _Padder(mask)
        candidates = Candidates(
            item_BC=pad(encoded.candidate_item[flat]),
            category_BCK=pad(encoded.candidate_category[flat].astype(np.int64)),
            dense_BCF=pad(encoded.candidate_dense[flat]),
            mask_BC=torch.from_numpy(mask),
        )
        return Batch(user, candidates, pad(encoded.labels[flat]))

    def user_inputs(
        self,
        histories: Histories,
        times: np.ndarray,
        fields_BU: np.ndarray,
        dense_BG: np.ndarray,
        item_of_key: np.ndarray,
        before: np.ndarray | None = None,
    ) -> UserInputs:
        """Pad histories; the rest stays as it is.

        Args:
            before: time of the event before each history's first, microseconds, -1 without one; the
                first gap counts from it. Default: no event.
        """
        lengths = histories.lengths
        width = max(int(lengths.max(initial=0)), 1)
        mask = np.arange(width) < lengths[:, None]
        pad = _Padder(mask)
        gap = np.diff(histories.times, prepend=histories.times[:1]) / 86_400_000_000
        # The difference at a user's first event is to the last event of another user.
        starts = histories.offsets[:-1][lengths > 0]
        gap[starts] = 0
        if before is not None:
            # A chunk of a longer history goes on from the event before the chunk.
            known = before[lengths > 0]
            gap[starts] = np.where(known >= 0, histories.times[starts] - known, 0) / 86_400_000_000
        categories = None
        if self.event.categorical:
            categories = pad(self.event.event_categories(histories.columns))
        return UserInputs(
            item_BL=pad(item_of_key[histories.item_keys]),
            action_BL=pad(histories.columns["action"].astype(np.int64)),
            age_BL=pad(event_ages(histories, times)),
            gap_BL=pad(np.log1p(np.maximum(gap, 0)).astype(np.float32)),
            event_BLE=pad(self.event.event_dense(histories.columns, histories.times)),
            mask_BL=torch.from_numpy(mask),
            field_BU=torch.from_numpy(fields_BU),
            dense_BG=torch.from_numpy(dense_BG),
            event_category_BLJ=categories,
        )


def _user_stats(contract: Contract, requests: RequestInputs) -> list[np.ndarray]:
    """First event, events, other events, mean value of each request's user; NaN where unknown."""
    unknown = np.full(len(requests), np.nan)
    names = user_stats.read_names(contract)
    return [floats(requests.user_columns[name]) if name else unknown for name in names]


def events_of(gather: GatherHistories, requests: int, length: int) -> Histories:
    """Newest events of up to `SAMPLED_REQUESTS` requests, spread evenly: what the training period
    knows of events.
    """
    chosen = np.unique(np.linspace(0, max(requests - 1, 0), SAMPLED_REQUESTS).astype(np.int64))
    return gather(chosen[:requests], length)


class _Padder:
    """Flat rows into a padded tensor of torch's own memory: its fixed alignment keeps sums the same
    from run to run.
    """

    def __init__(self, mask: np.ndarray) -> None:
        self.mask = mask
        self.full = bool(mask.all())

    def __call__(self, flat: np.ndarray) -> Tensor:
        if self.full:
            return torch.from_numpy(flat).view(*self.mask.shape, *flat.shape[1:]).clone()
        padded = torch.zeros(
            (*self.mask.shape, *flat.shape[1:]), dtype=torch.from_numpy(flat[:0]).dtype
        )
        padded.numpy()[self.mask] = flat
        return padded
