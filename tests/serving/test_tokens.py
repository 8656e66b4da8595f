"""Ranking from stored tokens: what the server reads, when it does without, and never a token of
another version.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from feature_repo import datasets
from feature_repo.contract.arrow import TIMESTAMP
from feature_repo.history import user_stats
from feature_repo.history.counts import from_bytes as sketch_of
from feature_repo.history.envelope import Envelope, EnvelopeError, from_bytes, to_bytes
from feature_repo.history.history import Histories, unpack
from feature_repo.history.sketch import Layout
from feature_repo.home.catalogue import Catalogue, TokenSpec
from feature_repo.home.tables import JobFolder
from feature_repo.store.event_log import log_of
from feature_repo.store.online_tokens import OnlineTokens
from feature_repo.store.online_users import NewRow, UserRecord, user_records
from modeling.bundle import bundle as bundles
from modeling.training.trainer import predict
from modeling.training_set.dataset import Warehouse
from serving.api.messages import RankContext, RankRequest
from serving.command import open_ranker
from serving.ranking.ranker import RankService
from serving.stores.features import FeastReader
from serving.stores.refresh import NoStateError, Refresher, UserMemory
from tests.periods import joined_period
from tests.ranking import ranked

CONTRACT = datasets.load_contract("online_retail")


@pytest.fixture(scope="module")
def ranker(token_shop: Any) -> RankService:
    return open_ranker(token_shop.settings, replay=True)


@pytest.fixture(scope="module")
def online(token_shop: Any) -> OnlineTokens:
    return OnlineTokens(token_shop.store, CONTRACT)


@pytest.fixture(scope="module")
def world(token_shop: Any) -> tuple[list[int], list[str]]:
    users = (
        JobFolder(token_shop.settings.home, "summary_tokens")
        .read("token_rows")["user_id"]
        .to_pylist()
    )
    items = (
        JobFolder(token_shop.settings.home, "item_stats").read("item_stats")["item_id"].to_pylist()
    )
    return sorted(set(users)), sorted(set(items))


def test_a_user_is_ranked_from_stored_tokens(ranker: RankService, world: Any) -> None:
    users, items = world
    answer = ranked(ranker, RankRequest(users[3], items[:50]))
    assert answer.tokens == ranker.bundle.tokens
    assert answer.degraded == []


def test_scores_from_tokens_are_those_that_training_computes(
    token_shop: Any, ranker: RankService, world: Any
) -> None:
    """The same logits from the token log and the point-in-time join as from the online store, at
    the end of the data.
    """
    bundle, settings = ranker.bundle, token_shop.settings
    warehouse = Warehouse(settings)
    split = joined_period(
        warehouse,
        token_shop.store,
        "ranking_v1_tokens",
        "test",
        TokenSpec(bundle.tokens or "", *bundle.token_shape),
    )
    encoded = bundle.encoder.featurise(split.requests)
    logits = predict(bundle.model, bundle.encoder, encoded)
    without = predict(bundle.model, bundle.encoder, replace(encoded, gather_tokens=None))
    assert np.isfinite(logits).all()
    assert np.abs(logits - without).max() > 1e-4  # thirty-day-old tokens are not fresh ones
    user, chosen = world[0][5], world[1][:40]
    read = ranker.reader.read_user(user)
    at = datetime.fromisoformat(bundle.manifest["data_as_of"])
    fresh = ranker.requests.encoded(replace(read, tokens=None), chosen, at)
    stored = ranker.requests.encoded(read, chosen, at)
    assert stored.gather_tokens is not None
    scores = [predict(bundle.model, bundle.encoder, one) for one in (stored, fresh)]
    events = read.columns["history_end"]
    if (
        events <= bundle.encoder.history_length
    ):  # then stage 1 reads the same events at request time
        np.testing.assert_allclose(scores[0], scores[1], atol=2e-3)  # fp16


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("none", "no_tokens"),
        ("torn", "tokens_unreadable"),
        ("another_user", "tokens_unreadable"),
        ("another_version", "tokens_mismatched"),
        ("tombstone", "no_tokens"),
    ],
)
def test_tokens_that_cannot_be_used_are_done_without_and_said(
    damage: str, reason: str, ranker: RankService, online: OnlineTokens, world: Any
) -> None:
    user, version = world[0][7], ranker.bundle.tokens or ""
    stored = online.read(version, [user])[0][0]
    assert stored is not None
    envelope = from_bytes(stored, user)
    changed = {
        "none": None,
        "torn": stored[:-3],
        "another_user": to_bytes(envelope, user + 1),
        "another_version": to_bytes(replace(envelope, fingerprint="ab" * 16), user),
        "tombstone": to_bytes(replace(envelope, tokens_SD=None), user),
    }[damage]
    request = RankRequest(user, world[1][:30])
    try:
        if changed is None:
            online.remove(version)
        else:
            online.write(version, [user], [changed], [None], envelope.computed_at + 1)
        answer = ranked(ranker, request)
    finally:
        rows = JobFolder(ranker_home(ranker), "summary_tokens").read("summary_tokens").to_pylist()
        for row in rows:
            online.write(
                version, [row["user_id"]], [row["tokens"]], [row["state"]], envelope.computed_at + 2
            )
    assert answer.degraded == [reason]
    assert answer.tokens is None
    assert len(answer.item_ids) == 30  # ranked from the short history
    assert ranked(ranker, request).degraded == []


def ranker_home(ranker: RankService) -> str:
    return str(Path(ranker.bundle.path).parent.parent)


def test_tokens_that_lag_are_used_and_said(
    ranker: RankService, online: OnlineTokens, world: Any
) -> None:
    user, version = world[0][9], ranker.bundle.tokens or ""
    ((stored, state),) = online.read(version, [user])
    envelope = from_bytes(stored or b"", user)
    behind = to_bytes(replace(envelope, num_events=envelope.num_events - 1), user)
    online.write(version, [user], [behind], [state], envelope.computed_at + 3)
    answer = ranked(ranker, RankRequest(user, world[1][:30]))
    online.write(version, [user], [stored or b""], [state], envelope.computed_at + 4)
    assert answer.degraded == ["stale_tokens"]
    assert answer.tokens == version


def test_a_request_of_the_past_does_not_read_tokens_that_know_better(
    ranker: RankService, world: Any
) -> None:
    user = world[0][2]
    tokens = ranker.reader.read_user(user).tokens
    assert tokens is not None
    at = datetime.fromisoformat("1970-01-01T00:00:00+00:00") + timedelta(microseconds=tokens.as_of)
    answer = ranked(ranker, RankRequest(user, world[1][:30], context=RankContext(at)))
    assert "newer_tokens" in answer.degraded
    assert answer.tokens is None
    later = ranked(
        ranker,
        RankRequest(user, world[1][:30], context=RankContext(at + timedelta(microseconds=1))),
    )
    assert later.tokens == ranker.bundle.tokens


class MixedStore:
    """An online store that careless hands have filled: values under the keys of other versions and
    other users.
    """

    def __init__(self, versions: list[str], users: int, shape: tuple[int, int]) -> None:
        rng, self.values = np.random.default_rng(0), {}
        for user in range(users):
            for version in versions:
                case = rng.random()
                holds = versions[rng.integers(len(versions))] if case < 0.3 else version
                whose = user + 1 if 0.3 <= case < 0.35 else user
                value = np.full(shape, versions.index(holds) + 1.0, np.float32)
                stored = to_bytes(Envelope(holds, 5, 5, 1, value), whose)
                if case >= 0.9:
                    stored = None if case >= 0.95 else stored[:40]
                self.values[user, version] = (
                    stored,
                    holds if whose == user and case < 0.9 else None,
                )

    def get_feature_service(self, name: str) -> str:
        return name

    def get_online_features(self, features: Any, entity_rows: list[dict[str, Any]]) -> Any:
        (row,) = entity_rows
        found = {column.name: [None] for column in CONTRACT.user_columns}
        stored = self.values[row["user_id"], row["token_version"]][0]
        return SimpleNamespace(to_dict=lambda: {**found, "history": [None], "tokens": [stored]})


def test_no_score_is_ever_computed_from_tokens_of_another_version(token_shop: Any) -> None:
    """Three versions mixed over ten thousand users, bundles flipped at random, a hundred thousand
    requests.
    """
    row = Catalogue(token_shop.settings.catalogue_url).live_bundle("online_retail")
    bundle = bundles.load(token_shop.settings.path(row.path), CONTRACT, row.digest)
    versions = [f"{number:02x}" * 16 for number in (1, 2, 3)]
    store = MixedStore(versions, 10_000, bundle.token_shape)
    rankers, seen = [], Counter[str]()
    for version in versions:
        manifest = {**bundle.manifest, "tokens": {**bundle.manifest["tokens"], "version": version}}
        reader = FeastReader(store, CONTRACT, "any", version)  # type: ignore[arg-type]
        rankers.append(RankService(replace(bundle, manifest=manifest), reader, None))  # type: ignore[arg-type]
    rng, current = np.random.default_rng(1), 0
    for user in rng.integers(0, 10_000, 100_000).tolist():
        if rng.random() < 0.01:
            current = int(rng.integers(3))
        version, ranker = versions[current], rankers[current]
        read = ranker.reader.read_user(user)
        gather = ranker.requests._tokens_of(read)
        holds = store.values[user, version][1]
        if gather is None:
            assert holds != version
            seen.update(read.problems)
        else:
            tokens, has = gather(np.array([0]))
            assert has.all()
            assert (tokens == current + 1).all()
            assert holds == version
            seen["ranked"] += 1
    assert (
        min(
            seen[name]
            for name in ("ranked", "tokens_mismatched", "tokens_unreadable", "unknown_user")
        )
        > 1000
    )
    with pytest.raises(
        ValueError, match="which accepts"
    ):  # the last line of defence: a reader at fault
        rankers[0].requests._tokens_of(
            replace(rankers[1].reader.read_user(user_with(store, versions[1])))
        )


def user_with(store: MixedStore, version: str) -> int:
    return next(user for (user, key), (_, holds) in store.values.items() if key == version == holds)


def event_of(item: str, at: int) -> dict[str, Any]:
    values: dict[str, Any] = {c.name: 1 for c in CONTRACT.history_columns}
    return values | {
        "item_id": item,
        "action": 0,
        "event_timestamp": datetime.fromtimestamp(0, UTC) + timedelta(microseconds=at),
    }


def test_one_more_event_refreshes_tokens_as_if_the_job_had_seen_it(
    token_shop: Any, ranker: RankService, online: OnlineTokens, world: Any
) -> None:
    from feature_repo.history.history import HistoryLog
    from modeling.summaries.summariser import Summariser

    user, version = world[0][11], ranker.bundle.tokens or ""
    ((stored, state),) = online.read(version, [user])
    before = from_bytes(stored or b"", user)
    summariser = Summariser(ranker.bundle.model, ranker.bundle.encoder)
    refresher = Refresher(summariser, online, CONTRACT, "fp32")
    at = before.as_of + 60_000_000
    events = [event_of(world[1][0], at), event_of(world[1][1], at + 5)]
    refreshed = [refresher.refresh(user, [event]) for event in events][-1]
    log = HistoryLog(CONTRACT, JobFolder(token_shop.settings.home, "user_history"))
    row = log.rows_of(pa.array([user]))
    found = log.gather(row, log.lengths[row])
    keys = pc.index_in(pa.array(world[1][:2]), log.items).to_numpy()
    more = {"action": [0, 0], "event_timestamp": [at, at + 5]}
    columns = {
        n: np.r_[v, np.array(more.get(n, [1, 1]), v.dtype)] for n, v in found.columns.items()
    }
    whole = Histories(np.array([0, len(found.times) + 2]), np.r_[found.item_keys, keys], columns)
    codes = ranker.bundle.encoder.vocabularies["item_id"].indices_of(log.items)
    expected = summariser.whole(whole, codes, np.array([0]))
    np.testing.assert_allclose(refreshed.tokens_SD, expected.tokens_BSD[0], atol=1e-5, rtol=1e-4)
    assert (refreshed.num_events, refreshed.as_of) == (before.num_events + 2, at + 5)
    assert refreshed.computed_at > before.computed_at
    answer = ranked(
        ranker,
        RankRequest(
            user,
            world[1][:30],
            context=RankContext(events[-1]["event_timestamp"] + timedelta(seconds=1)),
        ),
    )
    assert answer.tokens == version
    assert answer.degraded == []
    for when in (at, at + 4):
        with pytest.raises(ValueError, match="must not be earlier"):
            refresher.refresh(user, [event_of(world[1][0], when)])
    with pytest.raises(ValueError, match="must not be earlier"):
        refresher.refresh(user, [])
    with pytest.raises(NoStateError, match="no stored state"):
        refresher.refresh(-5, [event_of(world[1][0], at)])
    foreign = to_bytes(replace(from_bytes(state or b"", user), fingerprint="cd" * 16), user, "fp32")
    gone = to_bytes(replace(before, tokens_SD=None), user)
    for tokens, kept, error in ((stored, foreign, EnvelopeError), (gone, state, NoStateError)):
        online.write(version, [user], [tokens or b""], [kept], refreshed.computed_at + 1)
        with pytest.raises(error):  # tokens of one version never go on from the state of another
            refresher.refresh(user, [event_of(world[1][0], at + 9)])
    online.write(version, [user], [stored or b""], [state], refreshed.computed_at + 2)


def put_back(store: Any, record: UserRecord) -> None:
    """Store a record as it once was read, and forget what was acknowledged since."""
    records = user_records(store, CONTRACT, None)
    rows = {view: NewRow(values, 1) for view, values in record.views.items()}
    assert records.swap(records.read(record.user_id), rows)
    log = log_of(store.config)
    assert log is not None
    log.erase([record.user_id])


def test_one_more_event_is_remembered_as_the_jobs_would_build_it(
    token_shop: Any, world: Any
) -> None:
    from beam_jobs.jobs.user_history import packed_rows, remembered_codes

    user, store = world[0][1], token_shop.store
    events = JobFolder(token_shop.settings.home, "events").read("events")
    own = events.filter(pc.equal(events["user_id"], user)).sort_by(
        [("event_timestamp", "ascending")]
    )
    at = own["event_timestamp"][-1].as_py() + timedelta(hours=1)
    event = {
        "item_id": "20001",
        "action": 0,
        "event_timestamp": at,
        "quantity": 2.0,
        "unit_price": 1.5,
    }
    new = pa.Table.from_pylist(
        [{**event, "user_id": user, "source_position": 0}], schema=own.schema
    )
    whole = pa.concat_tables([own, new]).combine_chunks()
    memory = UserMemory(store, CONTRACT)
    before = memory.read(user)
    try:
        memory.add(user, [event])
        found = memory.read(user)
        # The batch knows it from when it arrived.
        place = whole.schema.get_field_index("arrival_timestamp")
        arrived = pa.array([None] * own.num_rows + [found.last], pa.int64()).cast(TIMESTAMP)
        whole = whole.set_column(place, "arrival_timestamp", arrived)
        expected = user_stats.build(CONTRACT, whole).to_pylist()[-1]
        stats = dict(found["user_stats"])
        assert stats == {name: expected[name] for name in stats}
        profiles = JobFolder(token_shop.settings.home, "events").read("item_profile")
        codes = remembered_codes(CONTRACT, whole, profiles)
        rows = packed_rows(CONTRACT, whole, user_stats.build(CONTRACT, whole), codes)
        packed = rows["history"][0].as_py()
        layout = Layout.of(CONTRACT)
        ours, identity = sketch_of(layout, found["user_history"]["sketch"], user)
        theirs, expected_identity = sketch_of(layout, rows["sketch"][0].as_py(), user)
        assert identity == expected_identity
        np.testing.assert_array_equal(ours._rows_RS, theirs._rows_RS)
        np.testing.assert_array_equal(ours._last_R, theirs._last_R)
        np.testing.assert_allclose(ours._weights_RK, theirs._weights_RK, rtol=1e-5)  # as float32
        assert unpack(CONTRACT, user, found["user_history"]["history"]).equals(
            unpack(CONTRACT, user, packed)
        )
    finally:
        put_back(store, before)
    assert memory.read(user) == before


def test_addressed_tokens_walk_the_same_road(
    shop: Any, helpers: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Built by the job, stored, matched by their version, and ranked from as from fresh ones."""
    road = helpers.token_road(shop, tmp_path_factory.mktemp("addressed"), "vista_addressed_tiny")
    ranker = open_ranker(road.settings, replay=True)
    rows = JobFolder(road.settings.home, "summary_tokens").read("token_rows")
    users = sorted(set(rows["user_id"].to_pylist()))
    items = ranker.bundle.encoder.items.values.to_pylist()[:40]
    at, compared = datetime.fromisoformat(ranker.bundle.manifest["data_as_of"]), 0
    ranker.bundle.encoder.history_length = CONTRACT.spec.num_history_online  # all, as the job did
    for user in users[:12]:
        assert ranked(ranker, RankRequest(user, items)).tokens == ranker.bundle.tokens
        read = ranker.reader.read_user(user)
        stored, fresh = (
            predict(
                ranker.bundle.model, ranker.bundle.encoder, ranker.requests.encoded(one, items, at)
            )
            for one in (read, replace(read, tokens=None))
        )
        if read.columns["history_end"] <= ranker.bundle.encoder.history_length:
            compared += 1
            np.testing.assert_allclose(stored, fresh, atol=2e-3)  # fp16
    assert compared
