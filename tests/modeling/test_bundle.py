"""Bundles: what was exported is what is loaded; anything else is refused with the reason."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from feature_repo import datasets
from feature_repo.home.catalogue import Catalogue
from modeling import recipes
from modeling.bundle import bundle
from modeling.bundle.bundle import BundleError
from modeling.commands.evaluate import evaluate
from modeling.commands.export import export, refuse_longer_than_kept
from modeling.training import training_run
from modeling.training.trainer import predict
from modeling.training_set.dataset import Warehouse
from tests.periods import joined_period

CONTRACT = datasets.load_contract("online_retail")


@pytest.fixture
def exported(trained_shop: Any, tmp_path: Path) -> Path:
    live = Catalogue(trained_shop.settings.catalogue_url).live_bundle("online_retail")
    return Path(shutil.copytree(trained_shop.settings.path(live.path), tmp_path / "bundle"))


def test_a_loaded_bundle_scores_as_the_trained_model(trained_shop: Any, exported: Path) -> None:
    run = training_run.refuse_untrained(
        training_run.open_run(trained_shop.settings, recipes.load("amortised_dlrm_tiny"))
    )
    model, encoder = training_run.load_trained(run)
    loaded = bundle.load(exported, CONTRACT)
    split = joined_period(
        Warehouse(trained_shop.settings), trained_shop.store, run.recipe.service, "validation"
    )
    expected = predict(model, encoder, encoder.featurise(split.requests))
    assert np.array_equal(
        predict(loaded.model, loaded.encoder, loaded.encoder.featurise(split.requests)), expected
    )


def test_the_same_run_exports_the_same_digest(
    trained_shop: Any, exported: Path, tmp_path: Path
) -> None:
    loaded = bundle.load(exported, CONTRACT)
    m = loaded.manifest
    _, digest = bundle.export(
        tmp_path / "again",
        model=loaded.model,
        encoder=loaded.encoder,
        recipe=recipes.load(m["recipe"]),
        metrics=m["metrics"],
        trained_on=m["trained_on"],
        data_as_of=m["data_as_of"],
        columns=m["columns"],
    )
    assert digest == loaded.digest
    assert loaded.learned["events.unit_price"].values.quantiles


def test_the_bundle_says_what_it_is(exported: Path) -> None:
    manifest = bundle.load(exported, CONTRACT).manifest
    assert manifest["fingerprint"] == CONTRACT.fingerprint
    assert manifest["service"] == "ranking_v1"
    assert set(manifest["files"]) == set(bundle.FILES)
    assert {"ndcg@10", "gauc", "auc", "calibration_error"} <= set(manifest["metrics"])


def rewrite(exported: Path, **changes: Any) -> None:
    file = exported / "bundle.json"
    file.write_text(
        json.dumps({**json.loads(file.read_text()), **changes}, indent=1, sort_keys=True)
    )


@pytest.mark.parametrize("name", bundle.FILES)
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "link"])
def test_a_damaged_file_is_refused(exported: Path, name: str, damage: str) -> None:
    file = exported / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "truncate":
        file.write_bytes(data[:-1])
    elif damage == "remove":
        file.unlink()
    else:
        file.rename(exported.parent / "elsewhere")
        file.symlink_to(exported.parent / "elsewhere")
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        bundle.load(exported, CONTRACT)


def test_a_manifest_changed_after_export_is_refused_by_its_digest(exported: Path) -> None:
    digest = bundle.load(exported, CONTRACT).digest
    assert bundle.load(exported, CONTRACT, digest).digest == digest
    rewrite(exported, metrics={})
    with pytest.raises(BundleError, match="changed after export"):
        bundle.load(exported, CONTRACT, digest)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layout": 99}, "layout 99"),
        ({"fingerprint": "0" * 16}, "says that it is 0000"),
        ({"dataset": "movielens_1m"}, "of dataset 'movielens_1m'"),
        ({"config": {"width": 32, "num_heads": 2}}, "do not fit"),
        ({"config": {"depth": 3}}, "does not know"),
        ({"model": "gpt"}, "no model 'gpt'"),
        ({"files": {"../../etc/passwd": "0"}}, "a bundle has"),
        ({"files": {}}, "a bundle has"),
        ({"transforms": 0}, "train and export again"),
        ({"dense_features": ["count_total"]}, "train and export again"),
    ],
)
def test_another_layout_contract_or_model_is_refused(
    exported: Path, changes: dict[str, Any], reason: str
) -> None:
    rewrite(exported, **changes)
    with pytest.raises(ValueError, match=reason):
        bundle.load(exported, CONTRACT)


def test_another_account_can_read_a_bundle_where_the_umask_allows_it(exported: Path) -> None:
    """The library that writes weights keeps them from everybody else."""
    mask = os.umask(0)
    os.umask(mask)
    assert {file.stat().st_mode & 0o777 for file in exported.iterdir()} == {0o666 & ~mask}


def test_weights_that_are_no_numbers_are_refused(exported: Path) -> None:
    weights = load_file(exported / "weights.safetensors")
    name = min(name for name, tensor in weights.items() if tensor.is_floating_point())
    weights[name] = torch.full_like(weights[name], float("nan"))
    save_file(weights, exported / "weights.safetensors")
    files = json.loads((exported / "bundle.json").read_text())["files"]
    rewrite(
        exported,
        files={**files, "weights.safetensors": bundle.sha256_of(exported / "weights.safetensors")},
    )
    with pytest.raises(BundleError, match="no finite numbers"):
        bundle.load(exported, CONTRACT)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle"):
        bundle.load(tmp_path, CONTRACT)


def test_stages_that_are_up_to_date_do_nothing(
    trained_shop: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    catalogue = Catalogue(trained_shop.settings.catalogue_url)
    run = training_run.open_run(trained_shop.settings, recipes.load("amortised_dlrm_tiny"))
    before = {
        stage: catalogue.last_run("online_retail", f"{stage} amortised_dlrm_tiny").id
        for stage in ("train", "evaluate", "export")
    }  # type: ignore[union-attr]
    training_run.train(run, run.encodings(), catalogue)
    evaluate(training_run.refuse_untrained(run), catalogue)
    export(training_run.refuse_untrained(run), catalogue, live=True)
    after = {
        stage: catalogue.last_run("online_retail", f"{stage} amortised_dlrm_tiny").id
        for stage in before
    }  # type: ignore[union-attr]
    assert after == before


def test_evaluation_needs_a_run_on_these_tables(trained_shop: Any, tmp_path: Path) -> None:
    run = training_run.open_run(trained_shop.settings, recipes.load("amortised_dlrm_tiny"))
    with pytest.raises(FileNotFoundError, match="is not trained"):
        training_run.refuse_untrained(replace(run, folder=tmp_path))


def test_the_report_is_one_page_with_its_pictures_inside(trained_shop: Any) -> None:
    folder = training_run.open_run(
        trained_shop.settings, recipes.load("amortised_dlrm_tiny")
    ).folder
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 5
    for told in (
        "Recipe amortised_dlrm_tiny",
        "parameters",
        "of at most 2 epochs",
        "events known before",
        "UTC",
    ):
        assert told in page
    importance = json.loads((folder / "evaluation.json").read_text())["figures"]["importance"]
    assert {"history", "item", "matches of item and history", "country"} <= {
        row["name"] for row in importance
    }
    assert "http://" not in page
    assert "https://" not in page
    for text in (
        "own frequency",
        "popularity, best window",
        "same network, empty history",
        "gauc",
        "calibration error",
    ):
        assert text in page
    for name in ("loss", "calibration", "ndcg_by_history_length", "scores"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_the_model_beats_its_baselines_on_the_synthetic_shop(trained_shop: Any) -> None:
    """Customers there buy their habits again; a model that misses this has lost its history on the
    way.
    """
    folder = training_run.open_run(
        trained_shop.settings, recipes.load("amortised_dlrm_tiny")
    ).folder
    evaluation = json.loads((folder / "evaluation.json").read_text())
    ndcg = {name: row["ndcg@10"]["value"] for name, row in evaluation["metrics"].items()}
    assert ndcg["model"] > ndcg["same network, empty history"] + 0.1
    assert ndcg["model"] > ndcg["popularity, best window"] + 0.1


def test_two_trainings_of_one_run_at_once_are_refused(trained_shop: Any) -> None:
    from feature_repo.home.tables import locked
    from modeling.errors import RunError

    run = training_run.open_run(trained_shop.settings, recipes.load("amortised_dlrm_tiny"))
    with locked(run.folder), pytest.raises(RunError, match="another process trains"):
        training_run.train(run, run.encodings(), Catalogue(trained_shop.settings.catalogue_url))


def test_a_ranker_that_reads_more_events_than_are_kept_online_is_not_exported(
    trained_shop: Any,
) -> None:
    from modeling.errors import DataError

    long = replace(recipes.load("amortised_dlrm_tiny"), history_length=513)
    run = replace(
        training_run.open_run(trained_shop.settings, recipes.load("amortised_dlrm_tiny")),
        recipe=long,
    )
    with pytest.raises(
        DataError,
        match=r"reads 513 events of a history, online are kept 512.*num_history_online=513",
    ):
        refuse_longer_than_kept(run)
