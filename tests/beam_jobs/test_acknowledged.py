"""An event that a server acknowledged is known for good: to the record at once, to the next batch, and to every record
that a batch writes, whatever came first.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from beam_jobs.erase import erase
from feature_repo import datasets
from feature_repo.history.counts import from_bytes as sketch_of
from feature_repo.history.history import unpack
from feature_repo.history.sketch import Layout
from feature_repo.home.tables import JobFolder
from feature_repo.settings import Settings
from feature_repo.store.event_log import EventLog
from feature_repo.store.event_log import log_of as event_log_of
from feature_repo.store.online_erase import OnlineEraser
from feature_repo.store.online_users import HISTORY, STATS, UserRecord
from feature_repo.store.received import Received, collect
from feature_repo.store.store import open_store
from serving.stores.refresh import UserMemory
from tests.small_shop import at, declared, read, shop

BATCH = ("events", "user_history", "item_stats", "materialize")
# Small tables need no more, and each part costs a file.
FEW = {"num_partitions": 1}
NOW = datetime.now(UTC).replace(microsecond=0) - timedelta(hours=1)
HEADER = "user_id,item_id,event_timestamp,price,country\n"
LOG = HEADER + "".join(
    f"{user},{item},{at(day)},{day},UK\n"
    for day, (user, item) in enumerate(
        [("ann", "a"), ("bob", "b"), ("ann", "b"), ("cid", "c"), ("bob", "a"), ("ann", "c")], 1
    )
)


def opened(
    modules: Path, helpers: Any, name: str, log: str, source: str = '"log.csv"', **fields: str
) -> Settings:
    """A small shop with its tables built and its records online."""
    text = declared(name, source, num_history_online="8", **fields)
    settings = shop(modules, helpers, name, text, {"log.csv": log})
    helpers.run_jobs(settings, *BATCH[:-1], **FEW)
    helpers.apply_in_process(settings)
    helpers.run_jobs(settings, "materialize", **FEW)
    return settings


@pytest.fixture(params=["sqlite", "redis"])
def little(
    request: pytest.FixtureRequest,
    modules: Path,
    helpers: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Settings:
    if request.param == "sqlite":
        return opened(modules, helpers, "little", LOG)
    monkeypatch.setenv("MEMOIR_REGISTRY_URL", request.getfixturevalue("postgres_url"))
    monkeypatch.setenv("MEMOIR_REDIS", request.getfixturevalue("redis_address"))
    monkeypatch.setenv("MEMOIR_DATASET", "little_remote")
    settings = opened(modules, helpers, "little_remote", LOG)
    settings = replace(settings, profile="production")
    helpers.apply_in_process(settings)
    helpers.run_jobs(settings, "materialize", **FEW)
    return settings


@pytest.fixture
def memory(little: Settings, helpers: Any) -> Iterator[UserMemory]:
    made = memory_of(little)
    # Redis is shared by tests.
    eraser = OnlineEraser(open_store(little), datasets.load_contract(little.dataset), [])
    eraser.erase(["ann", "bob", "cid", "new"], NOW)
    helpers.run_jobs(little, "materialize", force=True)
    yield made
    made.close()


def memory_of(settings: Settings) -> UserMemory:
    return UserMemory(open_store(settings), datasets.load_contract(settings.dataset))


def log_of(settings: Settings) -> EventLog:
    found = event_log_of(open_store(settings).config)
    assert found is not None
    return found


def redeclared(modules: Path, name: str, old: str, new: str) -> None:
    """Change a shop's declaration."""
    file = modules / f"{name}.py"
    file.write_text(file.read_text().replace(old, new))
    datasets.load.cache_clear()
    datasets.load_contract.cache_clear()
    sys.modules.pop(f"feature_repo.datasets.{name}")


def purchase(minute: float, item: str = "a", price: float = 1.5) -> dict[str, Any]:
    when = NOW + timedelta(minutes=minute)
    return {"item_id": item, "action": 0, "event_timestamp": when, "price": price}


