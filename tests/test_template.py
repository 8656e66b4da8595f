"""The declaration that people copy walks the whole road as it stands: from rows to an answer over HTTP,
with a label that is defined only after another.
"""

from __future__ import annotations

import csv
import gzip
import math
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from beam_jobs.erase import ErasureError, erase
from feature_repo import datasets
from feature_repo.home.catalogue import Catalogue
from feature_repo.scaffold.preview import preview
from modeling import recipes
from modeling.evaluation.evaluate import AS_RANKED, MODEL, beside_trees, read
from modeling.training import training_run
from modeling.training_set.simple_baselines import TREES
from serving.command import open_ranker
from serving.routes.app import create_app

NAME = "template_shop"
TEMPLATE = Path(datasets.__file__).with_name("_template.py")


def write_rows(folder: Path) -> None:
    """Sessions of ten impressions each, clicks on some and purchases of some of those; items with tags, a
    vector and a date.
    """
    rng = np.random.default_rng(0)
    tastes, vectors = rng.normal(size=(30, 16)), rng.normal(size=(60, 16)).astype(np.float32)
    first = datetime(2025, 1, 1)
    items = {
        "item_id": [f"mug {n}" for n in range(60)],
        "tags": [["red", "blue", "gift"][: 1 + n % 3] for n in range(60)],
        "cover": pa.array([vector.tolist() for vector in vectors], pa.list_(pa.float32())),
        "published": [first + timedelta(days=n) if n % 5 else None for n in range(60)],
    }
    pq.write_table(pa.table(items), folder / "items.parquet")
    (folder / "log").mkdir()
    with gzip.open(folder / "log/a.csv.gz", "wt", newline="") as file:
        out = csv.writer(file)
        names = "event_id session customer item_id at device clicked bought price"
        out.writerow(names.split())
        for session in range(700):
            user = int(rng.integers(30))
            at = first + timedelta(minutes=int(rng.integers(75 * 1440)))
            for place, item in enumerate(rng.permutation(60)[:10]):
                like = float(tastes[user] @ vectors[item]) / 3
                clicked = rng.random() < 1 / (1 + math.exp(0.5 - like))
                bought = clicked and rng.random() < 1 / (1 + math.exp(-like))
                when = (at + timedelta(seconds=place)).strftime("%Y-%m-%dT%H:%M:%S")
                price = f"{item / 4:.2f}" if rng.random() < 0.8 else ""
                about = [f"e{session}-{place}", f"s{session}", f"user {user}", f"mug {item}", when]
                out.writerow([*about, "phone", int(clicked), int(bought), price])


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory, helpers: Any) -> Iterator[Any]:
    """The template under a name of its own, on the road as far as a live bundle."""
    folder = tmp_path_factory.mktemp("template")
    (folder / "modules").mkdir()
    (folder / "raw").mkdir()
    text = TEMPLATE.read_text().replace('name="_template"', f'name="{NAME}"')
    (folder / "modules" / f"{NAME}.py").write_text(text)
    write_rows(folder / "raw")
    patch = pytest.MonkeyPatch()
    patch.setattr(datasets, "__path__", [*datasets.__path__, str(folder / "modules")])
    settings = helpers.settings_in(folder / "home", NAME, folder / "raw")
    road = helpers.walk(settings, folder / "raw")
    helpers.train_road(road)
    yield road
    patch.undo()
    sys.modules.pop(f"feature_repo.datasets.{NAME}", None)
    datasets.load.cache_clear()
    datasets.load_contract.cache_clear()


def test_check_has_nothing_to_mend(walked: Any) -> None:
    assert preview(datasets.load(NAME), walked.settings.data).problems() == []


def test_undefined_labels_are_left_out_of_every_metric_and_baseline(walked: Any) -> None:
    run = training_run.open_run(walked.settings, recipes.load("amortised_dlrm_tiny"))
    evaluation = read(run.folder)
    assert evaluation["primary"] == "label_purchase"  # of clicked items alone
    spec = datasets.load_contract(NAME).spec
    for task in spec.tasks:
        rows = evaluation["tasks"][task.name]
        assert rows[MODEL]["ndcg@10"]["value"] > 0
        assert rows["random"]["ndcg@10"]["value"] < 0.9
        assert AS_RANKED in rows
    assert evaluation["metrics"][TREES]["gauc"]["value"] > 0.4
    assert "trees on the same numbers" in beside_trees(evaluation)
    assert evaluation["shift"] == 0  # the log says what was shown
    report = (run.folder / "report.html").read_text()
    assert "trees on the same numbers" in report
    assert "Calibration: mean probability" in report
    catalogue = Catalogue(walked.settings.catalogue_url)
    assert catalogue.live_bundle(NAME).recipe == "amortised_dlrm_tiny"


def test_a_request_is_answered_over_http(walked: Any) -> None:
    client = TestClient(create_app(open_ranker(walked.settings)), base_url="http://localhost")
    body = {
        "user_id": "user 3",
        "candidates": ["mug 1", "mug 2", "mug 3"],
        "context": {"device": "phone", "request_timestamp": f"{datetime(2025, 3, 20, tzinfo=UTC)}"},
        "task_scores": True,
    }
    answer = client.post("/v1/rank", json=body)
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert sorted(told["item_ids"]) == sorted(body["candidates"])  # type: ignore[type-var]
    assert set(told["task_scores"]) == {"label_click", "label_purchase"}
    assert told["degraded"] == []


@pytest.mark.slow
def test_no_byte_of_an_erased_customer_is_left_in_any_file(
    walked: Any, helpers: Any, tmp_path: Path
) -> None:
    """Ids are text here, so that every file is searched by bytes: by the proof, and by this test."""
    road = helpers.token_road(walked, tmp_path)
    settings, needle = road.settings, "user 17"
    (Path(settings.home) / ".left.draft").write_text("nobody")
    before = files_with(settings.home, needle)
    assert {"events", "user_history", "summary_tokens"} <= before
    run = lambda name: helpers.run_jobs(settings, name, num_partitions=3)  # noqa: E731
    proof, _ = erase(settings, [needle], [], run)
    assert files_with(settings.home, needle) == set()
    assert not any(one.theirs for one in proof.searched)
    others = files_with(settings.home, "user 18")
    assert {"events", "user_history", "summary_tokens"} <= others
    # What somebody puts there later is found.
    (Path(settings.home) / "note.txt").write_text(f"about {needle}")
    with pytest.raises(ErasureError, match=r"note\.txt \(1\)"):
        erase(settings, [needle], [], run)


def files_with(home: str, text: str) -> set[str]:
    """First parts of the paths of all files that hold a text, Parquet files unpacked."""
    found = set()
    for path in Path(home).rglob("*"):
        if not path.is_file():
            continue
        data = path.read_bytes()
        if path.suffix == ".parquet":
            rows = pq.read_table(path)
            data = "\n".join(str(rows[name].to_pylist()) for name in rows.column_names).encode()
        if re.search(rb"(?<!\w)" + text.encode() + rb"(?!\w)", data):
            found.add(path.relative_to(home).parts[0])
    return found
