"""Files whose lines say when they arrived, correct one another, and strike events: through the jobs and the
point-in-time join, to what a training example knows.
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from feature_repo import datasets
from feature_repo.contract.arrow import iso_micros, micros
from feature_repo.errors import DeclarationError
from feature_repo.history.history import HistoryLog
from feature_repo.home.erased import list_erased
from feature_repo.home.tables import JobFolder
from feature_repo.settings import Settings
from tests.small_shop import START, at, declared, read, shop

HEADER = "event_id,user_id,item_id,event_timestamp,what,price,country,seen,gone\n"
LOG = HEADER + "".join(
    [
        f"e1,ann,a,{at(1)},buy,1,UK,{at(1)},0\n",
        f"e2,ann,b,{at(2)},buy,2,UK,{at(9)},0\n",  # late
        f"e3,ann,c,{at(3)},buy,3,UK,{at(3)},0\n",
        f"e3,ann,c,{at(3)},buy,4,UK,{at(5)},\n",  # its price is corrected
        f"e4,ann,d,{at(4)},buy,4,UK,{at(4)},0\n",
        f"e4,,,,,,,{at(6)},true\n",  # struck, by a line that says nothing else
        f"e5,ann,e,{at(5)},buy,5,UK,{at(5)},0\n",
        f"e5,bob,e,{at(5)},like,5,UK,{at(7)},0\n",  # it was another customer's, and a like
        f"e6,bob,f,{at(8)},buy,6,UK,{at(8)},0\n",
        f"e6,bob,f,{at(8)},buy,6,UK,{at(10)},0\n",  # delivered twice
        f"e7,bob,g,{at(9)},buy,7,UK,,0\n",  # no arrival
        f"e8,bob,g,{at(9)},buy,8,UK,{at(9)},perhaps\n",
    ]
)
SOURCE = '"log.csv", action="what", arrival="seen", deleted="gone"'


@pytest.fixture
def arrivals(modules: Path, helpers: Any) -> Settings:
    text = declared("arrivals", SOURCE, event_identity='("event_id",)', max_bad_fraction="0.5")
    found = shop(modules, helpers, "arrivals", text, {"log.csv": LOG})
    helpers.run_jobs(found, "events", "user_history", "item_stats", num_partitions=3)
    return found


def test_every_line_is_an_event_a_strike_or_a_dead_letter(arrivals: Settings) -> None:
    counts = JobFolder(arrivals.home, "events").require().counts
    assert counts["rows_read"] == 12 == counts["rows_used"] + counts["rows_dead"]
    assert counts["strikes"] == 1
    assert counts["events_made"] == 9 == counts["rows_events"] + counts["events_dead"]
    assert counts["events_replaced"] == 3
    letters = read(arrivals, "events", "dead_letters").to_pylist()
    reasons = sorted(
        letter["reason"].split(":")[0] + " " + letter["reason"].split(":")[1] for letter in letters
    )
    assert [reason.split()[0] for reason in reasons] == ["gone", "repeated", "seen"]
    assert JobFolder(arrivals.home, "events").require().as_of == at(9)[:19] + ".000001+00:00"


def known(settings: Settings, user: str, time: str) -> list[tuple[str, float]]:
    """Items and prices of what a request of a user's at a time finds in its history."""
    index = read(settings, "user_history", "user_stats")
    rows = index.filter(pa.array(micros(index["event_timestamp"]) <= iso_micros(time)))
    ends = [row["history_end"] for row in rows.to_pylist() if row["user_id"] == user]
    log = HistoryLog(
        datasets.load_contract(settings.dataset), JobFolder(settings.home, "user_history")
    )
    found = log.gather(
        log.rows_of(pa.array([user])),
        np.array([ends[-1] if ends else 0]),
        times=np.array([iso_micros(time)]),
    )
    items = [log.items[int(key)].as_py() for key in found.item_keys]
    return list(zip(items, found.columns["price"].tolist(), strict=True))


