"""Erased users: nowhere in tables, store, versions and logs; left out of what is built later; everybody
else as before.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_jobs.erase import erase, ids_of, search
from beam_jobs.errors import ErasureError
from feature_repo.datasets import load_contract
from feature_repo.history.token_log import TokenLog
from feature_repo.home.catalogue import Catalogue
from feature_repo.home.erased import REDACTED, Erased, erased_of, list_erased
from feature_repo.home.tables import JobFolder, StaleTableError
from feature_repo.store.online_erase import OnlineEraser
from feature_repo.store.online_tokens import OnlineTokens
from serving.api.degraded import Degraded
from serving.api.errors import ErasedUserError
from serving.api.messages import RankRequest
from serving.command import open_ranker
from serving.served.served_log import log_schema
from serving.stores.events import EventTaker
from tests.ranking import ranked

TABLES = ("events", "user_history", "training_examples", "summary_tokens")


@pytest.fixture(scope="module")
def road(shop: Any, helpers: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A shop of its own, with tokens: what happens here cannot be undone."""
    return helpers.token_road(shop, tmp_path_factory.mktemp("erase"))


def users_in(road: Any) -> list[int]:
    rows = JobFolder(road.settings.home, "user_history").read("user_history")
    return sorted(rows["user_id"].to_pylist())


def with_dead_letters(road: Any) -> int:
    """A user one of whose raw rows was set aside."""
    letters = JobFolder(road.settings.home, "events").read("dead_letters")["raw"].to_pylist()
    named = {json.loads(row).get("CustomerID") for row in letters}
    return next(user for user in users_in(road) if float(user) in named)


def test_nothing_of_an_erased_user_is_left_and_nobody_else_changes(
    road: Any, helpers: Any, tmp_path: Path
) -> None:
    settings, contract = road.settings, load_contract(road.settings.dataset)
    gone = [with_dead_letters(road), users_in(road)[-1]]
    stays = next(user for user in users_in(road) if user not in gone)
    ranker = open_ranker(settings, replay=True)
    candidates = ranker.bundle.encoder.items.values.to_pylist()[:20]
    version = ranker.bundle.tokens
    assert version is not None
    before = ranked(ranker, RankRequest(stays, candidates))
    assert [ranked(ranker, RankRequest(user, candidates)).degraded for user in gone] == [[], []]
    log = tmp_path / "served"
    log.mkdir()
    rows = [{"user_id": user, "request_id": str(user)} for user in (*gone, stays)]
    pq.write_table(pa.Table.from_pylist(rows, schema=log_schema(contract)), log / "part-1.parquet")
    pq.write_table(
        pa.Table.from_pylist(rows[:1], schema=log_schema(contract)), log / "part-2.parquet"
    )

    def run_job(name: str) -> None:
        helpers.run_jobs(settings, name, num_partitions=3)

    proof, path = erase(settings, gone, [log], run_job)

    # 1. The proof names nobody, says where it looked, and found nothing.
    assert json.loads(path.read_text())["users"] == proof.users
    assert not any(str(user) in path.read_text() for user in gone)
    places = {one.place.rsplit("/", 1)[-1] for one in proof.searched}
    assert {*TABLES, "materialize", "part-1.parquet", "online store (sqlite)"} <= places
    assert proof.removed["online store (sqlite)"] > 0
    assert proof.removed["summary_tokens"] > 0
    assert proof.removed[str(log)] == 3
    assert pq.read_table(log / "part-1.parquet")["user_id"].to_pylist() == [stays]
    assert not (log / "part-2.parquet").exists()
    # 2. No published table has them; a dead letter keeps its reason alone.
    for job in TABLES:
        folder = JobFolder(settings.home, job)
        for table in folder.require().tables:
            if folder.paths(table)[0].endswith(".parquet"):
                read = folder.read(table)
                if "user_id" in read.column_names:
                    assert not set(gone) & set(read["user_id"].to_pylist()), table
    letters = JobFolder(settings.home, "events").read("dead_letters")
    assert REDACTED in letters["raw"].to_pylist()
    counts = JobFolder(settings.home, "events").require().counts
    assert counts["events_erased"] > 0
    # 3. The store knows nothing of them.
    ranker = open_ranker(settings, replay=True)
    for user in gone:
        answer = ranked(ranker, RankRequest(user, candidates))
        assert answer.degraded[0] is Degraded.UNKNOWN_USER
        assert answer.tokens is None
        assert OnlineTokens(road.store, contract).read(version, [user]) == [(None, None)]
    # 4. Others' tokens are where they were, in the store and in the log.
    after = ranked(ranker, RankRequest(stays, candidates))
    assert after.tokens == before.tokens == version
    assert after.degraded == []
    pointers = JobFolder(settings.home, "summary_tokens").read("token_rows")
    tokens, has = TokenLog(contract, settings.home, version).gather(
        pointers["token_row"].to_numpy(), ranker.bundle.token_shape
    )
    assert has.all()
    assert np.isfinite(tokens).all()


