"""The overview of a server: some users and items, how fresh the tables are, the last report. Read from the
tables and runs of the home, where those are on this machine; without them the page has less to show.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar, get_args

import msgspec
import numpy as np
import pyarrow as pa
from sqlalchemy.exc import SQLAlchemyError

from feature_repo.contract.contract import Contract
from feature_repo.contract.key_index import KeyIndex
from feature_repo.contract.schema import CREATED_TIMESTAMP, EVENT_TIMESTAMP, STAT_WINDOWS_DAYS
from feature_repo.errors import ExpectedError
from feature_repo.history.history import newest_rows
from feature_repo.home.catalogue import Catalogue
from feature_repo.home.tables import JobFolder
from feature_repo.settings import Settings
from serving.api.degraded import reason_named
from serving.api.messages import KnownItem, KnownUser, OverviewResponse, ReportRow, Simulated
from serving.live.live import Serving
from serving.stores.items import Id

NUM_USERS = 40
NUM_ITEMS = 500
KEPT_S = 60.0
Seen = TypeVar("Seen")
logger = logging.getLogger(__name__)
JOBS = ("events", "user_history", "item_stats", "materialize", "summary_tokens")


class Overview:
    """Makes an `OverviewResponse`, at most once a minute for each bundle.

    Args:
        settings: name the home that is read; None for no home.
    """

    def __init__(self, settings: Settings | None) -> None:
        self._settings = settings
        self._kept: tuple[float, str, OverviewResponse] | None = None
        # Titles of all items, kept as long as the rest
        self._titles: Titles | None = None

    def titles_of(self, serving: Serving, items: Sequence[Id]) -> dict[str, str]:
        """Return titles of items by id, without items that have no title."""
        contract = serving.ranker.contract
        settings = self._settings
        if self._titles is None and settings is not None and contract.spec.item_title:
            self._titles = _seen(lambda: Titles.read(settings, contract))
        return {} if self._titles is None else self._titles.of(items)

    def of(self, serving: Serving, bundles: Sequence[str]) -> OverviewResponse:
        """As things are for these bundles, the live one first."""
        now = time.monotonic()
        digest = serving.ranker.bundle.digest
        if self._kept is not None and self._kept[1] == digest and now - self._kept[0] < KEPT_S:
            made = self._kept[2]
        else:
            self._titles = None
            made = self._made(serving)
            self._kept = now, digest, made
        return msgspec.structs.replace(made, bundles=list(bundles))

    def _made(self, serving: Serving) -> OverviewResponse:
        ranker = serving.ranker
        settings = self._settings
        # 1. What the bundle alone can say.
        known = ranker.bundle.encoder.items.values[:NUM_ITEMS].to_pylist()
        made = OverviewResponse(
            dataset=ranker.contract.spec.title,
            as_of=ranker.end_of_data(),
            bundles=[],
            users=[],
            items=[KnownItem(item, None) for item in known],
            built={},
            coverage=None,
            report=[],
            degraded=[],
            simulated={name: reason_named(name).meaning for name in get_args(Simulated)},
        )
        if settings is None:
            return made
        # 2. What the home adds; a part that cannot be read keeps its default.
        contract = ranker.contract
        made.built = _seen(lambda: built_until(settings)) or {}
        made.users = _seen(lambda: some_users(settings, contract)) or []
        # Frequent items with their titles take the place of the bundle's first ones.
        if frequent := _seen(lambda: frequent_items(settings, contract)):
            titles = self.titles_of(serving, frequent)
            made.items = [KnownItem(item, titles.get(str(item))) for item in frequent]
        made.coverage = _seen(lambda: coverage_of(settings, ranker.bundle.tokens))
        evaluation = _seen(lambda: evaluation_of(settings, serving)) or {}
        made.report = rows_of(evaluation.get("metrics", {}))
        made.degraded = rows_of(evaluation.get("degraded", {}))
        return made


def some_users(settings: Settings, contract: Contract) -> list[KnownUser]:
    """Users of the first part of the histories, from the longest to the shortest."""
    folder = JobFolder(settings.home, "user_history")
    user = contract.user.join_key
    rows = folder.read_path(folder.verified(folder.require().tables["user_stats"][0]))
    newest = newest_rows(rows, user).sort_by([("history_end", "descending"), (user, "ascending")])
    chosen = np.unique(np.linspace(0, newest.num_rows - 1, NUM_USERS).astype(np.int64))
    few = newest.take(pa.array(chosen)).select([user, "history_end"]).to_pylist()
    return [KnownUser(row[user], row["history_end"] or 0) for row in few]


def frequent_items(settings: Settings, contract: Contract) -> list[Id]:
    """The items with most events of late."""
    item = contract.item.join_key
    by = f"count_{max(STAT_WINDOWS_DAYS)}d"
    columns = [item, by, EVENT_TIMESTAMP, CREATED_TIMESTAMP]
    stats = newest_rows(JobFolder(settings.home, "item_stats").read("item_stats", columns), item)
    most = stats.sort_by([(by, "descending"), (item, "ascending")])
    return most[item][:NUM_ITEMS].to_pylist()


@dataclass(frozen=True)
class Titles:
    """The titles of all items, for people."""

    index: KeyIndex
    titles: pa.ChunkedArray

    @staticmethod
    def read(settings: Settings, contract: Contract) -> Titles:
        """Read the titles of the newest profiles."""
        item = contract.item.join_key
        title = contract.spec.item_title
        profile = newest_rows(JobFolder(settings.home, "events").read("item_profile"), item)
        return Titles(KeyIndex(profile[item].combine_chunks()), profile[title])

    def of(self, items: Sequence[Id]) -> dict[str, str]:
        """Return titles by id, of the items that have one."""
        places = self.index.places(pa.array(items, self.index.keys.type))
        known = np.flatnonzero(places >= 0)
        titles = self.titles.take(pa.array(places[known])).to_pylist()
        named = zip(known.tolist(), titles, strict=True)
        return {str(items[at]): title for at, title in named if title is not None}


def built_until(settings: Settings) -> dict[str, datetime]:
    """Up to when each job's tables know events."""
    manifests = {job: JobFolder(settings.home, job).manifest() for job in JOBS}
    return {job: datetime.fromisoformat(m.as_of) for job, m in manifests.items() if m is not None}


