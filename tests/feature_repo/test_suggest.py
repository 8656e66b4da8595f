"""What `new` takes a stranger's columns for: ids, time and actions right without help."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import tempfile
from pathlib import Path

import numpy as np
import pytest

from feature_repo import cli, datasets
from feature_repo.__main__ import app
from feature_repo.contract.declarations import problems
from feature_repo.contract.schema import DatasetSpec
from feature_repo.scaffold import suggest
from feature_repo.scaffold.suggest_text import module_text

# A folder with complete-journey/ and ml-1m/, which are not shipped.
REAL_DATASETS = Path(os.environ.get("REAL_DATASETS", "none"))


def spec_of(name: str, data: Path, events: str, **tables: str) -> DatasetSpec:
    """The declaration that `new` writes, as it runs."""
    log = suggest.log_of(str(data), events, **tables)
    with tempfile.TemporaryDirectory() as folder:
        module = Path(folder, f"{name}.py")
        module.write_text(module_text(name, log, suggest.periods(log.events, str(data))))
        spec: DatasetSpec = runpy.run_path(str(module))["SPEC"]
    assert problems(spec) == []
    return spec


def film_lines(folder: Path) -> None:
    """Files of MovieLens-100k's shape: tabs and bars, no headers, titles in Latin-1."""
    rng = np.random.default_rng(0)
    rows = [
        f"{rng.integers(1, 40)}\t{rng.integers(1, 81)}\t{rng.integers(1, 6)}\t{874_724_710 + n * 977}"
        for n in range(2000)
    ]
    (folder / "u.data").write_text("\n".join(rows) + "\n")
    users = [
        f"{n}|{20 + n % 40}|{'MF'[n % 2]}|{('writer', 'other')[n % 2]}|{10000 + n}"
        for n in range(1, 41)
    ]
    (folder / "u.user").write_text("\n".join(users) + "\n")
    films = [
        f"{n}|Amélie {n} (1995)|01-Jan-1995||http://x/{n}|{'|'.join('01'[(n + k) % 2] for k in range(19))}"
        for n in range(1, 82)
    ]
    (folder / "u.item").write_bytes(("\n".join(films) + "\n").encode("latin-1"))


def test_movielens_100ks_files_are_ratings(tmp_path: Path) -> None:
    film_lines(tmp_path)
    spec = spec_of("films", tmp_path, "u.data", items="u.item", users="u.user")
    roles = {"user_id": "event_1", "item_id": "event_2", "event_timestamp": "event_4"}
    assert roles.items() <= spec.events.columns.items()
    assert (spec.events.action, spec.events.at_least) == ("event_3", 4)
    assert (spec.events.delimiter, spec.events.time_unit) == ("\t", "seconds")
    assert spec.requests.examples == "ratings"
    assert spec.items is not None
    assert (spec.items.delimiter, spec.items.columns["item_id"]) == ("|", "item_1")
    assert spec.items.encodings[-1] in ("cp1252", "latin-1")
    assert spec.users is not None
    assert spec.users.columns["user_id"] == "user_1"


@pytest.mark.parametrize(
    ("folder", "files", "ids", "action"),
    [
        (
            "complete-journey",
            ("events.parquet", "items.parquet", "users.parquet"),
            {"event_timestamp": "timestamp", "request_id": "basket_id"},
            "action",
        ),
        (
            "online-retail",
            ("online_retail.parquet", None, None),
            {
                "user_id": "CustomerID",
                "item_id": "StockCode",
                "event_timestamp": "InvoiceDate",
                "request_id": "InvoiceNo",
            },
            "",
        ),
        (
            "ml-1m",
            ("ratings_reconstructed.parquet", "movies.dat", "users.dat"),
            {"item_id": "movie_id", "event_timestamp": "timestamp"},
            "rating",
        ),
    ],
)
def test_the_real_datasets_columns_are_found(
    folder: str, files: tuple[str, str | None, str | None], ids: dict[str, str], action: str
) -> None:
    data = datasets.SHIPPED if folder == "online-retail" else REAL_DATASETS / folder
    if not data.is_dir():
        pytest.skip(f"set REAL_DATASETS to the folder that holds {folder}")
    events, items, users = files
    tables = {k: v for k, v in (("items", items), ("users", users)) if v}
    spec = spec_of("found", data, events, **tables)
    named = {"user_id": "user_id", "item_id": "item_id"} | spec.events.columns
    assert ids.items() <= named.items()
    assert spec.events.action == action


def test_actions_in_a_column_become_tasks_of_impressions(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lines = ["ts,visitorid,event,itemid,session"]
    for session in range(300):
        for step in range(4):
            kind = ("view", "view", "addtocart", "transaction")[int(rng.integers(4))]
            at = 1_433_221_332_000 + session * 60_000 + step * 1000
            lines.append(f"{at},{session % 40},{kind},{rng.integers(50)},s{session}")
    (tmp_path / "events.csv").write_text("\n".join(lines) + "\n")
    spec = spec_of("views", tmp_path, "events.csv")
    assert spec.events.time_unit == "milliseconds"
    assert spec.actions == ("transaction", "addtocart", "view")
    assert spec.shown == "view"
    assert [task.action for task in spec.tasks] == ["addtocart", "transaction"]
    assert spec.requests.examples == "impressions"


def test_new_refuses_what_it_cannot_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = tmp_path / "modules"
    modules.mkdir()
    monkeypatch.setattr(datasets, "__path__", [*datasets.__path__, str(modules)])
    (tmp_path / "log.csv").write_text("a,b\nx,y\nz,w\n")
    for name, file, code in (
        ("Shop", "log.csv", 2),
        ("nothing_there", "none.csv", 1),
        ("shop_of_mine", "log.csv", 1),  # a draft to fill in
        ("shop_of_mine", "log.csv", 2),  # which is not written over
    ):
        words = ["new", name, "--events", f"{tmp_path}/{file}"]
        with contextlib.redirect_stderr(io.StringIO()):
            assert cli.run(lambda words=words: app(words)) == code
    assert [path.name for path in modules.iterdir()] == ["shop_of_mine.py"]
    assert '"user_id": "?"' in (modules / "shop_of_mine.py").read_text()
