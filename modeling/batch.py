"""Batch: the typed tensors that every model takes, and how stored columns become them.

Training and serving both go `RequestColumns → featurise → collate → Batch`; there is no second
path. Shape letters: B requests, L history, C candidates, E event features, U user and context
fields, G dense user features, K item category slots, F dense candidate features, T tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from feature_repo.history import Histories
from feature_repo.key_index import KeyIndex
from feature_repo.schema import Contract, DType
from feature_repo.transforms import (
    CONTEXT_FIELDS,
    MATCH_FEATURES,
    USER_FEATURES,
    context_fields,
    event_ages,
    match_features,
    squash,
    user_features,
)

GatherHistories = Callable[[np.ndarray, int], Histories]
GatherTokens = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
NOT_EVENTS = (
    "field_BU",
    "dense_BG",
    "tokens_BSX",
    "has_tokens_B",
)  # fields of UserInputs that have no history axis
UNKNOWN_PRIOR = 0.5  # how often a positive is made unknown in training, for each negative
MAX_CATEGORIES = 8  # values kept of a list feature, such as genres


class _Tensors:
    """Dataclasses of tensors: move and slice all at once."""

    def to(self, device: torch.device | str) -> Self:
        """All tensors on a device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        changed = {name: change(value) for name, value in values.items() if value is not None}
        return replace(self, **changed)  # type: ignore[type-var]


@dataclass(frozen=True)
class UserInputs(_Tensors):
    """What a model knows of the user and the request: history, oldest first and padded on the
    right, and features.
    """

    item_BL: Tensor  # int64 vocabulary index; 0 is unknown
    action_BL: Tensor  # int64
    age_BL: Tensor  # float32, log1p days before the request
    gap_BL: Tensor  # float32, log1p days since the event before; 0 for the first
    event_BLE: Tensor  # float32 event features
    mask_BL: Tensor  # bool, True where there is an event
    field_BU: Tensor  # int64 user and context fields
    dense_BG: Tensor  # float32 user features; NaN where one is not known
    tokens_BSX: Tensor | None = (
        None  # float32 summary tokens from a store, zeros where a user has none
    )
    has_tokens_B: Tensor | None = None  # bool

    def events(self, start: int, stop: int | None = None) -> UserInputs:
        """The same users with only the events `[start, stop)` of the padded history."""
        cut = {
            f.name: getattr(self, f.name)[:, start:stop]
            for f in fields(self)
            if f.name not in NOT_EVENTS
        }
        return replace(self, **cut)


@dataclass(frozen=True)
class Candidates(_Tensors):
    """Items to be ranked, padded on the right."""

    item_BC: Tensor  # int64 vocabulary index
    category_BCK: Tensor  # int64 category slots, 0 where empty
    dense_BCF: Tensor  # float32 item statistics and match features; NaN where one is not known
    mask_BC: Tensor  # bool, True where there is a candidate

    def select(self, index: Tensor | slice) -> Candidates:
        """Some candidates of every request, in the given order."""
        return self._map(lambda tensor: tensor[:, index])


@dataclass(frozen=True)
class Batch(_Tensors):
    """One batch of requests with their candidates, and labels where they are known."""

    user: UserInputs
    candidates: Candidates
    labels_BCT: Tensor  # float32; zeros at request time


@dataclass(frozen=True)
class FeatureSizes:
    """Sizes that a model is built for; they follow from contract and vocabularies."""

    items: int
    actions: int
    event_features: int
    user_fields: tuple[int, ...]
    categories: tuple[int, ...]  # vocabulary size of each category slot group
    slots: tuple[int, ...]  # slots of each group
    dense: int
    history_length: int
    user_dense: int = 0
    tasks: int = 1
    tokens: tuple[int, int] = (
        0,
        0,
    )  # number and width of stored summary tokens that a user may have


@dataclass(frozen=True)
class Vocabulary:
    """Known values of a column; a value's index starts at 1, everything else is 0."""

    values: pa.Array

    @property
    def size(self) -> int:
        """Embedding rows: the values and one for the unknown."""
        return len(self.values) + 1

    @cached_property
    def _index(self) -> KeyIndex:
        return KeyIndex(self.values)

    def indices_of(self, column: pa.Array | pa.ChunkedArray) -> np.ndarray:
        """Indices of a column's values, int64."""
        return self._index.places(column) + 1

    @staticmethod
    def of(column: pa.Array | pa.ChunkedArray, min_count: int = 1) -> Vocabulary:
        """Values that occur at least `min_count` times, sorted."""
        counts = pc.value_counts(
            column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        )
        values = counts.field("values").filter(pc.greater_equal(counts.field("counts"), min_count))
        return Vocabulary(values.filter(values.is_valid()).sort())


