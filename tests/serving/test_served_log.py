"""What was served is logged with its numbers, and the tables say the same; where they do not, the feature
is named.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_repo.home.tables import JobFolder
from serving.api.settings import ServeSettings
from serving.command import open_ranker
from serving.live.live import Live, Serving
from serving.ranking.ranker import RankService
from serving.routes.app import app_of
from serving.routes.server import Server
from serving.served.audit import NothingToAuditError, audit, replay
from serving.served.served_log import NoLogError, ServedLog, read_log
from serving.stores.guarded import GuardedReader, ThreadedReader


@pytest.fixture(scope="module")
def ranker(trained_shop: Any) -> RankService:
    return open_ranker(trained_shop.settings, replay=True)


@pytest.fixture(scope="module")
def log(
    trained_shop: Any, ranker: RankService, tmp_path_factory: pytest.TempPathFactory
) -> pa.Table:
    """Forty requests of a server, just after the end of the data, one of a user nobody knows."""
    return served(trained_shop, ranker, tmp_path_factory.mktemp("served"))


def served(trained_shop: Any, ranker: RankService, folder: Path) -> pa.Table:
    import asyncio

    live = Live(load=lambda digest: pytest.fail("nothing is loaded here"))
    live.current = Serving(ranker, GuardedReader(ThreadedReader(ranker.reader)))
    server = Server(
        live,
        ServeSettings(deadline_ms=10_000, store_ms=5_000, log_folder=folder, log_share=1.0),
    )
    manifest = JobFolder(trained_shop.settings.home, "user_history").require()
    at = (datetime.fromisoformat(manifest.as_of) + timedelta(hours=2)).isoformat()
    index = JobFolder(trained_shop.settings.home, "user_history").read("user_stats")
    users = sorted(set(index["user_id"].to_pylist()))[:39]
    items = ranker.bundle.encoder.items.values.to_pylist()

    async def run() -> None:
        transport = httpx.ASGITransport(app_of(server))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for number, user in enumerate([*users, 987_654_321]):
                chosen = items[number % 10 : number % 10 + 5 + number % 7]
                body = {
                    "user_id": user,
                    "candidates": chosen,
                    "context": {"request_timestamp": at},
                }
                assert (await client.post("/v1/rank", json=body)).status_code == 200

    asyncio.run(run())
    for one in server.logs:
        one.close()
    return read_log(folder)


def test_every_number_that_was_served_is_what_the_tables_say(
    trained_shop: Any, ranker: RankService, log: pa.Table
) -> None:
    assert len(log) == 40
    found = audit(trained_shop.settings, log, ranker.bundle)
    assert (found.requests, found.skipped) == (39, 1)  # of nobody there is nothing to compare
    assert len(found.features) > len(ranker.bundle.encoder.dense_names)
    assert [one for one in found.features if one.differ] == []
    assert min(one.compared for one in found.features) >= 39


def test_a_number_that_is_another_is_named(
    trained_shop: Any, ranker: RankService, log: pa.Table
) -> None:
    at = ranker.bundle.encoder.dense_names.index("match_times")
    rows = log.to_pylist()
    for row in rows[:10]:
        row["candidate_dense"][at] += 0.5
    skewed = pa.Table.from_pylist(rows, schema=log.schema)
    found = audit(trained_shop.settings, skewed, ranker.bundle)
    assert found.features[0].feature == "match_times"
    assert found.features[0].differ == 10
    assert found.features[0].largest == pytest.approx(0.5)
    assert [one.differ for one in found.features[1:]] == [0] * (len(found.features) - 1)


def test_the_same_bundle_ranks_what_was_served_as_it_was(
    trained_shop: Any, ranker: RankService, log: pa.Table
) -> None:
    found = replay(trained_shop.settings, log, ranker.bundle)
    assert found.same_first == 1.0
    assert found.rank_correlation > 0.999  # logits that round to the same keep the request's order
    assert found.overlap_10 == 1.0


def test_a_window_that_moves_by_blocks_is_the_same_in_a_replay(
    shop: Any, helpers: Any, tmp_path: Path
) -> None:
    road = helpers.copied(shop, tmp_path / "home")
    helpers.train_road(road, "hydrarec_tiny")
    ranker = open_ranker(road.settings, replay=True)
    log = served(road, ranker, tmp_path / "log")
    lengths = JobFolder(road.settings.home, "user_history").read("user_stats")["history_end"]
    assert max(lengths.to_pylist()) > 2 * ranker.bundle.encoder.history_length
    found = replay(road.settings, log, ranker.bundle)
    assert found.same_first == 1.0
    assert found.rank_correlation > 0.999


def test_a_log_of_another_bundle_is_said_to_be_one(
    trained_shop: Any, ranker: RankService, log: pa.Table
) -> None:
    at = log.schema.get_field_index("bundle")
    other = log.set_column(at, "bundle", pa.array(["other@0"] * len(log)))
    with pytest.raises(NothingToAuditError, match="other@0"):
        audit(trained_shop.settings, other, ranker.bundle)


def test_a_user_is_logged_always_or_never_and_a_full_queue_drops(
    ranker: RankService, tmp_path: Path
) -> None:
    log = ServedLog(tmp_path, ranker.bundle.encoder, share=0.3)
    chosen = [log.samples(user) for user in range(2_000)]
    assert chosen == [log.samples(user) for user in range(2_000)]
    assert 0.25 < np.mean(chosen) < 0.35
    log.close()
    with pytest.raises(NoLogError, match="no part"):
        read_log(tmp_path)


def test_nothing_half_written_is_read(log: pa.Table, tmp_path: Path) -> None:
    pq.write_table(log, tmp_path / "part-1.parquet")
    (tmp_path / ".part-2.parquet.draft").write_bytes(b"half")
    assert len(read_log(tmp_path)) == len(log)
