"""Feast over our tables: apply as it is, materialize against our writers, both profiles, guards."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from feature_repo import datasets
from feature_repo.__main__ import changes_of
from feature_repo.errors import SettingsError
from feature_repo.history.history import newest_rows
from feature_repo.home.tables import JobFolder

ROOT = Path(__file__).resolve().parents[2]
FEAST = Path(sys.executable).parent / "feast"


def online_values(store: Any, settings: Any) -> dict[str, dict[str, list[Any]]]:
    """Every value of every online view, for every key that the offline store has and one that it
    has not.
    """
    contract, found = datasets.load_contract(settings.dataset), {}
    for table in contract.views:
        if table.name == "token_rows" or JobFolder(settings.home, table.job).manifest() is None:
            continue
        rows = (
            JobFolder(settings.home, table.job).read(table.name, list(table.join_keys)).to_pylist()
        )
        keys = sorted({tuple(row.values()) for row in rows})
        keys.append((type(keys[0][0])(99999999), *keys[0][1:]))
        asked = [dict(zip(table.join_keys, key, strict=True)) for key in keys]
        refs = [f"{table.name}:{c.name}" for c in table.columns]
        found[table.name] = store.get_online_features(features=refs, entity_rows=asked).to_dict()
    return found


@pytest.mark.parametrize("name", ["shop", "token_shop"])
def test_feast_materialize_agrees_with_our_writer(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    road = request.getfixturevalue(name)
    ours = online_values(road.store, road.settings)
    assert ("summary_tokens" in ours) == (name == "token_shop")
    other = replace(road.settings)
    store = road.store
    store.config.online_store.path = str(tmp_path / "feasts.db")
    for view in store.list_feature_views():
        store.provider.online_store.update(store.config, [], [view], [], [], False)
    store.materialize(datetime(2000, 1, 1, tzinfo=UTC), datetime.now(UTC) + timedelta(days=1))
    theirs = online_values(store, other)
    assert (tmp_path / "feasts.db").exists()
    assert theirs == ours
    assert any(value is not None for value in ours["user_history"]["history"])


def test_newest_row_of_each_key_goes_online(shop: Any) -> None:
    """An independent look: the value online is the offline row with the greatest timestamp."""
    contract = datasets.load_contract("online_retail")
    online = online_values(shop.store, shop.settings)
    for name in ("item_stats", "user_stats", "user_profile"):
        table = contract.table(name)
        rows = JobFolder(shop.settings.home, table.job).read(name).to_pylist()
        newest: dict[Any, dict[str, Any]] = {}
        for row in rows:
            key = row[table.entity.join_key]
            if key not in newest or row["event_timestamp"] > newest[key]["event_timestamp"]:
                newest[key] = row
        ids = online[name][table.entity.join_key]
        for column in table.columns:
            assert online[name][column.name] == [newest.get(i, {}).get(column.name) for i in ids]


def run_feast(
    *arguments: str, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(FEAST), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.slow
def test_feast_apply_works_on_the_folder_as_it_is(tmp_path: Path) -> None:
    """On a copy of a fresh checkout: no environment, nothing built, nothing to start."""
    copy = tmp_path / "checkout"
    ignore = shutil.ignore_patterns("*.db", "*.pb", "__pycache__")
    for room in ("feature_repo",):
        shutil.copytree(ROOT / room, copy / room, ignore=ignore)
    plain = {k: v for k, v in os.environ.items() if not k.startswith("MEMOIR_")} | {
        "PYTHONPATH": str(copy)
    }
    done = subprocess.run(
        [str(FEAST), "-c", "feature_repo", "apply"],
        capture_output=True,
        text=True,
        cwd=copy,
        env=plain,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in (
        "entity user",
        "entity item",
        *(f"feature view {t.name}" for t in datasets.load_contract("online_retail").views),
    ):
        assert f"Created {name}" in done.stdout
    assert "feature service ranking_v1" in done.stdout
    assert (copy / "feature_repo" / "data" / "registry.pb").exists()


@pytest.mark.slow
def test_definitions_of_another_dataset_are_refused_by_this_registry(shop: Any) -> None:
    from feature_repo.store.store import yaml_path

    done = run_feast(
        "-c",
        "feature_repo",
        "-f",
        str(yaml_path(shop.settings)),
        "apply",
        MEMOIR_DATASET="movielens_1m",
    )
    assert done.returncode != 0
    assert "is for dataset 'online_retail'" in done.stdout + done.stderr


def test_no_on_demand_views_are_registered(shop: Any, film_club: Any) -> None:
    """Feast executes registry text for them; we keep none (SECURITY.md)."""
    for road in (shop, film_club):
        assert road.store.list_on_demand_feature_views() == []


def test_production_profile_serves_the_same_values(
    shop: Any, redis_address: str, postgres_url: str, monkeypatch: pytest.MonkeyPatch, helpers: Any
) -> None:
    """Redis and a SQL registry on PostgreSQL, the same definitions, our writer, read back with
    Feast's SDK.
    """
    monkeypatch.setenv("MEMOIR_REGISTRY_URL", postgres_url)
    monkeypatch.setenv("MEMOIR_REDIS", redis_address)
    monkeypatch.setenv("MEMOIR_DATASET", shop.settings.dataset)
    production = replace(shop.settings, profile="production")
    local = online_values(shop.store, shop.settings)
    store = helpers.apply_in_process(production)
    assert type(store.registry).__name__ == "SqlRegistry"
    assert str(store.config.registry.path) == postgres_url
    helpers.run_jobs(production, "materialize")
    assert online_values(store, production) == local
    rebuild_with_other_values(production, helpers)
    changed = online_values(store, production)
    assert set(changed["user_profile"]["country"]) == {"Atlantis", None}
    assert changed["user_history"] == local["user_history"]


def rebuild_with_other_values(settings: Any, helpers: Any) -> None:
    """Materialise countries of another spelling at the very same timestamps, as a rebuild after a
    fix does.
    """
    import pyarrow as pa

    from beam_jobs.engine.partition import to_ipc
    from beam_jobs.engine.run import plan_run
    from beam_jobs.engine.steps import WriteView
    from beam_jobs.registry import load_job

    rows = JobFolder(settings.home, "events").read("user_profile")
    rows = rows.set_column(
        rows.schema.get_field_index("country"),
        rows.schema.field("country"),
        pa.array(["Atlantis"] * rows.num_rows),
    )
    job = load_job("materialize")
    writer = WriteView(plan_run(job, settings, job.options(), None).plan)
    writer.setup()
    assert list(writer.process(("user_profile", to_ipc(rows)))) == [("user_profile", rows.num_rows)]


def test_materialize_incremental_sends_what_is_newest_however_old(
    shop: Any, tmp_path: Path, helpers: Any
) -> None:
    """A log of the past lies before the year with which Feast begins; and what is rebuilt with old times
    comes online as well.
    """
    road = helpers.copied(shop, tmp_path)
    expected = online_values(road.store, road.settings)
    with sqlite3.connect(Path(road.settings.home, "online_store.db")) as connection:
        tables = connection.execute(
            "SELECT name FROM sqlite_master WHERE type = 'table'"
        ).fetchall()
        for (table,) in tables:
            connection.execute(f'DELETE FROM "{table}"')
    connection.close()
    for _ in range(2):
        road.store.materialize_incremental(datetime.now(UTC))
        found = online_values(road.store, road.settings)
        for view, values in expected.items():
            assert found[view] == values, view


@pytest.mark.slow
def test_feast_ui_has_all_that_it_imports() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import feast.ui_server, feast.registry_server"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_production_profile_names_the_variables_that_it_lacks(
    shop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from feature_repo.store.store import yaml_path

    production = replace(shop.settings, profile="production")
    for name in ("MEMOIR_REDIS", "MEMOIR_REGISTRY_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingsError, match="needs MEMOIR_REDIS and MEMOIR_REGISTRY_URL"):
        yaml_path(production)
    monkeypatch.setenv("MEMOIR_REDIS", "localhost:6379")
    with pytest.raises(SettingsError, match="needs MEMOIR_REGISTRY_URL;"):
        yaml_path(production)


@pytest.mark.parametrize(
    "url", ["nonsense", "postgresql+psycopg://memoir:pass@word:x/registry", ":"]
)
def test_a_url_that_is_none_is_no_database_that_is_away(
    shop: Any, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    from feature_repo.store.store import check_profile

    monkeypatch.setenv("MEMOIR_REDIS", "localhost:6379")
    monkeypatch.setenv("MEMOIR_REGISTRY_URL", url)
    with pytest.raises(SettingsError, match="MEMOIR_REGISTRY_URL is no URL") as refused:
        check_profile(replace(shop.settings, profile="production"))
    assert "pass" not in str(refused.value).replace("password", "")


def test_an_apply_says_what_it_did_for_either_registry() -> None:
    plan = (
        "Applying changes\n\x1b[32mCreated entity user\nCreated feature view a\nDeleted entity x\n"
    )
    assert changes_of(plan) == "2 created, 1 deleted"
    sql = "Deploying infrastructure for a\nDeploying infrastructure for b\nRemoving infrastructure for c\n"
    assert changes_of(sql) == "2 views deployed, 1 views removed"
    assert changes_of("No changes to registry\n") == "the registry holds it already"


def test_a_retrieval_reads_only_the_parts_in_which_its_users_may_be(shop: Any) -> None:
    """Of tables that our jobs cut by user; and finds the same as from all of them."""
    rows = JobFolder(shop.settings.home, "user_history").read("user_stats")
    newest = newest_rows(rows, "user_id").slice(0, 40)
    few, names = newest.slice(0, 1), ["user_stats:history_end", "user_stats:history_digest"]
    jobs = {}
    for name, part in (("few", few), ("many", newest)):
        asked = part.select(["user_id", "event_timestamp"])
        jobs[name] = shop.store.get_historical_features(asked, names)
        found = jobs[name].to_arrow()
        assert found["history_end"].equals(part["history_end"])
        assert found["history_digest"].equals(part["history_digest"])
    read = {name: job._made.sql.count(".parquet") for name, job in jobs.items()}
    assert read == {"few": 1, "many": 3}
