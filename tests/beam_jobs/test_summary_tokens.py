"""The job summary_tokens: whose tokens, of which events, stored where; skipped, extended, refused;
same bytes always.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch

from feature_repo import datasets
from feature_repo.contract.arrow import micros, micros_iso
from feature_repo.history.envelope import Envelope, from_bytes
from feature_repo.history.history import Histories, HistoryLog
from feature_repo.history.token_log import TokenLog, TokenLogError, drop_version
from feature_repo.home.catalogue import Catalogue, TokenSpec
from feature_repo.home.tables import JobFolder
from feature_repo.store.online_tokens import OnlineTokens
from modeling.bundle import bundle as bundles
from modeling.bundle.bundle import Bundle
from modeling.models.vista import VISTA
from modeling.summaries.summariser import Summariser
from tests.periods import joined_period
from tests.ranking import ranked

CONTRACT = datasets.load_contract("online_retail")
ROOT = Path(__file__).resolve().parents[2]
COMPUTED_AT = "2011-12-20T00:00:00"


def live(road: Any) -> Bundle:
    row = Catalogue(road.settings.catalogue_url).live_bundle(road.settings.dataset)
    return bundles.load(road.settings.path(row.path), CONTRACT, row.digest)


def histories(road: Any) -> tuple[HistoryLog, list[Any]]:
    log = HistoryLog(CONTRACT, JobFolder(road.settings.home, "user_history"))
    return log, log.users.to_pylist()


def online(road: Any, users: list[Any]) -> list[Envelope]:
    stored = OnlineTokens(road.store, CONTRACT).read(live(road).tokens or "", users)
    return [
        from_bytes(tokens or b"", user) for user, (tokens, _) in zip(users, stored, strict=True)
    ]


def encoded_tokens(bundle: Bundle, log: HistoryLog, row: int, end: int, at: int) -> np.ndarray:
    """One user's tokens as the model makes them of a padded batch: another way than the job's."""
    encoder, found = bundle.encoder, log.gather(np.array([row]), np.array([end]))
    none = np.zeros((1, 0))
    item_of_key = encoder.vocabularies[encoder.item_key].indices_of(log.items)
    user = encoder.user_inputs(
        found, np.array([at]), none.astype(np.int64), none.astype(np.float32), item_of_key
    )
    with torch.inference_mode():
        stage_1 = cast(VISTA, bundle.model).stage_1
        assert stage_1 is not None
        tokens: np.ndarray = stage_1(user)[0].numpy()
    return tokens


def test_every_users_tokens_are_those_of_the_model(token_shop: Any) -> None:
    bundle, (log, users) = live(token_shop), histories(token_shop)
    assert bundle.manifest["recipe"] == "vista_tiny"  # it went live with its tokens
    for row, envelope in enumerate(online(token_shop, users)):
        expected = encoded_tokens(bundle, log, row, int(log.lengths[row]), 0)
        assert envelope.fingerprint == bundle.tokens
        assert envelope.num_events == log.lengths[row]
        assert envelope.tokens_SD is not None
        np.testing.assert_allclose(envelope.tokens_SD, expected, atol=2e-3, rtol=2e-3)  # fp16
    counts = JobFolder(token_shop.settings.home, "summary_tokens").require().counts
    assert counts["users"] == counts["covered"] == counts["users_written"] == len(users)


def test_training_reads_the_tokens_of_the_time_and_never_later_ones(token_shop: Any) -> None:
    """Through Feast's join: a request sees the newest snapshot at or before it, made of events
    before that alone.
    """
    from modeling.training_set.dataset import Warehouse

    bundle, (log, _) = live(token_shop), histories(token_shop)
    warehouse = Warehouse(token_shop.settings)
    shape = bundle.token_shape
    split = joined_period(
        warehouse,
        token_shop.store,
        "ranking_v1_tokens",
        "test",
        TokenSpec(bundle.tokens or "", *shape),
    )
    assert split.requests.gather_tokens is not None
    tokens, has = split.requests.gather_tokens(np.arange(len(split.requests)))
    pointers = JobFolder(token_shop.settings.home, "summary_tokens").read("token_rows")
    by_user: dict[Any, list[tuple[int, int]]] = {}
    for user, at, events in zip(
        pointers["user_id"].to_pylist(),
        micros(pointers["event_timestamp"]).tolist(),
        pointers["token_events"].to_pylist(),
        strict=True,
    ):
        by_user.setdefault(user, []).append((at, events))
    checked = 0
    for request in range(0, len(tokens), 7):
        user, at = split.users[request].as_py(), int(split.requests.times[request])
        before = [pair for pair in sorted(by_user.get(user, [])) if pair[0] <= at]
        assert has[request] == bool(before)
        if before:
            row = int(log.rows_of(pa.array([user]))[0])
            times = log.gather(np.array([row]), log.lengths[[row]]).times
            assert before[-1][1] == (times < before[-1][0]).sum()
            expected = encoded_tokens(bundle, log, row, before[-1][1], before[-1][0])
            np.testing.assert_allclose(tokens[request], expected, atol=2e-3, rtol=2e-3)
            checked += 1
    assert checked > 3


def test_reading_back_with_feast_gives_the_bytes_that_were_stored(token_shop: Any) -> None:
    rows = JobFolder(token_shop.settings.home, "summary_tokens").read("summary_tokens").to_pylist()
    version = live(token_shop).tokens or ""
    read = OnlineTokens(token_shop.store, CONTRACT).read(version, [row["user_id"] for row in rows])
    assert read == [(row["tokens"], row["state"]) for row in rows]
    log = TokenLog(CONTRACT, token_shop.settings.home, version)
    newest = JobFolder(token_shop.settings.home, "summary_tokens").read("token_rows").to_pylist()
    last = {
        row["user_id"]: row["token_row"]
        for row in sorted(newest, key=lambda row: row["event_timestamp"])
    }
    found, has = log.gather(
        np.array([last[row["user_id"]] for row in rows]), live(token_shop).token_shape
    )
    assert has.all()
    for row, tokens in zip(rows, found, strict=True):
        np.testing.assert_array_equal(tokens, from_bytes(row["tokens"], row["user_id"]).tokens_SD)


@pytest.mark.parametrize("recipe", ["vista_tiny", "vista_bidirectional_tiny"])
def test_a_later_run_takes_up_new_events_and_skips_who_has_none(
    recipe: str, shop: Any, tmp_path: Path, helpers: Any
) -> None:
    road = helpers.copied(shop, tmp_path)
    helpers.train_road(road, recipe)
    bundle_row = Catalogue(road.settings.catalogue_url).bundle("online_retail", recipe)
    bundle = bundles.load(road.settings.path(bundle_row.path), CONTRACT, bundle_row.digest)
    log, users = histories(road)
    whole = log.gather(np.arange(len(users)), log.lengths)
    middle = int(np.quantile(whole.times, 0.8))
    first = helpers.run_jobs(
        road.settings, "summary_tokens", bundle=recipe, as_of=micros_iso(middle)
    )["summary_tokens"]
    second = helpers.run_jobs(road.settings, "summary_tokens", bundle=recipe)["summary_tokens"]
    ends = np.array(
        [
            (whole.times[a:b] < middle).sum()
            for a, b in zip(whole.offsets, whole.offsets[1:], strict=False)
        ]
    )
    new = log.lengths > ends
    assert first.manifest.counts["users"] == (ends > 0).sum()
    assert second.manifest.counts["users_written"] == new.sum() < len(users)
    assert second.manifest.counts["skipped"] == (~new).sum() > 0
    grown = (new & (ends > 0)).sum()
    assert second.manifest.counts["extended"] == (grown if recipe == "vista_tiny" else 0)
    end = second.manifest.as_of_micros
    for row, envelope in enumerate(online(road, users)):
        at = end if new[row] else middle
        expected = encoded_tokens(bundle, log, row, int(log.lengths[row]), at)
        if recipe != "vista_tiny":
            recent = log.gather(np.array([row]), log.lengths[[row]], bundle.encoder.history_length)
            expected = (
                Summariser(bundle.model, bundle.encoder)
                .whole(
                    recent,
                    bundle.encoder.vocabularies["item_id"].indices_of(log.items),
                    np.array([at]),
                )
                .tokens_BSD[0]
            )
        np.testing.assert_allclose(envelope.tokens_SD, expected, atol=2e-3, rtol=2e-3)
    assert not helpers.run_jobs(road.settings, "summary_tokens", bundle=recipe)[
        "summary_tokens"
    ].built


@pytest.fixture
def fresh(token_shop: Any, tmp_path: Path, helpers: Any) -> Any:
    """A shop with the same trained bundle, and no tokens yet."""
    return untokened(token_shop, tmp_path, helpers)


def untokened(token_shop: Any, folder: Path, helpers: Any) -> Any:
    copy = helpers.copied(token_shop, folder)
    shutil.rmtree(Path(copy.settings.home, "summary_tokens"))
    helpers.train_road(copy, "vista_tiny")
    return copy


def contents(road: Any) -> tuple[dict[str, bytes], list[Any]]:
    """Every part by its name, and every value online."""
    folder = JobFolder(road.settings.home, "summary_tokens")
    parts = {
        f"{table}/{Path(part.path).name}": Path(folder.root, part.path).read_bytes()
        for table, found in folder.require().tables.items()
        for part in found
    }
    users = sorted(folder.read("summary_tokens")["user_id"].to_pylist())
    return parts, OnlineTokens(road.store, CONTRACT).read(live(road).tokens or "", users)


def build(road: Any, helpers: Any, **options: Any) -> Any:
    chosen = {"bundle": "vista_tiny", "every_days": 60.0, "computed_at": COMPUTED_AT, **options}
    return helpers.run_jobs(road.settings, "summary_tokens", **chosen)["summary_tokens"]


def test_stopped_at_any_write_and_run_again_gives_the_same_bytes(
    fresh: Any, token_shop: Any, tmp_path: Path, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offline part, note beside it, online row or manifest: wherever it ends, nothing shows, and
    the next run heals it.
    """
    reference = untokened(token_shop, tmp_path / "reference", helpers)
    build(reference, helpers)
    for stop_at in (0, 3, 6, 11, 20, 26):
        left = iter(range(stop_at))

        def counted(write: Any, left: Any = left) -> Any:
            def stopping(self: Any, *given: Any) -> Any:
                if next(left, None) is None:
                    raise OSError("power cut")
                return write(self, *given)

            return stopping

        with monkeypatch.context() as patch:
            patch.setattr(JobFolder, "write_bytes", counted(JobFolder.write_bytes))
            patch.setattr(OnlineTokens, "write", counted(OnlineTokens.write))
            with pytest.raises(Exception, match="power cut"):
                build(fresh, helpers)
        assert JobFolder(fresh.settings.home, "summary_tokens").manifest() is None
        with pytest.raises(LookupError):
            Catalogue(fresh.settings.catalogue_url).live_bundle("online_retail")
    build(fresh, helpers)
    assert contents(fresh) == contents(reference)
    assert not build(fresh, helpers).built


