"""The catalogue on SQLite and on PostgreSQL: runs, bundles, what is live."""

from __future__ import annotations

from pathlib import Path

import pytest

from feature_repo.home.catalogue import Catalogue, NoLiveBundleError


@pytest.fixture(params=["sqlite", "postgresql"])
def catalogue(request: pytest.FixtureRequest, tmp_path: Path) -> Catalogue:
    if request.param == "sqlite":
        return Catalogue(f"sqlite:///{tmp_path}/deep/catalogue.db")
    return Catalogue(request.getfixturevalue("postgres_url"))


def test_a_stage_is_recorded_when_it_ends_well_and_not_otherwise(catalogue: Catalogue) -> None:
    with catalogue.stage("shop", "train", "abc") as stage:
        stage.details = {"steps": 3}
    with pytest.raises(ZeroDivisionError), catalogue.stage("shop", "train", "def"):
        raise ZeroDivisionError
    run = catalogue.last_run("shop", "train")
    assert run is not None
    assert (run.inputs, run.details) == ("abc", {"steps": 3})
    assert run.duration_s >= 0
    assert catalogue.is_current("shop", "train", "abc")
    assert not catalogue.is_current("shop", "train", "def")
    assert not catalogue.is_current("films", "train", "abc")


def test_one_bundle_of_a_dataset_is_live(catalogue: Catalogue) -> None:
    with pytest.raises(NoLiveBundleError, match="export"):
        catalogue.live_bundle("shop")
    for digest in ("a" * 64, "b" * 64):
        catalogue.add_bundle(
            digest=digest,
            dataset="shop",
            recipe="tiny",
            fingerprint="f" * 16,
            path=f"/bundles/{digest[0]}",
            metrics={"ndcg": 0.5},
        )
        catalogue.set_live("shop", digest)
    assert catalogue.live_bundle("shop").path == "/bundles/b"
    catalogue.set_live("shop", "a" * 64)
    assert catalogue.live_bundle("shop").path == "/bundles/a"
    assert {bundle.digest[0] for bundle in catalogue.bundles("shop")} == {"a", "b"}


def test_a_bundle_that_is_not_recorded_cannot_be_live(catalogue: Catalogue) -> None:
    with pytest.raises(LookupError, match="export it first"):
        catalogue.set_live("shop", "c" * 64)
