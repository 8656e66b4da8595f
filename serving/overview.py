"""What there is to look at: some users and items, how fresh the tables are, the last report. Read from the
tables and runs of the home, where those are on this machine; without them the page has less to show.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from typing import get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.catalogue import Catalogue
from feature_repo.contract import Contract
from feature_repo.errors import ExpectedError
from feature_repo.history import newest_rows
from feature_repo.schema import STAT_WINDOWS_DAYS
from feature_repo.settings import Settings
from feature_repo.tables import JobFolder
from serving.degraded import reason_named
from serving.items import Id
from serving.live import Serving
from serving.messages import Forced, KnownItem, KnownUser, OverviewResponse, ReportRow

NUM_USERS, NUM_ITEMS = 40, 500
KEPT_S = 60.0
logger = logging.getLogger(__name__)
JOBS = ("events", "user_history", "item_stats", "materialize", "summary_tokens")


class Overview:
    """Makes an `OverviewResponse`, at most once a minute for each bundle.

    Args:
        settings: whose home is looked into; None where there is none.
    """

    def __init__(self, settings: Settings | None) -> None:
        self._settings = settings
        self._kept: tuple[float, str, OverviewResponse] | None = None
        self._titles: pa.Table | None = None  # of all items, as long as what else is kept

    def titles_of(self, serving: Serving, items: Sequence[Id]) -> dict[str, str]:
        """What a person reads of items, by id; of those that have no title nothing."""
        contract = serving.ranker.contract
        if self._titles is None and self._settings is not None and contract.spec.item_title:
            with suppress(ExpectedError, OSError):
                self._titles = item_titles(self._settings, contract)
        if self._titles is None:
            return {}
        ids, titles = self._titles.columns
        places = pc.index_in(pa.array(items, ids.type), ids.combine_chunks())
        found = titles.take(places).to_pylist()
        return {str(i): title for i, title in zip(items, found, strict=True) if title is not None}

    def of(self, serving: Serving, bundles: Sequence[str]) -> OverviewResponse:
        """As things are for these bundles, the live one first."""
        now, digest = time.monotonic(), serving.ranker.bundle.digest
        if self._kept is not None and self._kept[1] == digest and now - self._kept[0] < KEPT_S:
            made = self._kept[2]
        else:
            self._titles = None
            made = self._made(serving)
            self._kept = now, digest, made
        made.bundles = list(bundles)
        return made

    def _made(self, serving: Serving) -> OverviewResponse:
        ranker, settings = serving.ranker, self._settings
        known = ranker.bundle.encoder.items.values[:NUM_ITEMS].to_pylist()
        made = OverviewResponse(
            dataset=ranker.contract.spec.title,
            as_of=ranker.default_time,
            bundles=[],
            users=[],
            items=[KnownItem(item, None) for item in known],
            built={},
            coverage=None,
            report=[],
            rungs=[],
            forced={name: reason_named(name).meaning for name in get_args(Forced)},
        )
        if settings is None:
            return made
        for job in JOBS:
            if (manifest := JobFolder(settings.home, job).manifest()) is not None:
                made.built[job] = datetime.fromisoformat(manifest.as_of)
        try:
            made.users = some_users(settings, ranker.contract)
            frequent = frequent_items(settings, ranker.contract)
            titles = self.titles_of(serving, frequent)
            made.items = [KnownItem(item, titles.get(str(item))) for item in frequent] or made.items
        except (ExpectedError, OSError):
            logger.info(
                "tables are not here, or not whole: there is less to look at", exc_info=True
            )
        versions = Catalogue(settings.catalogue_url).token_versions(settings.dataset)
        made.coverage = next(
            (row.coverage for row in versions if row.fingerprint == ranker.bundle.tokens), None
        )
        made.report, made.rungs = last_report(settings, serving)
        return made


def some_users(settings: Settings, contract: Contract) -> list[KnownUser]:
    """Users of the first part of the histories, from the longest to the shortest."""
    folder, user = JobFolder(settings.home, "user_history"), contract.user.join_key
    rows = folder.read_path(folder.paths("user_stats")[0])
    newest = newest_rows(rows, user).sort_by([("history_end", "descending"), (user, "ascending")])
    chosen = np.unique(np.linspace(0, newest.num_rows - 1, NUM_USERS).astype(np.int64))
    few = newest.take(pa.array(chosen)).select([user, "history_end"]).to_pylist()
    return [KnownUser(row[user], row["history_end"] or 0) for row in few]


def frequent_items(settings: Settings, contract: Contract) -> list[Id]:
    """The items with most events of late."""
    item = contract.item.join_key
    stats = newest_rows(JobFolder(settings.home, "item_stats").read("item_stats"), item)
    by = f"count_{max(STAT_WINDOWS_DAYS)}d"
    most = stats.sort_by([(by, "descending"), (item, "ascending")])
    return most[item][:NUM_ITEMS].to_pylist()


def item_titles(settings: Settings, contract: Contract) -> pa.Table:
    """Id and title of every item."""
    item, title = contract.item.join_key, contract.spec.item_title
    profile = JobFolder(settings.home, "events").read("item_profile")
    return newest_rows(profile, item).select([item, title])


def last_report(settings: Settings, serving: Serving) -> tuple[list[ReportRow], list[ReportRow]]:
    """The rankers of the live bundle's report as `evaluate` left it, and what its answers are worth that
    do without something; none where it is elsewhere.
    """
    manifest = serving.ranker.bundle.manifest
    run = settings.path("runs", manifest["recipe"]) / str(manifest["trained_on"])
    try:
        found = json.loads((run / "evaluation.json").read_text())
        return rows_of(found["metrics"]), rows_of(found["rungs"])
    except (OSError, ValueError, KeyError):
        return [], []


def rows_of(metrics: dict[str, dict[str, dict[str, float]]]) -> list[ReportRow]:
    """Those of which both metrics are defined."""

    def interval(of: dict[str, dict[str, float]], name: str) -> tuple[float, float, float]:
        return of[name]["value"], of[name]["low"], of[name]["high"]

    return [
        ReportRow(name, interval(of, "ndcg@10"), interval(of, "gauc"))
        for name, of in metrics.items()
        if of.get("ndcg@10") and of.get("gauc")
    ]
