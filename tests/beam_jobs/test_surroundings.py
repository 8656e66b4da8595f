"""What workers elsewhere are told, and what they are not."""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from beam_jobs.engine.bundles import bundle_folder, keep_bundle
from beam_jobs.engine.pipeline import pipeline_of
from beam_jobs.engine.run import plan_run
from beam_jobs.engine.surroundings import Surroundings
from beam_jobs.errors import OtherPlaceError
from beam_jobs.registry import load_job
from feature_repo import datasets
from feature_repo.errors import SettingsError
from feature_repo.home.catalogue import Catalogue
from feature_repo.home.secrets import secret
from feature_repo.raw.sources import located
from feature_repo.settings import Settings


def test_no_secret_travels(monkeypatch: pytest.MonkeyPatch, shop: Any) -> None:
    monkeypatch.setenv("MEMOIR_REDIS", "redis://:hush@store:6379")
    monkeypatch.setenv("MEMOIR_REGISTRY_URL", "file:///run/secrets/registry")
    monkeypatch.setenv("MEMOIR_REDIS_TYPE", "redis_cluster")
    here = Surroundings.here("online_retail")
    assert here.variables == {
        "MEMOIR_REGISTRY_URL": "file:///run/secrets/registry",
        "MEMOIR_REDIS_TYPE": "redis_cluster",
    }
    # Nor in what a runner is handed, the catalogue's address least of all
    settings = replace(shop.settings, catalogue_url="postgresql+psycopg://me:hush@db/catalogue")
    job = load_job("item_stats")
    planned = plan_run(job, settings, job.options(), None)
    made = pipeline_of(job, planned.plan, planned.units, ["--runner=FnApiRunner"])
    proto = made.to_runner_api(use_fake_coders=True)
    assert b"hush" not in proto.SerializeToString()
    steps = job.steps(replace(planned.plan, catalogue_url=""))
    assert b"hush" not in pickle.dumps(steps.plan)


def test_a_worker_takes_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "their_shop.py"
    text = Path(datasets.__file__).with_name("online_retail.py").read_text()
    file.write_text(text.replace('name="online_retail"', 'name="their_shop"'))
    monkeypatch.setenv("MEMOIR_DATASET", str(file))
    monkeypatch.setenv("MEMOIR_REDIS_TYPE", "redis_cluster")
    here = Surroundings.here("their_shop")
    file.unlink()
    # On a worker, which has a variable of its own
    monkeypatch.delenv("MEMOIR_DATASET")
    monkeypatch.setenv("MEMOIR_REDIS_TYPE", "redis_sentinel")
    monkeypatch.setattr(datasets, "__path__", list(datasets.__path__))
    here.take_place()
    assert os.environ["MEMOIR_REDIS_TYPE"] == "redis_sentinel"
    assert datasets.load("their_shop").spec.name == "their_shop"
    monkeypatch.delenv("MEMOIR_DATASET")
    datasets.load.cache_clear()


def test_a_secret_is_read_where_it_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("postgresql://me:hush@db/catalogue\n")
    monkeypatch.setenv("MEMOIR_CATALOGUE", (tmp_path / "kept").as_uri())
    assert secret("MEMOIR_CATALOGUE") == "postgresql://me:hush@db/catalogue"
    # A catalogue looks there itself.
    (tmp_path / "kept").write_text(f"sqlite:///{tmp_path}/elsewhere.db\n")
    assert Catalogue(Settings.from_env().catalogue_url).bundles("shop") == []
    assert (tmp_path / "elsewhere.db").is_file()
    monkeypatch.setenv("MEMOIR_CATALOGUE", "file:///no/such/file")
    with pytest.raises(SettingsError, match="MEMOIR_CATALOGUE says that it is kept in"):
        secret("MEMOIR_CATALOGUE")


def test_shipped_files_are_found_wherever_the_package_is() -> None:
    unit = datasets.load("online_retail").raw_units(None)[0]
    assert unit.file == "shipped:online_retail.parquet"
    _, path = located(unit.file)
    assert Path(path).is_file()


def test_a_bundle_travels_by_the_home(tmp_path: Path) -> None:
    folder = tmp_path / "launcher" / "vista@abc"
    (folder / "weights").mkdir(parents=True)
    (folder / "bundle.json").write_text("{}")
    (folder / "weights" / "model.safetensors").write_bytes(b"weights")
    home = (tmp_path / "bucket" / "shop").as_uri()
    keep_bundle(home, folder, "bundles/vista@abc")
    assert bundle_folder(home, folder, "bundles/vista@abc") == folder
    elsewhere = tmp_path / "worker" / "vista@abc"
    copy = bundle_folder(home, elsewhere, "bundles/vista@abc")
    assert copy.name == "vista@abc"
    assert (copy / "weights" / "model.safetensors").read_bytes() == b"weights"
    with pytest.raises(OtherPlaceError, match="neither at"):
        bundle_folder(home, elsewhere, "bundles/other")
    # A home on disk holds it already.
    keep_bundle(str(tmp_path / "disk"), folder, "bundles/vista@abc")
    assert not (tmp_path / "disk").exists()


def test_a_file_of_the_launcher_is_no_store_of_a_worker_elsewhere(shop: Any) -> None:
    job = load_job("materialize")
    plan = plan_run(job, shop.settings, job.options(), None).plan
    assert plan.open_store().project == "memoir"
    moved = replace(plan, online_file="/srv/launcher/feature_repo/data/online_store.db")
    with pytest.raises(OtherPlaceError, match="MEMOIR_PROFILE=production"):
        moved.open_store()


def test_threads_of_a_worker_take_them_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A path of the launcher's, which is nowhere here."""
    text = Path(datasets.__file__).with_name("online_retail.py").read_text()
    here = Surroundings("their_shop", {"MEMOIR_DATASET": "/nowhere/their_shop.py"}, text)
    monkeypatch.setattr(datasets, "__path__", list(datasets.__path__))
    for _ in range(20):
        monkeypatch.delenv("MEMOIR_DATASET", raising=False)
        with ThreadPoolExecutor(8) as pool:
            taken = [pool.submit(here.take_place) for _ in range(8)]
            found = {pool.submit(datasets.names).result() is not None for _ in taken}
        assert found == {True}
        assert all(one.exception() is None for one in taken)
        # Not by the patch, which would put it back.
        assert Path(os.environ.pop("MEMOIR_DATASET")).is_file()