def past_of(settings: Settings, record: UserRecord) -> list[tuple[str, datetime]]:
    """What is packed: items and times."""
    packed = record[HISTORY]["history"]
    if packed is None:
        return []
    events = unpack(datasets.load_contract(settings.dataset), record.user_id, packed).to_pylist()
    return [(event["item_id"], event["event_timestamp"]) for event in events]


def assert_same(settings: Settings, one: UserRecord, other: UserRecord) -> None:
    """Byte for byte, but for counts that fade, whose float32 halves depend on the order of sums."""
    assert one[STATS] == other[STATS]
    assert one[HISTORY]["history"] == other[HISTORY]["history"]
    sketches = [record[HISTORY]["sketch"] for record in (one, other)]
    assert (sketches[0] is None) == (sketches[1] is None)
    if sketches[0] is not None:
        layout = Layout.of(datasets.load_contract(settings.dataset))
        (ours, its), (theirs, others) = (sketch_of(layout, s, one.user_id) for s in sketches)
        assert its == others
        np.testing.assert_array_equal(ours._rows_RS, theirs._rows_RS)
        np.testing.assert_array_equal(ours._last_R, theirs._last_R)
        np.testing.assert_allclose(ours._weights_RK, theirs._weights_RK, rtol=1e-5)


def test_the_next_batch_knows_what_a_server_took(
    little: Settings, memory: UserMemory, helpers: Any
) -> None:
    before = read(little, "events", "events").num_rows
    memory.add("ann", [purchase(0), purchase(1, "b")])
    memory.add("new", [purchase(2)])
    memory.add("ann", [purchase(0.5, "d")])  # late
    taken = {user: memory.read(user) for user in ("ann", "new")}
    assert len(log_of(little).entries(["ann", "new"])) == 4
    helpers.run_jobs(little, *BATCH, **FEW)
    assert read(little, "events", "events").num_rows == before + 4
    for user, record in taken.items():
        assert_same(little, memory.read(user), record)
    # A published run has them: the log is empty, and goes on counting where it was.
    assert list(log_of(little).users()) == []
    memory.add("ann", [purchase(3)])
    (entry,) = log_of(little).entries(["ann"])
    assert entry.number > taken["ann"].last
    # Everything is up to date until the log says more.
    assert [o.built for o in helpers.run_jobs(little, "events", **FEW).values()] == [True]
    assert [o.built for o in helpers.run_jobs(little, "events", **FEW).values()] == [False]


def test_a_batch_that_does_not_know_an_event_adds_it_to_its_record(
    little: Settings, memory: UserMemory, helpers: Any
) -> None:
    memory.add("ann", [purchase(0)])
    helpers.run_jobs(little, *BATCH[:-1], **FEW)
    memory.add("ann", [purchase(1, "b")])
    memory.add("new", [purchase(2)])
    taken = {user: memory.read(user) for user in ("ann", "bob", "new")}
    # Twice: the second time the log was emptied, and a file alone has the events.
    for emptied in (False, True):
        if emptied:
            memory.add("bob", [purchase(4)])
            taken["bob"] = memory.read("bob")
            helpers.run_jobs(little, "events", **FEW)
            assert list(log_of(little).users()) == []
        wipe(little)
        assert memory.read("ann")[STATS]["history_end"] is None
        helpers.run_jobs(little, "materialize", **FEW)
        for user, record in taken.items():
            assert_same(little, memory.read(user), record)


def wipe(settings: Settings) -> None:
    """An online store that holds nothing but the log."""
    store = open_store(settings)
    kept = log_of(settings).entries(["ann", "bob", "new", "cid"])
    if store.config.online_store.type == "sqlite":
        import sqlite3

        with sqlite3.connect(Path(settings.home) / "online_store.db") as connection:
            for (table,) in connection.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' AND name LIKE 'memoir!_%' ESCAPE '!'"
            ).fetchall():
                if table != "memoir_event_log":
                    connection.execute(f'DELETE FROM "{table}"')
    else:
        log = log_of(settings)
        client: Any = log._client  # type: ignore[attr-defined]
        for key in client.scan_iter():
            if client.type(key) != b"hash":
                continue
            last = client.hget(key, "_logged")
            client.delete(key)
            if last:
                client.hset(key, "_logged", last)
    assert log_of(settings).entries(["ann", "bob", "new", "cid"]) == kept