def test_a_request_knows_what_had_arrived(arrivals: Settings) -> None:
    assert known(arrivals, "ann", at(4.5)) == [("a", 1), ("c", 3), ("d", 4)]
    assert known(arrivals, "ann", at(5.5)) == [("a", 1), ("c", 4), ("d", 4), ("e", 5)]
    assert known(arrivals, "ann", at(6.5)) == [("a", 1), ("c", 4), ("e", 5)]
    assert known(arrivals, "ann", at(8)) == [("a", 1), ("c", 4)]
    assert known(arrivals, "ann", at(9.5)) == [("a", 1), ("b", 2), ("c", 4)]
    assert known(arrivals, "bob", at(6)) == []
    assert known(arrivals, "bob", at(8.5)) == [("e", 5), ("f", 6)]


def test_what_is_online_is_what_is_known_in_the_end(arrivals: Settings) -> None:
    from feature_repo.history.history import unpack

    contract = datasets.load_contract("arrivals")
    rows = read(arrivals, "user_history", "user_history").to_pylist()
    found = {
        row["user_id"]: unpack(contract, row["user_id"], row["history"])["item_id"].to_pylist()
        for row in rows
    }
    assert found == {"ann": ["a", "b", "c"], "bob": ["e", "f"]}
    newest = {
        row["user_id"]: row["history_end"]
        for row in read(arrivals, "user_history", "user_stats").to_pylist()
    }
    assert newest == {"ann": 3, "bob": 2}


def test_an_event_that_moved_to_an_erased_user_does_not_fall_back_to_the_first(
    arrivals: Settings, helpers: Any
) -> None:
    list_erased(arrivals.home, ["bob"])
    helpers.run_jobs(arrivals, "events", "user_history", num_partitions=3)
    assert known(arrivals, "ann", at(6.5)) == [("a", 1), ("c", 4), ("e", 5)]
    assert known(arrivals, "ann", at(9.5)) == [("a", 1), ("b", 2), ("c", 4)]
    assert read(arrivals, "events", "events")["user_id"].unique().to_pylist() == ["ann"]


def test_a_run_of_the_past_knows_no_more_than_was_known_then(
    arrivals: Settings, helpers: Any
) -> None:
    then = helpers.replace(arrivals, home=f"{arrivals.home}-then")
    helpers.run_jobs(then, "events", "user_history", as_of=at(5.5), num_partitions=2)
    for user in ("ann", "bob"):
        for day in range(12):
            time = at(min(day, 5.5))
            assert known(then, user, time) == known(arrivals, user, time)
    index = read(then, "user_history", "user_stats")
    assert micros(index["event_timestamp"]).max() <= iso_micros(at(5.5))


def test_the_same_bytes_whatever_the_order_of_lines(
    modules: Path, arrivals: Settings, helpers: Any
) -> None:
    """Where lines say when they arrived neither rows nor partitions decide."""
    lines = LOG.splitlines(keepends=True)
    text = declared("arrivals", SOURCE, event_identity='("event_id",)', max_bad_fraction="0.5")
    shuffled = "".join([lines[0], *reversed(lines[1:])])
    again = shop(modules, helpers, "arrivals", text, {"log.csv": shuffled})
    again = helpers.replace(again, home=f"{arrivals.home}-again")
    helpers.run_jobs(again, "events", "user_history", "item_stats", num_partitions=1)
    for job, table in (("user_history", "user_stats"), ("item_stats", "item_stats")):
        one, other = (read(settings, job, table) for settings in (arrivals, again))
        order = [(name, "ascending") for name in [*one.column_names[:1], "event_timestamp"]]
        assert one.sort_by(order).equals(other.sort_by(order))