def test_later_runs_and_events_keep_them_out_until_they_are_allowed(
    road: Any, helpers: Any
) -> None:
    settings, contract = road.settings, load_contract(road.settings.dataset)
    user = users_in(road)[0]
    erase(settings, [user], [], lambda name: helpers.run_jobs(settings, name, num_partitions=3))
    ranker = open_ranker(settings, replay=True)
    taker = EventTaker(road.store, contract, None, settings.home)
    event = {
        "item_id": ranker.bundle.encoder.items.values[0].as_py(),
        "event_timestamp": datetime(2011, 12, 20, tzinfo=UTC),
        "action": 0,
        "quantity": 1.0,
        "unit_price": 1.0,
    }
    with pytest.raises(ErasedUserError, match="--allow"):
        taker.take(user, [event])
    helpers.run_jobs(settings, "events", num_partitions=5)
    assert user not in JobFolder(settings.home, "events").read("events")["user_id"].to_pylist()
    outcome = helpers.run_jobs(settings, "user_history", "summary_tokens", bundle="vista_tiny")
    assert outcome["summary_tokens"].manifest.counts["tombstones"] == 0

    list_erased(settings.home, [user], allow=True)
    helpers.run_jobs(settings, "events", num_partitions=3)
    assert user in JobFolder(settings.home, "events").read("events")["user_id"].to_pylist()
    assert taker.take(user, [event]).added == 1


def test_what_is_left_is_an_error_and_names_its_place(road: Any, helpers: Any) -> None:
    settings, contract = road.settings, load_contract(road.settings.dataset)
    user = users_in(road)[2]
    kept = Path(settings.home, "notebook", "mine.parquet")
    kept.parent.mkdir()
    pq.write_table(pa.table({"user_id": [user, 1]}), kept)
    with pytest.raises(ErasureError, match=r"notebook \(1\)"):
        erase(settings, [user], [], lambda name: helpers.run_jobs(settings, name, num_partitions=3))
    kept.unlink()
    listed = erased_of(settings.home)
    theirs = Erased(listed.salt, frozenset([listed.hash_of(user)]))
    assert not any(one.theirs for one in search(settings, contract, theirs, []))


def test_on_redis_the_keys_of_every_view_and_version_go(
    road: Any, redis_address: str, postgres_url: str, monkeypatch: pytest.MonkeyPatch, helpers: Any
) -> None:
    from dataclasses import replace

    from feature_repo.store.store import open_store

    settings = replace(road.settings, profile="production")
    monkeypatch.setenv("MEMOIR_REDIS", redis_address)
    monkeypatch.setenv("MEMOIR_REGISTRY_URL", postgres_url)
    monkeypatch.setenv("MEMOIR_DATASET", settings.dataset)
    monkeypatch.setenv("MEMOIR_HOME", settings.root)
    helpers.apply_in_process(settings)
    store, contract = open_store(settings), load_contract(settings.dataset)
    users = users_in(road)[5:8]
    # The store is shared: other tests may have left tokens of theirs.
    OnlineEraser(store, contract, []).sweep(users, datetime.now(UTC))
    helpers.run_jobs(settings, "materialize")
    online = OnlineTokens(store, contract)
    for version in ("one", "two"):
        online.write(version, users, [b"tokens"] * 3, [None] * 3, 1)
    eraser = OnlineEraser(store, contract, ["one", "two"])
    assert eraser.find(users[:2]) == 6
    assert eraser.erase(users[:2], datetime.now(UTC)) == 6
    assert eraser.find(users[:2]) == 0
    assert eraser.find(users[2:]) == 3
    assert eraser.erase(users[:2], datetime.now(UTC)) == 0
    # A version that nobody named is found all the same, and swept.
    online.write("three", users[:1], [b"tokens"], [None], 1)
    assert eraser.find(users[:2]) == OnlineEraser(store, contract, []).find(users[:2]) == 1
    assert eraser.sweep(users[:2], datetime.now(UTC)) == 1
    assert eraser.find(users[:2]) == 0
    assert eraser.find(users[2:]) == 3


def test_ids_are_typed_and_recognised_however_a_raw_row_writes_them(road: Any) -> None:
    contract = load_contract(road.settings.dataset)
    assert ids_of(contract, ["12", "13"]) == [12, 13]
    with pytest.raises(ErasureError, match="whole numbers"):
        ids_of(contract, ["twelve"])
    with pytest.raises(ErasureError, match="expected the id"):
        ids_of(contract, [])
    empty = Erased("ab" * 32)
    listed = Erased(empty.salt, frozenset([empty.hash_of(12680)]))
    assert listed.holds(pa.chunked_array([[1, None], [12680]])).tolist() == [False, False, True]
    assert listed.holds(pa.array(["12680", "a"])).tolist() == [True, False]
    rows = [
        '{"id": 12680.0, "n": 1}',
        '{"id": " 12680 ", "n": 1}',
        '{"id": 1, "n": 12680}',
        '{"line": "7::a::\\"b"}',  # nobody can say whose it is
        '{"id": null}',
        REDACTED,
        '{"user_id": 12680, "n": 1}',  # which broke a limit once it was read
        '{"user_id": 12681, "n": 12680}',
    ]
    of_rows = [True, True, False, True, False, False, True, False]
    assert listed.in_raw(rows, {"id"}, "user_id").tolist() == of_rows
    # Where code makes ids, no raw row says whose it is.
    made_by_code = [True] * 5 + [False, True, False]
    assert listed.in_raw(rows, (), "user_id").tolist() == made_by_code
    assert Catalogue(road.settings.catalogue_url).token_versions("online_retail")