def test_an_event_that_comes_by_both_ways_counts_once(modules: Path, helpers: Any) -> None:
    settings = opened(modules, helpers, "both_ways", LOG)
    memory = memory_of(settings)
    event = purchase(0, "b", 2.5)
    memory.add("ann", [event, purchase(1)])
    taken = memory.read("ann")
    line = f"ann,b,{event['event_timestamp'].isoformat()},2.5,UK\n"
    (Path(settings.data or "") / "log.csv").write_text(LOG + line)
    helpers.run_jobs(settings, *BATCH, **FEW)
    counts = JobFolder(settings.home, "events").require().counts
    assert counts.dead == {"repeated: the same event stands earlier": 1}
    found = memory.read("ann")
    assert past_of(settings, found) == past_of(settings, taken)
    assert found[STATS] == taken[STATS]
    # Sent again, it is known; and where it is no longer packed it is logged, and counts once all the same.
    assert memory.add("ann", [event]).added == 0
    memory.close()


@pytest.mark.parametrize("identity", ['("event_id",)', '("user_id", "event_id")'])
def test_a_line_of_a_file_corrects_and_strikes_what_came_by_http(
    modules: Path, helpers: Any, identity: str
) -> None:
    """Where both name the event. One that names none is an event by itself."""
    header = "event_id,user_id,item_id,event_timestamp,price,country,seen,gone\n"
    lines = header + f"e1,ann,a,{at(1)},1,UK,{at(1)},0\n"
    name = f"named{len(identity)}"
    source = '"log.csv", arrival="seen", deleted="gone"'
    settings = opened(modules, helpers, name, lines, source, event_identity=identity)
    memory = memory_of(settings)
    memory.add(
        "ann", [purchase(0, "b") | {"event_id": "h1"}, purchase(1, "c") | {"event_id": "h2"}]
    )
    memory.add("ann", [purchase(2, "d")])
    helpers.run_jobs(settings, *BATCH, **FEW)
    assert [item for item, _ in past_of(settings, memory.read("ann"))] == ["a", "b", "c", "d"]
    later = datetime.now(UTC).isoformat()
    first = (NOW + timedelta(seconds=30)).isoformat()
    lines += f"h1,ann,e,{first},9,UK,{later},0\nh2,ann,,,,,{later},1\n"
    (Path(settings.data or "") / "log.csv").write_text(lines)
    helpers.run_jobs(settings, *BATCH, **FEW)
    record = memory.read("ann")
    assert [item for item, _ in past_of(settings, record)] == ["a", "e", "d"]
    assert record[STATS]["history_end"] == 3
    # What was known in between stays known of then.
    events = read(settings, "events", "events")
    assert events.num_rows == 5
    assert events["replaced_timestamp"].null_count == 3
    memory.close()


def test_what_was_drained_and_not_trimmed_is_not_written_twice(modules: Path, helpers: Any) -> None:
    """A run that was killed leaves events in the log and in a file."""
    settings = opened(modules, helpers, "drained", LOG)
    contract = datasets.load_contract("drained")
    memory = memory_of(settings)
    memory.add("ann", [purchase(0)])
    assert collect(settings, contract) == ""
    assert collect(settings, contract) == ""
    memory.add("ann", [purchase(1)])
    assert collect(settings, contract) == ""
    received = Received(settings.home, contract)
    assert [received.num_rows(file) for file in received.files()] == [1, 1]
    taken = memory.read("ann")
    # Nothing is published yet: the batch has none of them, and its record has both.
    helpers.run_jobs(settings, "item_stats", **FEW)
    JobFolder(settings.home, "materialize").discard("none")
    wipe(settings)
    helpers.run_jobs(settings, "materialize", **FEW)
    assert_same(settings, memory.read("ann"), taken)
    helpers.run_jobs(settings, *BATCH, **FEW)
    assert read(settings, "events", "events").num_rows == 8
    assert_same(settings, memory.read("ann"), taken)
    memory.close()