@dataclass(frozen=True)
class RequestColumns:
    """Requests as the stores give them. Candidates of request b are `[candidate_offsets[b],
    candidate_offsets[b + 1])`.

    `items` lists item ids by item key; `candidate_keys` and the histories' `item_keys` index it.
    """

    times: np.ndarray  # int64 microseconds, B
    user_columns: dict[str, pa.Array]  # user features and statistics, B
    items: pa.Array
    candidate_offsets: np.ndarray
    candidate_keys: np.ndarray
    candidate_columns: dict[str, pa.Array]  # item features and statistics, N
    gather: GatherHistories  # (request numbers, length) → their newest events
    labels: np.ndarray | None = None  # N
    gather_tokens: GatherTokens | None = None  # request numbers → tokens_BSX, and which have some

    def __len__(self) -> int:
        return len(self.times)


@dataclass(frozen=True)
class Encoded:
    """Requests as numbers, flat; `collate` pads any selection of them into a Batch."""

    times: np.ndarray
    field_BU: np.ndarray
    dense_BG: np.ndarray
    candidate_offsets: np.ndarray
    candidate_item: np.ndarray
    candidate_category: np.ndarray
    candidate_dense: np.ndarray
    labels: np.ndarray
    item_of_key: np.ndarray
    gather: GatherHistories
    gather_tokens: GatherTokens | None = None

    def __len__(self) -> int:
        return len(self.times)

    @property
    def num_candidates(self) -> np.ndarray:
        """Candidates of each request."""
        return np.diff(self.candidate_offsets)