def test_an_item_with_the_same_number_stays(film_club: Any, helpers: Any, tmp_path: Path) -> None:
    """Users and items are both whole numbers here: a key is told by whose it is."""
    road = helpers.copied(film_club, tmp_path)
    settings, contract = road.settings, load_contract(road.settings.dataset)
    films = set(JobFolder(settings.home, "events").read("item_profile")["item_id"].to_pylist())
    user = next(one for one in users_in(road) if one in films)
    refs = [f"item_profile:{column.name}" for column in contract.table("item_profile").columns]

    def film() -> dict[str, Any]:
        found: dict[str, Any] = road.store.get_online_features(refs, [{"item_id": user}]).to_dict()
        return found

    before = film()
    erase(settings, [user], [], lambda name: helpers.run_jobs(settings, name, num_partitions=3))
    assert film() == before
    assert user not in users_in(road)


def test_what_a_stopped_call_or_an_earlier_run_left_goes(
    road: Any, helpers: Any, tmp_path: Path
) -> None:
    settings = road.settings
    user = users_in(road)[1]
    folder = JobFolder(settings.home, "summary_tokens")
    run = Path(folder.root, folder.require().run_id)
    left = run / "token_rows" / "replaced.parquet"
    left.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"user_id": [user]}), left)
    log = tmp_path / "served"
    log.mkdir()
    draft = log / ".part-1.parquet.draft"
    draft.write_bytes(b"half")
    os.utime(draft, (0, 0))
    before = folder.require()
    erase(settings, [user], [log], lambda name: helpers.run_jobs(settings, name, num_partitions=3))
    assert not left.exists()
    assert not draft.exists()
    # Whatever the manifest names is still there.
    for parts in folder.require().tables.values():
        assert all(Path(folder.root, part.path).exists() for part in parts)
    assert folder.require().run_id == before.run_id
    with pytest.raises(ErasureError, match="no folder"):
        erase(settings, [user], [tmp_path / "nowhere"], lambda name: None)


def test_a_job_that_is_under_way_is_waited_for(road: Any, helpers: Any) -> None:
    settings, user = road.settings, users_in(road)[1]
    released: list[float] = []
    begun = threading.Event()

    def hold() -> None:
        with JobFolder(settings.home, "summary_tokens").lock():
            begun.set()
            time.sleep(1.5)
            released.append(time.monotonic())

    holding = threading.Thread(target=hold)
    holding.start()
    begun.wait(5)
    erase(settings, [user], [], lambda name: helpers.run_jobs(settings, name, num_partitions=3))
    assert released
    assert released[0] < time.monotonic()
    holding.join()


def test_a_list_that_changes_while_events_are_read_publishes_nothing(
    road: Any, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:

    from beam_jobs.engine import run as engine

    settings, user = road.settings, users_in(road)[3]
    real, before = engine.pipeline_of, JobFolder(settings.home, "events").require().run_id

    def meanwhile(*given: Any) -> Any:
        list_erased(settings.home, [user])
        return real(*given)

    monkeypatch.setattr(engine, "pipeline_of", meanwhile)
    with pytest.raises(StaleTableError, match="erased or allowed"):
        helpers.run_jobs(settings, "events", num_partitions=4)
    assert JobFolder(settings.home, "events").require().run_id == before
    list_erased(settings.home, [user], allow=True)


def test_the_command_does_it_as_the_jobs_were_run(road: Any, helpers: Any) -> None:
    settings, user = road.settings, users_in(road)[4]
    kept = {name: v for name, v in os.environ.items() if not name.startswith("MEMOIR_")}
    environment = {
        **kept,
        "MEMOIR_HOME": settings.root,
        "MEMOIR_DATASET": settings.dataset,
        "MEMOIR_DATA": str(road.data),
    }

    def run(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=helpers.checkout,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("beam_jobs", "training_examples", "--seed=0", "--num_partitions=2")
    told = run("beam_jobs", "erase", str(user))
    assert "1 users erased" in told
    manifest = JobFolder(settings.home, "training_examples").require()
    assert (manifest.options["seed"], manifest.options["num_partitions"]) == (0, 2)
    assert user not in users_in(road)
    assert "0 users stay" not in run("beam_jobs", "erase", str(user), "--allow")