@pytest.mark.slow
def test_killed_and_run_again_gives_the_same_bytes(
    fresh: Any, token_shop: Any, tmp_path: Path, helpers: Any
) -> None:
    """SIGKILL a real process while it writes."""
    reference = untokened(token_shop, tmp_path / "reference", helpers)
    command = [
        sys.executable,
        "-m",
        "beam_jobs",
        "summary_tokens",
        "--bundle=vista_tiny",
        "--every_days=60",
    ]
    command.append(f"--computed_at={COMPUTED_AT}")
    environment = {**os.environ, "MEMOIR_HOME": fresh.settings.root, "MEMOIR_DATA": str(fresh.data)}
    folder = Path(fresh.settings.home, "summary_tokens")

    def parts_written() -> int:
        # os.walk passes over a folder that the job removes meanwhile; Path.glob raises on some
        # Pythons.
        return sum(
            name.startswith("run-")
            for _, folders, files in os.walk(folder)
            for name in (*folders, *files)
        )

    for wanted in (1, 4):
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and parts_written() < wanted:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (folder / "manifest.json").exists()
    subprocess.run(command, env=environment, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    build(reference, helpers)
    assert contents(fresh) == contents(reference)


def test_a_run_that_was_stopped_goes_on_under_the_time_that_it_had_claimed(
    fresh: Any, helpers: Any
) -> None:
    from beam_jobs.engine.run import plan_run
    from beam_jobs.registry import load_job
    from beam_jobs.summary_tokens.token_options import prepared

    job = load_job("summary_tokens")
    options = job.resolve(fresh.settings, job.options(bundle="vista_tiny"))
    plan = plan_run(job, fresh.settings, options, None).plan
    first, again = (prepared(job.prepare(plan, None)).computed_at_micros for _ in range(2))
    assert first == again
    later = replace(build(fresh, helpers).manifest, options={"computed_at_micros": first + 10**15})
    other = replace(plan, run_id="another")
    assert (
        prepared(job.prepare(other, later)).computed_at_micros > first + 10**15
    )  # time never runs back


def test_a_bad_history_is_a_dead_letter_and_costs_no_other_user_anything(
    fresh: Any, token_shop: Any, tmp_path: Path, helpers: Any
) -> None:
    reference = untokened(token_shop, tmp_path / "reference", helpers)
    build(reference, helpers)
    folder = JobFolder(fresh.settings.home, "user_history")
    manifest = folder.require()
    part = manifest.tables["history_log"][0]
    path = Path(folder.root, part.path)
    batch = pa.ipc.open_file(pa.py_buffer(path.read_bytes())).get_batch(0)
    victim = next(
        row for row in range(batch.num_rows) if len(set(batch["event_timestamp"][row].as_py())) > 1
    )
    lists = batch["event_timestamp"]
    times = micros(lists.values).copy()
    start, stop = lists.offsets[victim].as_py(), lists.offsets[victim + 1].as_py()
    times[start:stop] = times[start:stop][::-1]
    values = pa.array(times).cast(lists.values.type)
    columns = [
        pa.LargeListArray.from_arrays(lists.offsets, values)
        if name == "event_timestamp"
        else batch[name]
        for name in batch.schema.names
    ]
    changed = pa.RecordBatch.from_arrays(columns, names=batch.schema.names)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, changed.schema) as writer:
        writer.write_batch(changed)
    # As if the job had written it so: a part with other bytes than its manifest says is refused before it is read.
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    parts = [replace(part, sha256=sha256), *manifest.tables["history_log"][1:]]
    folder.publish(replace(manifest, tables=manifest.tables | {"history_log": parts}))
    counts = build(fresh, helpers).manifest.counts
    user = changed["user_id"][victim].as_py()
    (letter,) = (
        JobFolder(fresh.settings.home, "summary_tokens").read("token_dead_letters").to_pylist()
    )
    assert letter["user_id"] == user
    assert letter["reason"] == "events are not in the order of time"
    assert counts["dead_letters"] == 1
    assert counts["users"] == counts["covered"] + 1
    expected = {row["user_id"]: row["tokens"] for row in newest(reference)}
    del expected[user]
    assert {row["user_id"]: row["tokens"] for row in newest(fresh)} == expected


