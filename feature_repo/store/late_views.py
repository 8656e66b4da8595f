"""Views that no table holds, gathered once the join has said of whom and when: a history as lists, and summary tokens
as numbers (`feature_repo/history/lists.py`).

A list of the newest events, stored for each event, would hold every event as often as a list is long. Here each
request's list is read from the history log, which holds every event once, a batch of requests at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from feast.feature_view import FeatureView

from feature_repo import datasets
from feature_repo.contract.arrow import is_text, micros
from feature_repo.contract.contract import TOKEN_VERSION, Contract
from feature_repo.history import lists
from feature_repo.history.lists import MADE_OF, HistoryLists
from feature_repo.history.token_log import TokenLog
from feature_repo.raw.raw import whole_numbers
from feature_repo.store.entity_rows import TIME, EntityFrameError, EntityRows

# Name of the hidden view that says which row of the token log a request sees
ROWS = "token_rows"
ROW = "token_row"
# Values of a batch's lists, which bound its memory
MOST_VALUES = 4_000_000


@dataclass(frozen=True)
class LateView:
    """A view whose values are gathered.

    Args:
        names: of the asked features, by what the result calls them.
        user: the frame's column of users.
        version: the frame's column of token versions; "" of a history.
        length: events of a list, at most.
    """

    made_of: str
    dataset: str
    home: str
    names: dict[str, str]
    user: str
    version: str
    length: int

    @property
    def contract(self) -> Contract:
        return datasets.load_contract(self.dataset)

    @staticmethod
    def of(view: FeatureView, asked: Sequence[str], *, full: bool) -> LateView:
        """A view of the registry.

        Raises:
            KeyError: it has no such feature.
        """
        known = {feature.name for feature in view.features}
        if unknown := [name for name in asked if name not in known]:
            raise KeyError(
                f"feature view {view.name!r} has no feature {unknown[0]!r}; it has {sorted(known)}"
            )
        renamed = view.projection.join_key_map
        alias = view.projection.name_to_use()
        tags = view.batch_source.tags
        dataset = tags["dataset"]
        user = datasets.load_contract(dataset).user.join_key
        version = TOKEN_VERSION.join_key
        return LateView(
            view.tags[MADE_OF],
            dataset,
            tags["home"],
            {f"{alias}__{name}" if full else name: name for name in asked},
            renamed.get(user, user),
            renamed.get(version, version) if view.tags[MADE_OF] == lists.TOKENS else "",
            int(tags["length"]),
        )


@dataclass(frozen=True)
class LateViews:
    """The views of a retrieval, parted.

    Args:
        joined: by the join; the hidden ones, which say where tokens lie, are the last.
        refs: of these.
        views: gathered afterwards.
    """

    joined: list[FeatureView]
    refs: list[str]
    views: list[LateView]

    @staticmethod
    def of(
        views: Sequence[FeatureView], refs: Sequence[str], registry: Any, project: str, full: bool
    ) -> LateViews:
        """Part the views of a retrieval.

        Raises:
            KeyError: a view has no such feature.
        """
        joined = [view for view in views if MADE_OF not in view.tags]
        asked = list(refs)
        late = []
        for view in views:
            if MADE_OF not in view.tags:
                continue
            prefix = view.projection.name_to_use()
            names = [ref.split(":", 1)[1] for ref in refs if ref.split(":", 1)[0] == prefix]
            late.append(LateView.of(view, names, full=full))
            if view.tags[MADE_OF] == lists.TOKENS:
                hidden = copy(registry.get_feature_view(ROWS, project))
                hidden.projection = copy(hidden.projection)
                # No view of a person's has a name with a space.
                hidden.projection.name_alias = f"hidden {len(late)}"
                hidden.projection.join_key_map = view.projection.join_key_map
                joined.append(hidden)
                asked.append(f"{hidden.projection.name_alias}:{ROW}")
        return LateViews(joined, asked, late)

    def ready(self, entities: EntityRows) -> LateGather:
        """The views, to be gathered for entity rows.

        Raises:
            EntityFrameError: the frame lacks a key.
        """
        for view in self.views:
            for name in (view.user, *([view.version] if view.version else [])):
                if name not in entities.inner:
                    raise EntityFrameError(
                        f"entity_df has no column {name!r}, by which {sorted(view.names)} are looked up; it has "
                        f"{sorted(entities.inner)}"
                    )
        return LateGather(self.views, entities)


class LateGather:
    """Adds the columns of late views to batches of a join's result.

    Args:
        views: in the order in which the join has their hidden columns.
        entities: the rows that were asked for.
    """

    def __init__(self, views: list[LateView], entities: EntityRows) -> None:
        self.views = views
        self._entities = entities
        # Logs by home, and by home and token version, opened when they are first read
        self._histories: dict[str, HistoryLists] = {}
        self._tokens: dict[tuple[str, str], TokenLog] = {}

    @property
    def most_rows(self) -> int:
        """Rows of a batch, at most: lists are long."""
        longest = max((view.length for view in self.views), default=1)
        return max(MOST_VALUES // longest, 1)

    def added(self, batch: pa.RecordBatch, start: int) -> pa.RecordBatch:
        """A batch of the join's result without the hidden columns and with those of late views.

        Args:
            start: the number of its first row.
        """
        if not self.views:
            return batch
        hidden = sum(view.made_of == lists.TOKENS for view in self.views)
        shown = batch.num_columns - hidden
        rows = iter(batch.columns[shown:])
        arrays = list(batch.columns[:shown])
        names = list(batch.schema.names[:shown])
        for view in self.views:
            users = self._column(view.user, start, batch.num_rows)
            if view.made_of == lists.HISTORY:
                found = self._lists_of(view, users, start)
            else:
                versions = self._column(view.version, start, batch.num_rows)
                found = self._tokens_of(view, versions, next(rows))
            for name, feature in view.names.items():
                arrays.append(found[feature])
                names.append(name)
        return pa.RecordBatch.from_arrays(arrays, names=names)

    def _column(self, name: str, start: int, number: int) -> pa.Array:
        inner = self._entities.inner[name]
        return self._entities.table[inner].slice(start, number).combine_chunks()

    def _lists_of(self, view: LateView, users: pa.Array, start: int) -> dict[str, pa.Array]:
        if view.home not in self._histories:
            self._histories[view.home] = HistoryLists(view.contract, view.home)
        reader = self._histories[view.home]
        times = micros(self._entities.table[TIME].slice(start, len(users)))
        wanted = list(view.names.values())
        return reader.read(as_keys(users, reader.users), times, wanted, view.length)

    def _tokens_of(self, view: LateView, versions: pa.Array, rows: pa.Array) -> dict[str, pa.Array]:
        read = []
        for version, row in zip(versions.to_pylist(), rows.to_pylist(), strict=True):
            if row is None or row < 0:
                read.append({lists.VALUES: None, lists.NUMBER: None})
                continue
            key = (view.home, version)
            if key not in self._tokens:
                self._tokens[key] = TokenLog(view.contract, view.home, version)
            read.append(lists.token_values(self._tokens[key].read(row)))
        return {
            lists.VALUES: pa.array([one[lists.VALUES] for one in read], pa.list_(pa.float32())),
            lists.NUMBER: pa.array([one[lists.NUMBER] for one in read], pa.int32()),
        }


def as_keys(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """A frame's column as ids of users; null where it is no id. A text is a whole number's where it is spelt so."""
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    if not pa.types.is_integer(kind):
        return values.cast(kind)
    whole = whole_numbers(values)
    if is_text(values.type):
        spelt = pc.equal(whole.cast(pa.string()), values.cast(pa.string()))
        whole = pc.if_else(spelt, whole, pa.scalar(None, pa.int64()))
    return whole.cast(kind)
