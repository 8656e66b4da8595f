"""What items have to do with each other, and what that says of a candidate beside a history.

Neighbours are the items that the same users have more often than chance has it, by positive pointwise mutual
information (Church and Hanks, 1990; Levy and Goldberg, 2014), those first that say it of most users; vectors are the
leading eigenvectors of that matrix; factors are the leading singular vectors of who had what (PureSVD: Cremonesi, Koren
and Turrin, 2010); text vectors come of the words that describe an item. `training_set/item_relations.py` fits them.
Neighbours, vectors and factors know only what lies before the requests that read them: a training set is cut into
slices of time, a bundle has the newest. Texts are as they were known when training ended.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from feature_repo.contract.key_index import KeyIndex

RELATION_FEATURES = (
    # log1p: strength of all neighbours of the candidate that are in the history
    "near_all",
    # log1p: of the strongest
    "near_most",
    # Cosine to the history's items, the mean
    "near_taste",
    # Cosine of the text to the item of the history that is most like it
    "near_text",
    # The first and the third of the newest events alone: what somebody is at just now
    "near_lately",
    "near_taste_lately",
    # How far the factors of the history's items, taken together, hold the candidate too; and of the newest events alone
    "near_factors",
    "near_factors_lately",
)
# Newest events that are "lately"
LATELY = 20
# File beside a run, a training set, in a bundle
RELATIONS = "relations.arrow"
# Fields of a slice that are columns there
SLICE_COLUMNS = ("neighbours_IK", "strengths_IK", "vectors_ID", "factors_IF")
# A time before all others
ALWAYS = np.iinfo(np.int64).min


class Near(NamedTuple):
    """How near N candidates are to some items.

    Args:
        all_N: strength of all of a candidate's neighbours that are there.
        most_N: of the strongest.
        taste_N: the mean cosine of vectors.
        factors_N: the product of factors with their sum there, over √(number of items).
    """

    all_N: np.ndarray
    most_N: np.ndarray
    taste_N: np.ndarray
    factors_N: np.ndarray


class Own(NamedTuple):
    """What a slice holds of N candidates: their rows of its fields."""

    neighbours_NK: np.ndarray
    strengths_NK: np.ndarray
    vectors_ND: np.ndarray
    factors_NF: np.ndarray


@dataclass(frozen=True)
class Slice:
    """Who goes with whom, by what was known until a time. Row 0 is an unknown item.

    Args:
        known_from: microseconds; requests from then on may read it.
        neighbours_IK: rows of items; 0 where there are fewer. Items behind the last row have none.
        strengths_IK: float32.
        vectors_ID: float32, of length 1; zeros of an item without neighbours.
        factors_IF: float32, columns orthonormal over the items.
    """

    known_from: int
    neighbours_IK: np.ndarray
    strengths_IK: np.ndarray
    vectors_ID: np.ndarray
    factors_IF: np.ndarray

    def own(self, rows_N: np.ndarray) -> Own:
        """What is held of candidates; row 0, which has no neighbour, stands for items behind the last."""
        rows = np.where(rows_N < len(self.neighbours_IK), rows_N, 0)
        return Own(*(getattr(self, name).take(rows, axis=0) for name in SLICE_COLUMNS))

    def near(self, own: Own, rows: np.ndarray, asked_N: np.ndarray | None = None) -> Near:
        """How near candidates are to what is there.

        Args:
            rows: of what is there, each once.
            asked_N: candidates that may have a neighbour there; default: all may.
        """
        many = len(self.neighbours_IK)
        others = np.where(rows < many, rows, 0)
        there = np.zeros(many, np.float32)
        there[others] = 1
        there[0] = 0
        asked = slice(None) if asked_N is None else np.flatnonzero(asked_N)
        strengths_NK = there.take(own.neighbours_NK[asked]) * own.strengths_NK[asked]
        all_N = np.zeros(len(own.neighbours_NK), np.float32)
        most_N = np.zeros_like(all_N)
        all_N[asked] = strengths_NK.sum(axis=1)
        most_N[asked] = strengths_NK.max(axis=1, initial=0)
        together = self.factors_IF[others].sum(axis=0) / np.sqrt(np.float32(len(others)))
        return Near(
            all_N,
            most_N,
            own.vectors_ND @ self.vectors_ID[others].mean(axis=0),
            own.factors_NF @ together,
        )


@dataclass(frozen=True)
class Relations:
    """Relations of items, over time.

    Args:
        ids: of the items; row n + 1 is item n.
        text_IE: text vectors, float32, of length 1; zeros of an item without words.
        slices: oldest first.

    Example:
        >>> relations = Relations.none(pa.string())
        >>> relations.features(0, np.array([3]), np.array([4])).tolist()
        [[nan, nan, nan, nan, nan, nan, nan, nan]]
    """

    ids: pa.Array
    text_IE: np.ndarray
    slices: Sequence[Slice]
    _index: KeyIndex = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_index", KeyIndex(self.ids))

    @staticmethod
    def none(kind: pa.DataType) -> Relations:
        """Of no item."""
        return Relations(pa.array([], kind), np.zeros((1, 0), np.float32), ())

    def newest(self) -> Relations:
        """With the newest slice alone, for any time."""
        kept = [replace(one, known_from=ALWAYS) for one in self.slices[-1:]]
        return Relations(self.ids, self.text_IE, kept)

    def rows_of(self, ids: pa.Array) -> np.ndarray:
        """Row of each item, int64; 0 of one that is not known here."""
        return self._index.places(ids) + 1

    def features(self, time: int, history: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """What the relations say of one request's candidates, float32, N × `RELATION_FEATURES`.

        NaN where nothing is known: of an unknown candidate, without a known event, or before the first slice.

        Args:
            time: of the request, microseconds.
            history: rows of the events' items, oldest first.
            candidates: rows of N items.
        """
        found_FN = np.full((len(RELATION_FEATURES), len(candidates)), np.nan, np.float32)
        known = candidates > 0
        rows = np.unique(history[history > 0])
        if not len(rows) or not known.any():
            return found_FN.T
        # Nearly always all of them, whose places need not be looked up.
        at = slice(None) if known.all() else np.flatnonzero(known)
        asked = candidates[at]
        now = [one for one in self.slices if one.known_from <= time][-1:]
        for one in now:
            own = one.own(asked)
            near = one.near(own, rows)
            found_FN[0, at] = np.log1p(near.all_N)
            found_FN[1, at] = np.log1p(near.most_N)
            found_FN[2, at] = near.taste_N
            found_FN[6, at] = near.factors_N
            newest = history[-LATELY:]
            if (newest > 0).any():
                # Who has no neighbour in the whole history has none in the newest part of it.
                lately = one.near(own, np.unique(newest[newest > 0]), near.most_N > 0)
                found_FN[4, at] = np.log1p(lately.all_N)
                found_FN[5, at] = lately.taste_N
                found_FN[7, at] = lately.factors_N
        if self.text_IE.shape[1]:
            # An item is like itself; what matters is which others are.
            alike = self.text_IE[asked] @ self.text_IE[rows].T
            place = np.searchsorted(rows, asked)
            its = np.flatnonzero(rows[np.minimum(place, len(rows) - 1)] == asked)
            alike[its, place[its]] = -1
            found_FN[3, at] = alike.max(axis=1)
        return found_FN.T

    def to_bytes(self) -> bytes:
        """As an Arrow file; equal relations give equal bytes."""
        columns: dict[str, pa.Array] = {"id": self.ids, "text": _lists(self.text_IE, len(self.ids))}
        for number, one in enumerate(self.slices):
            for name in SLICE_COLUMNS:
                columns[f"{name}_{number}"] = _lists(getattr(one, name), len(self.ids))
        times = ",".join(str(one.known_from) for one in self.slices)
        table = pa.table(columns).replace_schema_metadata({"known_from": times})
        sink = io.BytesIO()
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_file(sink, table.schema, options=options) as writer:
            writer.write_table(table)
        return sink.getvalue()


def write_relations(relations: Relations, path: Path) -> None:
    """Write relations as one file."""
    path.write_bytes(relations.to_bytes())


def read_relations(path: Path) -> Relations:
    """The relations that `write_relations` wrote.

    Raises:
        ValueError: the file holds none.
    """
    try:
        table = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all().combine_chunks()
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is no Arrow file: {error}") from error
    times = (table.schema.metadata or {}).get(b"known_from")
    if times is None or table.column_names[:2] != ["id", "text"]:
        raise ValueError(f"{path} holds no relations of items")
    slices = [
        Slice(int(time), *(_rows(table[f"{name}_{number}"]) for name in SLICE_COLUMNS))
        for number, time in enumerate(filter(None, times.decode().split(",")))
    ]
    return Relations(table["id"].combine_chunks(), _rows(table["text"]), slices)


def _lists(rows: np.ndarray, items: int) -> pa.Array:
    """All rows but that of the unknown item; null behind the last, and where a row has no number."""
    if not rows.shape[1]:
        return pa.nulls(items)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(rows[1:].ravel()), rows.shape[1])
    return pa.concat_arrays([lists, pa.nulls(items - len(lists), lists.type)])


def _rows(column: pa.ChunkedArray) -> np.ndarray:
    lists = column.combine_chunks()
    if pa.types.is_null(lists.type):
        return np.zeros((len(lists) + 1, 0), np.float32)
    lists = lists.slice(0, len(lists) - lists.null_count)
    width = lists.type.list_size
    values = lists.flatten().to_numpy().reshape(len(lists), width)
    return np.concatenate([np.zeros((1, width), values.dtype), values])