def newest(road: Any) -> list[dict[str, Any]]:
    return JobFolder(road.settings.home, "summary_tokens").read("summary_tokens").to_pylist()


def test_one_bad_history_of_a_batch_is_found_and_the_rest_is_summarised(
    token_shop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from beam_jobs.summary_tokens import summarise
    from beam_jobs.summary_tokens.summarise import Progress, Result, Users, summarised

    bundle, (log, _) = live(token_shop), histories(token_shop)
    summariser = Summariser(bundle.model, bundle.encoder)
    whole = summariser.whole
    bad = int(log.lengths[2])

    def failing(found: Any, *given: Any) -> Any:
        if (found.lengths == bad).any():
            raise RuntimeError("numbers that no model should see")
        return whole(found, *given)

    monkeypatch.setattr(summariser, "whole", failing)
    rows = np.arange(5)
    read, ends = log.gather(rows, log.lengths[rows]), log.lengths[rows].astype(np.int64)
    codes = bundle.encoder.vocabularies["item_id"].indices_of(log.items)
    nothing = np.zeros(5, np.int64)
    users = Users(rows.tolist(), read, read.digests(log.item_hashes), nothing > 0)
    monkeypatch.setattr(summarise, "stored_result", lambda *given: Result(given[-3]))
    found = summarised(
        None, summariser, users, Progress(nothing, nothing, {}, {}), codes, rows.tolist(), ends, 0
    )
    reasons = {one.row: one.reason for one in found}
    assert all(bool(reasons[row]) == (log.lengths[row] == bad) for row in range(5))
    assert "numbers that no model should see" in reasons[2]


def test_a_huge_history_is_a_piece_of_its_own_and_none_holds_more_than_its_bounds() -> None:
    from beam_jobs.summary_tokens.summarise import (
        PIECE_BYTES,
        PIECE_EVENTS,
        PIECE_USERS,
        piece_ends,
    )

    rng = np.random.default_rng(0)
    lengths = np.r_[rng.integers(0, 2000, 9000), 5 * PIECE_EVENTS, rng.integers(0, 2000, 9000)]
    for size in (1, 1000, PIECE_BYTES // 7, 2 * PIECE_BYTES):
        ranges = piece_ends(lengths, size)
        assert [stop for _, stop in ranges][:-1] == [start for start, _ in ranges][1:]
        assert (ranges[0][0], ranges[-1][1]) == (0, len(lengths))
        for start, stop in ranges:
            assert stop - start == 1 or lengths[start:stop].sum() <= PIECE_EVENTS
            assert stop - start == 1 or (stop - start) * size <= PIECE_BYTES
            assert stop - start <= PIECE_USERS
    assert piece_ends(np.zeros(0, np.int64), 5) == [(0, 0)]


def test_a_late_event_makes_the_whole_history_be_read_again(fresh: Any, helpers: Any) -> None:
    """An event that came late stands before others: the stored state is no longer that of its first
    events.
    """
    from beam_jobs.engine.run import plan_run
    from beam_jobs.registry import load_job
    from beam_jobs.summary_tokens.earlier_tokens import Earlier

    build(fresh, helpers)
    job = load_job("summary_tokens")
    options = job.resolve(fresh.settings, job.options(bundle="vista_tiny"))
    planned = plan_run(job, fresh.settings, options, None)
    plan, units = job.prepare(planned.plan, planned.plan.folder.manifest()), planned.units
    log = HistoryLog(CONTRACT, plan.input_folder("user_history"), [plan.unit_path(units[0])])
    rows, ids = np.arange(len(log.users)), log.users.to_pylist()
    read, earlier = log.gather(rows, log.lengths), Earlier(plan, 0)
    known = earlier.newest_of(log.users)
    np.testing.assert_array_equal(known.num_events, log.lengths)
    digests = read.digests(log.item_hashes)
    np.testing.assert_array_equal(known.digests, digests[read.offsets[1:] - 1])
    assert set(earlier.streams(ids, known.num_events, read, rows.tolist())) == set(rows.tolist())
    # An event that came late, with the time of the last one: the stream cannot take it between what
    # it has seen.
    places = np.r_[np.arange(read.offsets[1]), np.arange(read.offsets[1] - 1, read.offsets[-1])]
    longer = Histories(
        np.r_[0, read.offsets[1:] + 1],
        read.item_keys[places],
        {n: c[places] for n, c in read.columns.items()},
    )
    assert 0 not in earlier.streams(ids, known.num_events, longer, rows.tolist())
    assert Earlier(plan, 1).newest_of(log.users).num_events.sum() == 0  # another part's users


@pytest.mark.parametrize("kind", ["int8", "fp32"])
def test_full_builds_a_version_anew_in_another_kind(kind: str, fresh: Any, helpers: Any) -> None:
    build(fresh, helpers)
    before = {row["user_id"]: row for row in newest(fresh)}
    outcome = build(fresh, helpers, kind=kind, full=True, computed_at="2011-12-21T00:00:00")
    assert outcome.manifest.counts["skipped"] == 0
    after = {row["user_id"]: row for row in newest(fresh)}
    assert set(after) == set(
        before
    )  # the version's earlier rows are gone, so each user stands there once
    for user, row in after.items():
        one, other = (
            from_bytes(stored["tokens"], user).tokens_SD for stored in (before[user], row)
        )
        assert one is not None
        assert other is not None
        np.testing.assert_allclose(one, other, atol=0.02 * np.abs(one).max())
        assert (len(row["tokens"]) < len(before[user]["tokens"])) == (kind == "int8")
    assert OnlineTokens(fresh.store, CONTRACT).read(live(fresh).tokens or "", list(after)) == [
        (row["tokens"], row["state"]) for row in after.values()
    ]


def test_two_versions_stand_side_by_side_and_the_old_one_is_removed_when_nobody_needs_it(
    fresh: Any, helpers: Any
) -> None:
    build(fresh, helpers)
    catalogue, old = Catalogue(fresh.settings.catalogue_url), live(fresh)
    first = contents(fresh)
    helpers.train_road(fresh, "vista_bidirectional_tiny")
    assert live(fresh).digest == old.digest  # the new bundle waits for its tokens
    build(fresh, helpers, bundle="vista_bidirectional_tiny", computed_at="2011-12-22T00:00:00")
    new = live(fresh)
    assert new.manifest["recipe"] == "vista_bidirectional_tiny"
    users = sorted({row["user_id"] for row in newest(fresh)})
    online = OnlineTokens(fresh.store, CONTRACT)
    assert online.read(old.tokens or "", users) == first[1]
    assert {
        from_bytes(tokens or b"", user).fingerprint
        for user, (tokens, _) in zip(users, online.read(new.tokens or "", users), strict=True)
    } == {new.tokens}
    for version in (old, new):
        rows = JobFolder(fresh.settings.home, "summary_tokens").read("token_rows").to_pylist()
        chosen = np.array(
            [row["token_row"] for row in rows if row["token_version"] == version.tokens]
        )
        assert (
            TokenLog(CONTRACT, fresh.settings.home, version.tokens or "")
            .gather(chosen, version.token_shape)[1]
            .all()
        )
    assert catalogue.retirable_tokens("online_retail", timedelta(days=7)) == []
    assert catalogue.retirable_tokens("online_retail", timedelta(0)) == [old.tokens]
    assert online.remove(old.tokens or "") == len(users)
    assert drop_version(CONTRACT, fresh.settings.home, old.tokens or "") == len(
        [row for row in rows if row["token_version"] == old.tokens]
    )
    catalogue.forget_tokens("online_retail", old.tokens or "")
    assert online.read(old.tokens or "", users) == [(None, None)] * len(users)
    assert all(tokens for tokens, _ in online.read(new.tokens or "", users))
    left = JobFolder(fresh.settings.home, "summary_tokens").read("token_rows").to_pylist()
    assert {row["token_version"] for row in left} == {new.tokens}
    with pytest.raises(TokenLogError, match="no part of the token log"):
        TokenLog(CONTRACT, fresh.settings.home, old.tokens or "").gather(
            chosen_of(rows, old), old.token_shape
        )


def chosen_of(rows: list[dict[str, Any]], bundle: Bundle) -> np.ndarray:
    return np.array([row["token_row"] for row in rows if row["token_version"] == bundle.tokens])


def test_a_bundle_goes_live_only_when_enough_users_have_tokens(
    fresh: Any, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from beam_jobs.summary_tokens import summarise

    whole = summarise.stored_result

    def some(plan: Any, summariser: Any, users: Any, at: int, row: int, *given: Any) -> Any:
        if users.ids[row] % 10 == 0:
            return summarise.Result(row, reason="unlucky")
        return whole(plan, summariser, users, at, row, *given)

    monkeypatch.setattr(summarise, "stored_result", some)
    outcome = build(fresh, helpers)
    assert "does not go live" in outcome.lines[-1]
    with pytest.raises(LookupError):
        Catalogue(fresh.settings.catalogue_url).live_bundle("online_retail")
    monkeypatch.undo()
    outcome = build(fresh, helpers, computed_at="2011-12-22T00:00:00")
    assert outcome.lines[-1].endswith("is live")


@pytest.mark.parametrize(
    "recipe", ["amortised_tokens_tiny", "onetrans_tokens_tiny", "vista_stage_2_tiny"]
)
def test_rankers_train_on_stored_tokens_and_their_bundles_accept_that_version_only(
    recipe: str, fresh: Any, helpers: Any
) -> None:
    from modeling import recipes
    from modeling.training import training_run
    from serving.api.messages import RankRequest
    from serving.command import open_ranker

    with pytest.raises(LookupError, match="no summary tokens of recipe 'vista_tiny'"):
        training_run.open_run(fresh.settings, recipes.load(recipe))
    build(fresh, helpers)
    made = live(fresh)
    helpers.train_road(fresh, recipe)
    bundle = live(fresh)
    assert bundle.manifest["recipe"] == recipe
    assert bundle.tokens == made.tokens
    assert not bundle.makes_tokens
    ranker = open_ranker(fresh.settings, replay=True)
    users = sorted({row["user_id"] for row in newest(fresh)})
    items = sorted(
        JobFolder(fresh.settings.home, "item_stats")
        .read("item_stats")["item_id"]
        .unique()
        .to_pylist()
    )[:40]
    with_tokens = ranked(ranker, RankRequest(users[4], items))
    assert with_tokens.tokens == made.tokens
    assert with_tokens.degraded == []
    OnlineTokens(fresh.store, CONTRACT).remove(made.tokens or "")
    without = ranked(ranker, RankRequest(users[4], items))
    assert without.degraded == ["no_tokens"]
    assert without.scores != with_tokens.scores


def test_a_version_keeps_its_snapshots_and_kind_unless_all_is_built_anew(
    fresh: Any, helpers: Any
) -> None:
    from beam_jobs.errors import OptionsError

    build(fresh, helpers, every_days=None)
    for other in ({"every_days": 7.0}, {"every_days": None, "kind": "int8"}):
        with pytest.raises(OptionsError, match="pass --full"):
            build(fresh, helpers, **other)
    build(fresh, helpers, every_days=30.0, full=True, computed_at="2011-12-21T00:00:00")
    rows = JobFolder(fresh.settings.home, "summary_tokens").read("token_rows").num_rows
    again = build(fresh, helpers, every_days=None, full=True, computed_at="2011-12-22T00:00:00")
    assert again.manifest.options["every_days"] == 30.0
    assert JobFolder(fresh.settings.home, "summary_tokens").read("token_rows").num_rows == rows


def test_an_emptied_or_another_online_store_is_filled_from_what_is_stored(
    fresh: Any, helpers: Any
) -> None:
    build(fresh, helpers)
    parts, values = contents(fresh)
    OnlineTokens(fresh.store, CONTRACT).remove(live(fresh).tokens or "")
    outcome = build(fresh, helpers, refill=True)
    assert outcome.manifest.counts["users_written"] == 0
    assert outcome.manifest.counts["online_stored"] == len(values)
    assert contents(fresh)[1] == values
    OnlineTokens(fresh.store, CONTRACT).remove(live(fresh).tokens or "")
    assert build(
        fresh, helpers, refill=True
    ).built  # asked for, although this very work was done before
    assert contents(fresh)[1] == values
    tables = ("token_log", "token_rows", "summary_tokens")
    now = contents(fresh)[0]
    assert all(now[name] == data for name, data in parts.items() if name.startswith(tables))


def test_a_bundle_that_reads_anothers_tokens_makes_none(fresh: Any, helpers: Any) -> None:
    from beam_jobs.errors import OptionsError

    build(fresh, helpers)
    helpers.train_road(fresh, "amortised_tokens_tiny")
    for bundle in (None, "amortised_tokens_tiny"):
        with pytest.raises(OptionsError, match="makes no summary tokens"):
            build(fresh, helpers, bundle=bundle)
    with pytest.raises(OptionsError, match="no bundle 'nothing'"):
        build(fresh, helpers, bundle="nothing")


def test_a_refresh_makes_the_tokens_that_the_live_bundle_reads(fresh: Any, helpers: Any) -> None:
    """Its own, or those of their maker, which does not go live for that."""
    from beam_jobs.command import tokens_to_refresh
    from beam_jobs.engine.options import TokenOptions
    from serving.live.live import BundleSource

    build(fresh, helpers)
    assert tokens_to_refresh(fresh.settings) == TokenOptions()
    maker = live(fresh)
    helpers.train_road(fresh, "amortised_tokens_tiny")
    assert live(fresh).manifest["recipe"] == "amortised_tokens_tiny"
    wanted = tokens_to_refresh(fresh.settings)
    assert wanted == TokenOptions(bundle=maker.digest, not_live=True)
    assert build(fresh, helpers, **vars(wanted)).manifest.options["version"] == maker.tokens
    assert live(fresh).manifest["recipe"] == "amortised_tokens_tiny"
    # A maker that is damaged keeps no server from ranking.
    (maker.path / "bundle.json").write_text("{")
    assert BundleSource(fresh.settings).token_maker(live(fresh)) is None
    assert BundleSource(fresh.settings).load().name.startswith("amortised_tokens_tiny")


def test_going_back_to_an_earlier_bundle_is_one_command(fresh: Any, helpers: Any) -> None:
    build(fresh, helpers)
    helpers.train_road(fresh, "vista_bidirectional_tiny")
    build(fresh, helpers, bundle="vista_bidirectional_tiny")
    assert live(fresh).manifest["recipe"] == "vista_bidirectional_tiny"
    outcome = build(fresh, helpers)
    assert not outcome.built
    assert outcome.lines[-1].endswith("is live")
    assert live(fresh).manifest["recipe"] == "vista_tiny"


def test_a_bundle_that_was_exported_not_live_stays_so_when_its_tokens_are_built(
    fresh: Any, helpers: Any
) -> None:
    from modeling import recipes
    from modeling.commands.evaluate import evaluate
    from modeling.commands.export import export
    from modeling.training import training_run

    build(fresh, helpers)
    assert live(fresh).manifest["recipe"] == "vista_tiny"
    catalogue = Catalogue(fresh.settings.catalogue_url)
    run = training_run.open_run(fresh.settings, recipes.load("vista_bidirectional_tiny"))
    training_run.train(run, run.encodings(), catalogue)
    evaluate(training_run.refuse_untrained(run), catalogue)
    export(training_run.refuse_untrained(run), catalogue, live=False)
    outcome = build(fresh, helpers, bundle="vista_bidirectional_tiny")
    assert live(fresh).manifest["recipe"] == "vista_tiny"
    assert "exported with --not_live" in outcome.lines[-1]
    digest = catalogue.bundle(fresh.settings.dataset, "vista_bidirectional_tiny").digest
    assert "exported with --not_live" in catalogue.held_back(fresh.settings.dataset, digest)