def test_an_event_of_a_clock_that_runs_ahead_waits_in_the_log(modules: Path, helpers: Any) -> None:
    """A batch refuses the future; the record has it."""
    settings = opened(modules, helpers, "ahead", LOG)
    memory = memory_of(settings)
    memory.add("ann", [purchase(0)])
    memory.add("ann", [purchase(75)])
    memory.add("bob", [purchase(1)])
    taken = memory.read("ann")
    helpers.run_jobs(settings, *BATCH, **FEW)
    assert read(settings, "events", "events").num_rows == 8
    assert [entry.user_id for entry in log_of(settings).entries(["ann", "bob"])] == ["ann"]
    assert_same(settings, memory.read("ann"), taken)
    memory.close()


def test_what_breaks_the_contract_by_now_is_a_dead_letter(modules: Path, helpers: Any) -> None:
    """The declaration changed after the event was taken: the line is named, and costs no other."""
    settings = opened(modules, helpers, "stricter", LOG, max_bad_fraction="0.5")
    memory = memory_of(settings)
    memory.add("ann", [purchase(0, price=3.0), purchase(1, price=900.0)])
    memory.close()
    redeclared(modules, "stricter", "minimum=0,", "minimum=0, maximum=100,")
    helpers.run_jobs(settings, "events", **FEW)
    (letter,) = read(settings, "events", "dead_letters").to_pylist()
    assert letter["source_file"].startswith("part-000000-")
    assert letter["reason"].startswith("price")
    assert read(settings, "events", "events").num_rows == 7


def test_a_home_that_moves_to_another_declaration_says_what_it_reads_anew(
    modules: Path, helpers: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """And why; and what servers took stays, once."""
    from beam_jobs.command import run_command
    from beam_jobs.engine.options import Common, TableOptions

    settings = opened(modules, helpers, "moving", LOG)
    memory = memory_of(settings)
    memory.add("ann", [purchase(0)])
    memory.close()
    helpers.run_jobs(settings, "events", **FEW)
    redeclared(modules, "moving", '"log.csv"', '"log.csv", arrival=FILE_TIME')
    capsys.readouterr()
    run_command("events", TableOptions(), Common(), [], settings)
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "events: runs again, because the declaration changed (contract " in said
        or "raw files" in said
    )
    assert "all 7 rows of its input are read anew" in said
    events = read(settings, "events", "events")
    assert (events.num_rows, events["arrival_timestamp"].null_count) == (7, 0)


def test_an_erased_user_is_gone_and_others_keep_their_events(
    little: Settings, memory: UserMemory, helpers: Any
) -> None:
    memory.add("ann", [purchase(0)])
    memory.add("bob", [purchase(0)])
    helpers.run_jobs(little, *BATCH, **FEW)
    memory.add("ann", [purchase(1)])
    memory.add("bob", [purchase(1)])
    taken = memory.read("bob")
    helpers.run_jobs(little, "training_examples", **FEW)
    erase(little, ["ann"], [], lambda name: helpers.run_jobs(little, name, **FEW))
    assert past_of(little, memory.read("ann")) == []
    assert log_of(little).entries(["ann"]) == []
    assert_same(little, memory.read("bob"), taken)
    received = Received(little.home, datasets.load_contract(little.dataset))
    files = [received.read(file)["user_id"].to_pylist() for file in received.files()]
    assert {user for users in files for user in users} == {"bob"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "turns"),
    [(0, 8), *(pytest.param(n, 20, marks=pytest.mark.whole) for n in range(1, 9))],
)
def test_records_are_what_a_build_from_nothing_makes(
    modules: Path, helpers: Any, seed: int, turns: int
) -> None:
    """After any order of events by HTTP, early, late and repeated, of files, and of jobs: what the server added is in
    the record at all times, and the whole batch makes what a home does that has never seen anything else.
    """
    settings = opened(modules, helpers, f"any_order{seed}", LOG)
    memory = memory_of(settings)
    rng = np.random.default_rng(seed)
    users = ["ann", "bob", "cid", "dan"]
    added: dict[str, set[tuple[str, datetime]]] = {user: set() for user in users}
    log = LOG
    for _ in range(turns):
        for _ in range(int(rng.integers(4))):
            user = str(rng.choice(users))
            event = purchase(float(rng.integers(50)), str(rng.choice(["a", "b", "c"])))
            if memory.add(user, [event]).added:
                added[user].add((event["item_id"], event["event_timestamp"]))
        if rng.random() < 0.4:
            event = purchase(float(rng.integers(50)), str(rng.choice(["a", "b", "c"])))
            log += f"{rng.choice(users)},{event['item_id']},{event['event_timestamp'].isoformat()},1.5,UK\n"
            (Path(settings.data or "") / "log.csv").write_text(log)
        helpers.run_jobs(settings, *[job for job in BATCH if rng.random() < 0.5], **FEW)
        for user in users:
            record = memory.read(user)
            past = past_of(settings, record)
            assert [when for _, when in past] == sorted(when for _, when in past)
            # Of a past longer than is packed only the newest are there.
            oldest = past[0][1] if len(past) == 8 else datetime(2000, 1, 1, tzinfo=UTC)
            assert {e for e in added[user] if e[1] > oldest} <= set(past)
    helpers.run_jobs(settings, *BATCH, **FEW)
    fresh = helpers.settings_in(modules.parent / "fresh", settings.dataset, settings.data)
    shutil.copytree(Path(settings.home) / "received", Path(fresh.home) / "received")
    helpers.run_jobs(fresh, *BATCH[:-1], num_partitions=3)
    helpers.apply_in_process(fresh)
    helpers.run_jobs(fresh, "materialize", **FEW)
    anew = memory_of(fresh)
    for user in users:
        assert_same(settings, memory.read(user), anew.read(user))
    memory.close()
    anew.close()