class Encoder:
    """Turns stored columns into model inputs, the same way for training and serving.

    Args:
        contract: the dataset's contract.
        vocabularies: by column name; the item id's is under the item's join key.
        history_length: events that the model reads; match features read all that are kept online.
        tokens: number and width of stored summary tokens, where the model reads some.
    """

    def __init__(
        self,
        contract: Contract,
        vocabularies: dict[str, Vocabulary],
        history_length: int,
        tokens: tuple[int, int] = (0, 0),
    ) -> None:
        self.contract, self.vocabularies, self.history_length = (
            contract,
            vocabularies,
            history_length,
        )
        self.tokens = tokens
        spec = contract.spec
        self.item_key = contract.item.join_key
        self.stat_columns = tuple(c.name for c in contract.table("item_stats").columns)
        self.user_stats = (
            "first_event_s",
            "history_end",
            "other_events",
            f"user_mean_{spec.stat_value}",
        )
        self.item_ratios = ("count_total", "other_total", f"mean_{spec.stat_value}")
        self.user_fields = spec.ranking_user_features
        self.categories = spec.ranking_item_features
        self.event_columns = tuple(c.name for c in spec.event_features)
        self._slots = tuple(
            MAX_CATEGORIES
            if contract.table("item_profile").column(name).dtype is DType.STRING_LIST
            else 1
            for name in self.categories
        )

    @property
    def dense_names(self) -> tuple[str, ...]:
        """Names of the dense candidate features, in order."""
        return (*self.stat_columns, *MATCH_FEATURES)

    @cached_property
    def unknown_dense(self) -> np.ndarray:
        """Dense features of an item that nobody knows: no statistics, and no event of the user's
        with it.
        """
        values = np.full(len(self.dense_names), np.nan, np.float32)
        for name in ("match_times", "match_share", "match_other_times"):
            values[self.dense_names.index(name)] = 0
        return values

    def unknown_candidates(self, encoded: Encoded) -> Encoded:
        """The same requests, each with one candidate that nobody knows."""
        number = len(encoded)
        return replace(
            encoded,
            candidate_offsets=np.arange(number + 1),
            candidate_item=np.zeros(number, np.int64),
            candidate_category=np.zeros((number, encoded.candidate_category.shape[1]), np.int32),
            candidate_dense=np.tile(self.unknown_dense, (number, 1)),
            labels=np.zeros(number, np.float32),
        )

    def hide(self, batch: Batch, share: float, rng: np.random.Generator) -> Batch:
        """A batch in which a share of the candidates is unknown, and as large a share has lost its
        statistics alone.

        What is missing at request time, such as an item that is new or a store that was emptied, is
        thereby seen in training, and is scored by a prior: positives become unknown half as often
        as negatives (`UNKNOWN_PRIOR`), so that an item of which nothing is known ranks below what
        is known of the average candidate.
        """
        candidates = batch.candidates
        device, shape = candidates.item_BC.device, tuple(candidates.item_BC.shape)
        draw = torch.from_numpy(rng.random(shape, np.float32)).to(device)
        chance = torch.where(batch.labels_BCT[..., 0] > 0, share * UNKNOWN_PRIOR, share)
        unknown, bare = draw < chance, draw > 1 - share
        of_item = [*self.stat_columns, "value_ratio", "item_other_share"]
        column = torch.tensor([name in of_item for name in self.dense_names], device=device)
        nothing = torch.from_numpy(self.unknown_dense).to(device)
        dense = candidates.dense_BCF.masked_fill(bare[..., None] & column, torch.nan)
        hidden = replace(
            candidates,
            item_BC=candidates.item_BC.masked_fill(unknown, 0),
            category_BCK=candidates.category_BCK.masked_fill(unknown[..., None], 0),
            dense_BCF=torch.where(unknown[..., None], nothing, dense),
        )
        return replace(batch, candidates=hidden)

    @property
    def sizes(self) -> FeatureSizes:
        """What a model must be built for."""
        size = {name: vocabulary.size for name, vocabulary in self.vocabularies.items()}
        return FeatureSizes(
            items=size[self.item_key],
            actions=len(self.contract.spec.actions),
            event_features=len(self.event_columns),
            user_fields=(*(size[name] for name in self.user_fields), *CONTEXT_FIELDS.values()),
            categories=tuple(size[name] for name in self.categories),
            slots=self._slots,
            dense=len(self.dense_names),
            history_length=self.history_length,
            user_dense=len(USER_FEATURES),
            tokens=self.tokens,
        )

    def featurise(self, requests: RequestColumns, chunk: int = 1024) -> Encoded:
        """Numbers for all requests at once; what reads histories goes chunk by chunk, so that they
        are never all in memory.
        """
        number = len(requests)
        named = [
            self.vocabularies[name].indices_of(requests.user_columns[name])
            for name in self.user_fields
        ]
        fields_BU = np.concatenate(
            [
                np.array(named, np.int64).reshape(len(named), number).T,
                context_fields(requests.times),
            ],
            1,
        )
        user_stats = [_floats(requests.user_columns[name]) for name in self.user_stats]
        item_stats = [_floats(requests.candidate_columns[name]) for name in self.item_ratios]
        dense_BG = np.empty((number, len(USER_FEATURES)), np.float32)
        offsets, keys = requests.candidate_offsets, requests.candidate_keys
        dense = np.empty((len(keys), len(self.dense_names)), np.float32)
        for index, name in enumerate(self.stat_columns):
            dense[:, index] = squash(_floats(requests.candidate_columns[name]))
        for start in range(0, number, chunk):
            chosen = np.arange(start, min(start + chunk, number))
            first, last = offsets[start], offsets[chosen[-1] + 1]
            histories = requests.gather(chosen, self.contract.spec.num_history_online)
            within = offsets[start : chosen[-1] + 2] - first
            times, (first_event, events, others, mean) = (
                requests.times[chosen],
                (s[chosen] for s in user_stats),
            )
            count, other, item_mean = (s[first:last] for s in item_stats)
            dense[first:last, len(self.stat_columns) :] = match_features(
                histories, within, keys[first:last], times, (count, other, item_mean), mean
            )
            dense_BG[chosen] = user_features(histories, times, first_event, events, others, mean)
        item_of_key = self.vocabularies[self.item_key].indices_of(requests.items)
        return Encoded(
            times=requests.times,
            field_BU=fields_BU,
            dense_BG=dense_BG,
            candidate_offsets=offsets,
            candidate_item=item_of_key[keys],
            candidate_category=self._categories(requests),
            candidate_dense=dense,
            labels=np.zeros(len(keys), np.float32)
            if requests.labels is None
            else requests.labels.astype(np.float32),
            item_of_key=item_of_key,
            gather=requests.gather,
            gather_tokens=requests.gather_tokens,
        )

    def collate(self, encoded: Encoded, chosen: np.ndarray) -> Batch:
        """Pad the chosen requests into a Batch.

        Args:
            chosen: request numbers, in the order of the batch.
        """
        histories = encoded.gather(chosen, self.history_length)
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
                user, tokens_BSX=torch.from_numpy(tokens), has_tokens_B=torch.from_numpy(has)
            )
        lengths = encoded.num_candidates[chosen]
        width = max(int(lengths.max(initial=0)), 1)
        mask = np.arange(width) < lengths[:, None]
        flat = np.repeat(encoded.candidate_offsets[chosen], lengths) + _within(lengths)
        pad = _Padder(mask)
        candidates = Candidates(
            item_BC=pad(encoded.candidate_item[flat]),
            category_BCK=pad(encoded.candidate_category[flat].astype(np.int64)),
            dense_BCF=pad(encoded.candidate_dense[flat]),
            mask_BC=torch.from_numpy(mask),
        )
        return Batch(user, candidates, pad(encoded.labels[flat][:, None]))

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
                first gap counts from it. Default: there is none.
        """
        lengths = histories.lengths
        width = max(int(lengths.max(initial=0)), 1)
        mask = np.arange(width) < lengths[:, None]
        pad = _Padder(mask)
        gap = np.diff(histories.times, prepend=histories.times[:1]) / 86_400_000_000
        starts = histories.offsets[:-1][lengths > 0]
        gap[starts] = 0
        if before is not None:
            known = before[lengths > 0]
            gap[starts] = np.where(known >= 0, histories.times[starts] - known, 0) / 86_400_000_000
        events = np.zeros((len(histories.item_keys), len(self.event_columns)), np.float32)
        for index, name in enumerate(self.event_columns):
            events[:, index] = squash(histories.columns[name])
        return UserInputs(
            item_BL=pad(item_of_key[histories.item_keys]),
            action_BL=pad(histories.columns["action"].astype(np.int64)),
            age_BL=pad(event_ages(histories, times)),
            gap_BL=pad(np.log1p(np.maximum(gap, 0)).astype(np.float32)),
            event_BLE=pad(events),
            mask_BL=torch.from_numpy(mask),
            field_BU=torch.from_numpy(fields_BU),
            dense_BG=torch.from_numpy(dense_BG),
        )

    def _categories(self, requests: RequestColumns) -> np.ndarray:
        columns = []
        for name, slots in zip(self.categories, self._slots, strict=True):
            values, vocabulary = requests.candidate_columns[name], self.vocabularies[name]
            if isinstance(values, pa.ChunkedArray):
                values = values.combine_chunks()
            if slots == 1:
                columns.append(vocabulary.indices_of(values)[:, None])
                continue
            lengths = pc.fill_null(pc.list_value_length(values), 0).to_numpy(zero_copy_only=False)
            mask = np.arange(slots) < lengths[:, None]
            out = np.zeros(mask.shape, np.int64)
            flat = vocabulary.indices_of(pc.list_flatten(values))
            out[mask] = flat[_within(lengths) < slots]
            columns.append(out)
        total = len(requests.candidate_keys)
        return (
            np.concatenate(columns, axis=1).astype(np.int32)
            if columns
            else np.zeros((total, 0), np.int32)
        )


class _Padder:
    """Flat rows into a padded tensor of torch's own memory: its fixed alignment keeps sums the same
    from run to run.
    """

    def __init__(self, mask: np.ndarray) -> None:
        self.mask, self.full = mask, bool(mask.all())

    def __call__(self, flat: np.ndarray) -> Tensor:
        if self.full:
            return torch.from_numpy(flat).view(*self.mask.shape, *flat.shape[1:]).clone()
        padded = torch.zeros(
            (*self.mask.shape, *flat.shape[1:]), dtype=torch.from_numpy(flat[:0]).dtype
        )
        padded.numpy()[self.mask] = flat
        return padded


def _floats(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """A number column as float64, NaN where it is null."""
    return pc.fill_null(pc.cast(column, pa.float64(), safe=False), np.nan).to_numpy(
        zero_copy_only=False
    )


def _within(lengths: np.ndarray) -> np.ndarray:
    """0, 1, …, n-1 for each length n, joined."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