@pytest.mark.parametrize("how", ["path", "file"])
def test_a_folder_or_a_file_says_when_its_rows_arrived(
    modules: Path, helpers: Any, how: str
) -> None:
    header = "event_id,user_id,item_id,event_timestamp,what,price,country\n"
    files = {
        "log/dt=2026-01-02/part.csv": f"{header}e1,ann,a,{at(0.5)},buy,1,UK\n",
        "log/dt=2026-01-05/part.csv": f"{header}e2,ann,b,{at(0.6)},buy,2,UK\ne1,ann,a,{at(0.5)},buy,3,UK\n",
    }
    arrival = "arrival='dt'" if how == "path" else "arrival=FILE_TIME"
    text = declared("delivered", f"'log', action='what', {arrival}", event_identity='("event_id",)')
    settings = shop(modules, helpers, "delivered", text, files)
    for file in files:
        delivered = datetime.fromisoformat(file[7:17]).replace(tzinfo=UTC).timestamp()
        os.utime(modules.parent / "delivered" / file, (delivered, delivered))
    helpers.run_jobs(settings, "events", "user_history", num_partitions=2)
    assert known(settings, "ann", at(0.9)) == []
    assert known(settings, "ann", at(2)) == [("a", 1)]
    assert known(settings, "ann", at(4.1)) == [("a", 3), ("b", 2)]
    if how == "file":
        # A file that is written anew arrives anew.
        file = modules.parent / "delivered" / "log/dt=2026-01-02/part.csv"
        os.utime(file, (START.timestamp() + 86_400 * 6,) * 2)
        outcome = helpers.run_jobs(settings, "events", "user_history", num_partitions=2)["events"]
        assert outcome.built
        assert known(settings, "ann", at(5.1)) == [("a", 3), ("b", 2)]
        assert known(settings, "ann", at(6.1)) == [("a", 1), ("b", 2)]


def test_features_of_a_late_line_are_joined_once_it_arrived(modules: Path, helpers: Any) -> None:
    """Ann moved, which became known late, and after a line of an older address."""
    header = "event_id,user_id,item_id,event_timestamp,what,price,country,seen\n"
    log = header + "".join(
        [
            f"e1,ann,a,{at(1)},buy,1,UK,{at(1)}\n",
            f"e2,ann,b,{at(4)},buy,2,France,{at(4)}\n",
            f"e3,ann,c,{at(2)},buy,3,Spain,{at(6)}\n",  # of a time before France
        ]
    )
    text = declared("moved", '"log.csv", action="what", arrival="seen"')
    settings = shop(modules, helpers, "moved", text, {"log.csv": log})
    helpers.run_jobs(settings, "events", "user_history", "item_stats", num_partitions=2)
    store = helpers.apply_in_process(settings)
    days = [0.5, 1.5, 2.5, 3.9, 4.5, 5.9, 6.5]
    asked = pa.table(
        {
            "user_id": ["ann"] * len(days),
            "event_timestamp": pa.array(
                [datetime.fromisoformat(at(d)) for d in days], pa.timestamp("us", "UTC")
            ),
        }
    )
    joined = store.get_historical_features(
        asked, ["user_profile:country", "user_stats:history_end"], filter_by_created_timestamp=True
    ).to_arrow()
    assert joined["country"].to_pylist() == [None, "UK", "UK", "UK", "France", "France", "France"]
    assert joined["history_end"].to_pylist() == [None, 1, 1, 1, 2, 2, 3]


@pytest.mark.parametrize(
    ("source", "fields", "message"),
    [
        ('"log.csv", deleted="gone"', {}, "nothing says which event a line strikes"),
        (
            '"log.csv"',
            {"items": 'Source("items.csv", deleted="gone")'},
            "only lines of events strike something",
        ),
    ],
)
def test_a_strike_that_names_nothing_is_refused(
    modules: Path, source: str, fields: dict[str, str], message: str
) -> None:
    (modules / "wrong.py").write_text(declared("wrong", source, **fields))
    with pytest.raises(DeclarationError, match=message):
        datasets.load("wrong")
