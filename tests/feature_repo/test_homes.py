"""Homes: a copy leaves the original alone, a store says what it holds, Feast's commands answer
alike from everywhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from feature_repo.home.tables import JobFolder
from feature_repo.store.store import (
    ONLINE,
    StoreError,
    held_epoch,
    local_file,
    missing_tables,
    open_store,
    tables_elsewhere,
)

ROOT = Path(__file__).resolve().parents[2]
VIEWS = ["user_profile", "user_history", "item_stats", "store_epoch"]


def run(home: Path, data: Path, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MEMOIR_")}
    environment |= {"MEMOIR_HOME": str(home), "MEMOIR_DATA": str(data), "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
        check=False,
    )


@pytest.mark.slow
def test_a_copied_home_is_made_its_own_and_the_original_keeps_its_tables(
    shop: Any, tmp_path: Path, helpers: Any
) -> None:
    original = helpers.copied(shop, tmp_path / "a")
    done = run(
        tmp_path / "a", shop.data, "feature_repo", "apply"
    )  # the command notes where its tables are
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) < 10
    run_id = JobFolder(original.settings.home, "materialize").require().run_id
    assert held_epoch(original.settings, "materialize") == run_id
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    copy = helpers.settings_in(tmp_path / "b", "online_retail", shop.data)
    assert tables_elsewhere(copy) == [str(local_file(original.settings, ONLINE))]
    with pytest.raises(StoreError, match="of a home that lies elsewhere"):
        open_store(copy)
    done = run(tmp_path / "b", shop.data, "feature_repo", "apply")
    assert done.returncode == 0, done.stderr
    assert "it is made anew here" in done.stdout
    for settings in (original.settings, copy):
        assert missing_tables(settings, VIEWS) == []
        assert tables_elsewhere(settings) == []
        assert held_epoch(settings, "materialize") == run_id  # what was written is in both
    users = [{"user_id": 13000}]
    for settings in (original.settings, copy):
        found = open_store(settings).get_online_features(["user_profile:country"], users).to_dict()
        assert found["country"] == ["France"]


def test_an_emptied_or_deleted_store_is_not_up_to_date(
    shop: Any, tmp_path: Path, helpers: Any
) -> None:
    from beam_jobs.engine.inputs import output_is_there

    road = helpers.copied(shop, tmp_path)
    assert output_is_there("materialize", road.settings)
    store = road.store
    store.provider.online_store.teardown(store.config, store.list_feature_views(), [])
    assert not output_is_there("materialize", road.settings)
    helpers.apply_in_process(road.settings)
    assert not output_is_there(
        "materialize", road.settings
    )  # tables are there, what was written is not
    assert helpers.run_jobs(road.settings, "materialize")["materialize"].built
    assert output_is_there("materialize", road.settings)


@pytest.mark.slow
def test_feasts_commands_answer_alike_from_everywhere_and_find_a_persons_own_view(
    shop: Any, tmp_path: Path
) -> None:
    copy = tmp_path / "checkout"
    for room in ("feature_repo", "beam_jobs", "modeling", "serving"):
        shutil.copytree(
            ROOT / room,
            copy / room,
            ignore=shutil.ignore_patterns("*.db", "*.pb", "__pycache__", "*.parquet"),
        )
    (copy / "feature_repo" / "my_views.py").write_text(
        "from datetime import timedelta\n"
        "from feast import Entity, FeatureView, Field, FileSource, ValueType\n"
        "from feast.types import Int64\n"
        "pet = Entity(name='pet', join_keys=['pet_id'], value_type=ValueType.INT64)\n"
        "source = FileSource(name='pets', path='/none.parquet', timestamp_field='event_timestamp')\n"
        "pets = FeatureView(name='pets', entities=[pet], ttl=timedelta(0), schema=[Field(name='age', dtype=Int64)], source=source)\n"
    )
    feast = str(Path(sys.executable).parent / "feast")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MEMOIR_")} | {
        "PYTHONPATH": str(copy),
        "PYTHONHASHSEED": "0",
    }

    def ask(cwd: Path, *words: str) -> str:
        done = subprocess.run(
            [feast, *words], capture_output=True, text=True, cwd=cwd, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    ask(copy, "-c", "feature_repo", "apply")
    seen = [
        ask(copy, "-c", "feature_repo", "feature-views", "list"),
        ask(copy / "feature_repo", "feature-views", "list"),
    ]
    assert seen[0] == seen[1]
    for name in ("pets", *VIEWS):
        assert name in seen[0]