IDENTITY = '("user_id", "item_id", "event_timestamp")'


@pytest.mark.parametrize("arrival", ["", "seen"])
def test_what_both_ways_say_of_one_event_is_one_event(
    modules: Path, helpers: Any, arrival: str
) -> None:
    """A file says more than an event by HTTP can, and nothing is corrected by that; of different values the one that
    arrived last holds, and of a file that does not say when, the file's.
    """
    name = f"same_event{arrival}"
    header = "user_id,item_id,event_timestamp,price,country,page,seen\n"
    source = '"log.csv"' + (f', arrival="{arrival}"' if arrival else "")
    text = declared(name, source, event_identity=IDENTITY, num_history_online="8").replace(
        "event_features=",
        'context_features=(Column("page", DType.STRING, "", kind=CATEGORY, nullable=True),), event_features=',
    )
    settings = shop(
        modules, helpers, name, text, {"log.csv": header + f"ann,a,{at(1)},1,UK,home,{at(1)}\n"}
    )
    helpers.run_jobs(settings, *BATCH[:-1], **FEW)
    helpers.apply_in_process(settings)
    helpers.run_jobs(settings, "materialize", **FEW)
    memory = memory_of(settings)
    same, other = purchase(0, "b", 2.0), purchase(1, "c", 2.0)
    memory.add("ann", [same, other])
    later = datetime.now(UTC).isoformat()
    log = header + f"ann,a,{at(1)},1,UK,home,{at(1)}\n"
    log += f"ann,b,{same['event_timestamp'].isoformat()},2,UK,search,{later}\n"
    log += f"ann,c,{other['event_timestamp'].isoformat()},7,UK,search,{later}\n"
    (Path(settings.data or "") / "log.csv").write_text(log)
    helpers.run_jobs(settings, *BATCH, **FEW)
    events = [
        e for e in read(settings, "events", "events").to_pylist() if e["replaced_timestamp"] is None
    ]
    assert [(e["item_id"], e["price"], e["page"]) for e in events] == [
        ("a", 1.0, "home"),
        ("b", 2.0, "search"),
        ("c", 7.0, "search"),
    ]
    # Known from whichever came first
    assert (events[1]["arrival_timestamp"] or NOW) < datetime.fromisoformat(later)
    assert memory.read("ann")[STATS]["history_end"] == 3
    memory.close()


