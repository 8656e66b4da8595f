"""What a long history is worth: measured once, told with intervals, and never more than the figures say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from feature_repo.history import user_stats
from modeling.comparison import memory_worth
from modeling.comparison.memory_costs import LengthCost, traps_of
from modeling.comparison.memory_page import (
    kept_rows,
    recommendation,
    tell,
    text_picture,
    write_page,
)
from modeling.comparison.memory_worth import (
    EFFORTS,
    Measured,
    NetworkGain,
    ShareKept,
    Worth,
    measure_memory,
    recommended,
)
from modeling.training_set.dataset import Warehouse, _capped
from modeling.training_set.lengths import lengths_of
from modeling.training_set.sample import Sample

EFFORT = replace(EFFORTS["quick"], lengths=(0, 3, None))


@pytest.fixture(scope="module")
def measured(shop: Any) -> Measured:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_worth, "LEAST", 10)
        return measure_memory(shop.settings, EFFORT)


def test_habits_of_the_shop_are_worth_much_and_a_length_keeps_a_part(measured: Measured) -> None:
    whole = {one.metric: one for one in measured.worth if one.kind == "all requests"}
    for metric in ("ndcg@10", "gauc"):
        one = whole[metric]
        assert one.low < one.all_events < one.high
        assert one.low > 0
        assert list(one.kept) == ["3", "all"]
        assert one.kept["all"].share == one.kept["all"].low == 1
        few = one.kept["3"]
        assert few.low <= few.share <= few.high
        assert few.share < 0.9
    figures = measured.readers["trees"]
    assert figures["all"]["ndcg@10"] - figures["none"]["ndcg@10"] == pytest.approx(
        whole["ndcg@10"].all_events
    )
    assert set(measured.readers) == {"trees", "regression", "trees and a network"}
    none, few, everything = (measured.cost[name] for name in ("none", "3", "all"))
    assert none.user_bytes < few.user_bytes < everything.user_bytes
    assert (none.days, none.decisions, few.decisions) == (0, 0, 3)
    assert few.days < everything.days
    assert min(none.request_ms, few.request_ms) > 0
    assert measured.network is not None
    assert measured.network.request_ms > everything.request_ms
    assert measured.network.token_bytes == 2 * 64 * 65
    assert max(measured.noise.values()) < whole["ndcg@10"].all_events


def test_kinds_are_parts_of_all_requests(measured: Measured) -> None:
    kinds = {one.kind: one.requests for one in measured.worth if one.metric == "ndcg@10"}
    assert max(kinds.values()) == kinds["all requests"]
    quarters = [number for kind, number in kinds.items() if kind.startswith("users of")]
    assert sum(quarters) <= kinds["all requests"]
    assert len(quarters) >= 2


def test_the_picture_of_the_terminal_has_a_bar_for_each_length(measured: Measured) -> None:
    first, few, everything, last = text_picture(replace(measured, network=None))
    whole = measured.of_all("ndcg@10")
    assert f"{whole.all_events:+.3f}" in first
    assert few.split()[:2] == ["newest", "3"]
    assert few.count("█") == round(40 * whole.kept["3"].share)
    assert everything.count("█") == 40
    # Without a network nothing is said of tokens.
    assert "tokens" not in last
    assert "python -m modeling memory" in last


def test_what_is_measured_is_not_measured_again(
    shop: Any, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_worth, "LEAST", 10)

    def refuse(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(memory_worth, "lengths_of", refuse)
    again = measure_memory(shop.settings, EFFORT)
    assert again.worth == measured.worth
    assert again.readers == measured.readers


def test_the_page_and_the_terminal_tell_the_same(
    measured: Measured, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = write_page(measured, tmp_path)
    told = page.read_text()
    assert recommendation(measured).split(";")[0] in told
    assert (tmp_path / "memory.png").stat().st_size > 1000
    assert len(kept_rows(measured)) > 3
    tell(measured)
    printed = " ".join(capsys.readouterr().out.split())
    assert "Any history over none" in printed
    assert "Recommended:" in printed


def made(kept: dict[str, tuple[float, float, float]], low: float = 0.1) -> Measured:
    """Figures of one kind of requests."""
    shares = {name: ShareKept(0.5, *numbers) for name, numbers in kept.items()}
    worth = Worth("all requests", "ndcg@10", 900, 0.2, low, 0.3, shares)
    return Measured(
        "a shop",
        {"test": 900, "of_user": 0},
        [worth],
        {"trees": {name: {"ndcg@10": 0.5, "gauc": 0.7} for name in kept}},
        {"ndcg@10": 0.001},
        NetworkGain({"ndcg@10": (0.001, -0.002, 0.004)}, 3.0, 8_320),
        {name: LengthCost(1.0, 100.0, 5.0, 9.0) for name in kept},
        40.0,
        [],
    )


@pytest.mark.parametrize(
    ("kept", "length"),
    [
        ({"10": (0.97, 0.93, 1.02), "50": (1.0, 0.98, 1.01), "all": (1.0, 1.0, 1.0)}, "10"),
        ({"10": (0.95, 0.85, 1.05), "50": (0.99, 0.95, 1.01), "all": (1.0, 1.0, 1.0)}, "50"),
        ({"10": (0.5, 0.4, 0.6), "50": (0.8, 0.7, 0.88), "all": (1.0, 1.0, 1.0)}, "all"),
    ],
)
def test_the_shortest_length_that_surely_loses_at_most_a_tenth(
    kept: dict[str, tuple[float, float, float]], length: str
) -> None:
    measured = made(kept)
    assert recommended(measured) == length
    said = recommendation(measured)
    assert ("all events" if length == "all" else f"newest {length} events") in said
    assert "`trees`, without tokens" in said


@pytest.mark.parametrize(
    ("kept", "noise"),
    [
        # Fifty events may keep 92 %, or 70 %.
        ({"10": (0.5, 0.4, 0.6), "50": (0.8, 0.7, 0.92), "all": (1.0, 1.0, 1.0)}, 0.001),
        # Two trainings on the same events differ by a tenth of what is measured.
        ({"10": (0.5, 0.4, 0.6), "50": (0.95, 0.93, 0.97), "all": (1.0, 1.0, 1.0)}, 0.02),
    ],
)
def test_what_is_not_sure_is_not_recommended(
    kept: dict[str, tuple[float, float, float]], noise: float
) -> None:
    measured = replace(made(kept), noise={"ndcg@10": noise})
    assert recommended(measured) is None
    said = recommendation(measured)
    assert "cannot tell: whether the newest 50 events do" in said
    assert "keep all events meanwhile" in said


def test_where_history_is_worth_nothing_clear_nothing_is_recommended() -> None:
    measured = made({"10": (np.nan,) * 3, "all": (np.nan,) * 3}, low=-0.01)
    assert recommended(measured) is None
    assert "cannot tell" in recommendation(measured)


def test_a_network_that_adds_something_asks_for_tokens() -> None:
    kept = {"10": (0.97, 0.93, 1.02), "all": (1.0, 1.0, 1.0)}
    adds = NetworkGain({"ndcg@10": (0.006, 0.002, 0.01)}, 3.0, 8_320)
    said = recommendation(replace(made(kept), network=adds))
    assert "`vista_addressed_trees` (8,320 bytes of tokens a user, 3.0 CPU ms a request)" in said
    # Less than two trainings differ by is noise.
    measured = replace(made(kept), network=adds, noise={"ndcg@10": 0.003})
    assert "`trees`, without tokens" in recommendation(measured)
    takes = NetworkGain({"ndcg@10": (-0.006, -0.01, -0.002)}, 3.0, 8_320)
    assert "takes something" in recommendation(replace(made(kept), network=takes))


def test_nothing_is_known_of_a_history_of_no_events(shop: Any) -> None:
    with lengths_of(shop.settings, shop.store, "ranking_v1", Sample()) as lengths:
        none = lengths.encoded("test", 0)
        names = list(lengths.encoder.dense_names)
        of_user = list(lengths.encoder.user_dense_names)
        whole = lengths.requests("test")
        every = lengths.requests("test", 10_000)
    user = np.asarray(none.dense_BG)
    for name in ("tenure_days", "mean_value", "days_ago"):
        assert np.isnan(user[:, of_user.index(name)]).all()
    assert (user[:, of_user.index("events")] == 0).all()
    # As many as there are: the statistics that Feast joins.
    for name in user_stats.read_names(whole.log.contract):
        one, other = (
            found.requests.user_columns[name].to_numpy(zero_copy_only=False)
            for found in (whole, every)
        )
        np.testing.assert_allclose(one.astype(float), other.astype(float), rtol=1e-6)
    dense = np.asarray(none.candidate_dense)
    assert (dense[:, names.index("match_times")] == 0).all()
    for name in ("life_item_days_ago", "near_all", "near_text", "value_ratio"):
        assert np.isnan(dense[:, names.index(name)]).all()
    assert (dense[:, names.index("life_item_lift")] == 0)[
        ~np.isnan(dense[:, names.index("count_total")])
    ].all()


def test_requests_of_one_user_are_capped_evenly(shop: Any) -> None:
    warehouse = Warehouse(shop.settings)
    rows = pa.concat_tables([rows for _, rows in warehouse.pieces(10_000)])
    capped = _capped(rows, "user_id", 3)
    by_user: dict[Any, list[str]] = {}
    for row in rows.to_pylist():
        own = by_user.setdefault(row["user_id"], [])
        if row["request_id"] not in own:
            own.append(row["request_id"])
    kept = set(capped["request_id"].to_pylist())
    for own in by_user.values():
        assert sum(request in kept for request in own) == min(len(own), 3)
    # Whole requests
    sizes = rows.group_by("request_id").aggregate([("item_id", "count")])
    of_kept = capped.group_by("request_id").aggregate([("item_id", "count")])
    whole = dict(
        zip(sizes["request_id"].to_pylist(), sizes["item_id_count"].to_pylist(), strict=True)
    )
    for request, size in zip(
        of_kept["request_id"].to_pylist(), of_kept["item_id_count"].to_pylist(), strict=True
    ):
        assert whole[request] == size


def test_traps_are_named_where_they_are(shop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    warehouse = Warehouse(shop.settings)
    days = np.array([0.1, 0.2, 9.0])
    found = {trap.name: trap.says for trap in traps_of(warehouse.log, days, Sample())}
    # Lines of an invoice share a time, and nobody owns the shop.
    assert "ties in time" in found
    assert "few users" not in found
    assert "67%" in found["histories of the same day"]
    capped = traps_of(warehouse.log, days, Sample(of_user=7))
    assert "of each user 7 requests" in {t.name: t.says for t in capped}["few users"]


class Log:
    """Two hundred users; the first has half of the events, all of one item and in runs of three a second."""

    def __init__(self) -> None:
        self.users = list(range(200))
        self.lengths = np.array([1_990, *[10] * 199])
        self.late = {1, 2, 3, 4}

    def gather(self, rows: np.ndarray, ends: np.ndarray, columns: Any) -> SimpleNamespace:
        day = 86_400_000_000
        times = [np.arange(n) // 3 * day for n in ends]
        keys = [
            np.zeros(n, np.int64) if row == 0 else np.arange(n)
            for row, n in zip(rows, ends, strict=True)
        ]
        return SimpleNamespace(
            times=np.concatenate(times), item_keys=np.concatenate(keys), lengths=ends
        )

    def any_late(self, rows: np.ndarray) -> bool:
        return bool(self.late & set(rows.tolist()))


def test_every_trap_has_its_figure() -> None:
    log: Any = Log()
    found = {trap.name: trap.says for trap in traps_of(log, np.array([0.5, 3.0]), Sample())}
    assert set(found) == {
        "runs of one item",
        "days",
        "ties in time",
        "few users",
        "histories of the same day",
        "late events",
    }
    # All 1,989 pairs of the first user, of 1,989 + 199 × 9
    assert "53% of events are of the item before" in found["runs of one item"]
    assert "50 events are 17 days of a user" in found["days"]
    # 1 % are two users.
    assert "1 % of the users have 50% of the events" in found["few users"]
    assert "50% of the requests" in found["histories of the same day"]
    assert "2% of the users" in found["late events"]


def test_requests_of_a_user_are_capped_where_a_few_own_the_log(
    shop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    warehouse = Warehouse(shop.settings)
    assert memory_worth._sample(warehouse, (100, 50)).of_user is None
    monkeypatch.setattr(memory_worth, "share_of_few", lambda log: 0.3)
    assert memory_worth._sample(warehouse, (100, 50)).of_user == memory_worth.OF_USER