def coverage_of(settings: Settings, version: str | None) -> float | None:
    """Share of users with summary tokens of a version; None where nothing was recorded."""
    versions = Catalogue(settings.catalogue_url).token_versions(settings.dataset)
    return next((row.coverage for row in versions if row.fingerprint == version), None)


def _seen(look: Callable[[], Seen]) -> Seen | None:
    """Read the overview; None if a table, a file or the catalogue is missing, or damaged."""
    try:
        return look()
    except (ExpectedError, OSError, ValueError, pa.ArrowException, SQLAlchemyError):
        logger.info("there is less to look at", exc_info=True)
        return None


def evaluation_of(settings: Settings, serving: Serving) -> dict[str, Any]:
    """Read the evaluation of the live bundle's run."""
    manifest = serving.ranker.bundle.manifest
    run = settings.path("runs", manifest["recipe"]) / str(manifest["trained_on"])
    found: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    return found


def rows_of(metrics: dict[str, dict[str, dict[str, float]]]) -> list[ReportRow]:
    """Keep the rows with both metrics defined."""

    def interval(of: dict[str, dict[str, float]], name: str) -> tuple[float, float, float]:
        return of[name]["value"], of[name]["low"], of[name]["high"]

    return [
        ReportRow(name, interval(of, "ndcg@10"), interval(of, "gauc"))
        for name, of in metrics.items()
        if of.get("ndcg@10") and of.get("gauc")
    ]