def test_a_file_that_does_not_say_when_its_lines_arrived_has_the_last_word(
    modules: Path, helpers: Any
) -> None:
    header = "event_id,user_id,item_id,event_timestamp,price,country,gone\n"
    lines = header + f"e1,ann,a,{at(1)},1,UK,0\n"
    source = '"log.csv", deleted="gone"'
    settings = opened(modules, helpers, "last_word", lines, source, event_identity='("event_id",)')
    memory = memory_of(settings)
    memory.add(
        "ann", [purchase(0, "b") | {"event_id": "h1"}, purchase(1, "c") | {"event_id": "h2"}]
    )
    when = purchase(0)["event_timestamp"].isoformat()
    lines += f"h1,ann,b,{when},9,UK,0\nh2,ann,,,,,1\n"
    (Path(settings.data or "") / "log.csv").write_text(lines)
    helpers.run_jobs(settings, *BATCH, **FEW)
    events = read(settings, "events", "events").to_pylist()
    assert [(e["item_id"], e["price"]) for e in events] == [("a", 1.0), ("b", 9.0)]
    assert memory.read("ann")[STATS]["history_end"] == 2
    memory.close()


def test_a_dead_letter_of_somebody_known_by_http_alone_leaves_no_record(
    modules: Path, helpers: Any
) -> None:
    """What a server took does not count against the files either."""
    settings = opened(modules, helpers, "by_http_alone", LOG)
    memory = memory_of(settings)
    memory.add("new", [purchase(0, price=900.0)])
    assert memory.read("new")[STATS]["history_end"] == 1
    memory.close()
    redeclared(modules, "by_http_alone", "minimum=0,", "minimum=0, maximum=100,")
    helpers.run_jobs(settings, *BATCH, **FEW)
    memory = memory_of(settings)
    assert memory.read("new")[STATS]["history_end"] is None
    memory.close()


def test_an_event_taken_at_the_moment_of_an_erasure_goes_with_the_next_batch(
    modules: Path, helpers: Any
) -> None:
    settings = opened(modules, helpers, "moment", LOG)
    memory = memory_of(settings)
    memory.add("ann", [purchase(0)])
    contract = datasets.load_contract("moment")
    assert collect(settings, contract) == ""
    # A collection that was killed half-way
    draft = Path(settings.home) / "received" / ".part-000001-1.parquet.0123.draft"
    shutil.copy(next((Path(settings.home) / "received").glob("part-*.parquet")), draft)
    erase(settings, ["ann"], [], lambda name: helpers.run_jobs(settings, name, **FEW))
    assert not draft.exists()
    memory.add("ann", [purchase(1)])
    helpers.run_jobs(settings, *BATCH, **FEW)
    assert memory.read("ann")[STATS]["history_end"] is None
    assert log_of(settings).entries(["ann"]) == []
    assert OnlineEraser(open_store(settings), contract, []).find(["ann"]) == 0
    memory.close()


def test_histories_of_a_later_time_than_their_events_know_no_more(
    modules: Path, helpers: Any
) -> None:
    settings = opened(modules, helpers, "two_times", LOG)
    memory = memory_of(settings)
    memory.add("ann", [purchase(0)])
    taken = memory.read("ann")
    helpers.run_jobs(settings, "events", as_of="2026-01-20", **FEW)
    helpers.run_jobs(settings, "user_history", "item_stats", as_of="2026-12-30", **FEW)
    helpers.run_jobs(settings, "materialize", **FEW)
    assert_same(settings, memory.read("ann"), taken)
    memory.close()


def test_a_trim_that_was_skipped_is_made_up_for(modules: Path, helpers: Any) -> None:
    """Somebody merged at the moment when a run was published."""
    settings = opened(modules, helpers, "skipped", LOG)
    memory = memory_of(settings)
    memory.add("ann", [purchase(0)])
    received = Received(settings.home, datasets.load_contract("skipped"))
    with received.merging():
        helpers.run_jobs(settings, "events", **FEW)
    assert list(log_of(settings).users()) == ["ann"]
    (outcome,) = helpers.run_jobs(settings, "events", **FEW).values()
    assert not outcome.built
    assert list(log_of(settings).users()) == []
    memory.close()
