"""Small worlds to test in: a synthetic shop, a synthetic film club, the road walked over them once,
and services.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pandas as pd
import pytest

from feature_repo import datasets
from feature_repo.settings import CHECKOUT, Settings
from tests.promises import Promises

NUM_CUSTOMERS, NUM_PRODUCTS = 60, 220

# A home or a dataset of the person who runs the tests is none of theirs.
for name in [name for name in os.environ if name.startswith("MEMOIR_")]:
    if name != "MEMOIR_REQUIRE_SERVICES":
        del os.environ[name]


BEGAN = pytest.StashKey[float]()
PROMISES = Promises()


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--page`: where `make reliability` leaves its page."""
    parser.addoption("--page", type=Path, help="write what was promised and found to this file")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """The contents of a file are no name: two workers may pack them in two different seconds."""
    return argname if isinstance(val, bytes) else None


def pytest_sessionstart(session: pytest.Session) -> None:
    """For how long it took."""
    session.config.stash[BEGAN] = time.monotonic()


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The page of promises."""
    if (page := session.config.getoption("--page")) is not None:
        PROMISES.write(page, time.monotonic() - session.config.stash[BEGAN])


@pytest.fixture(scope="session")
def promises() -> Promises:
    """What is written down of this run."""
    return PROMISES


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Minutes of one test begin first, so that no process is left with them at the end."""
    items.sort(key=lambda item: "test_readme" not in item.nodeid)


# CI tries the same examples each time, so that a change is judged by itself; elsewhere the search
# goes on.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")


def shop_lines(seed: int = 0) -> pd.DataFrame:
    """Invoice lines of a small shop in the raw format of Online Retail: habits, cancellations, and
    dirt of every kind.
    """
    rng = np.random.default_rng(seed)
    codes = [f"{20000 + i}{'' if i % 3 else 'A'}" for i in range(NUM_PRODUCTS)]
    taste = {c: rng.permutation(NUM_PRODUCTS)[:12] for c in range(NUM_CUSTOMERS)}
    days = (datetime(2011, 12, 9) - datetime(2010, 12, 1)).days
    visits = sorted(
        (
            datetime(2010, 12, 1, 9)
            + timedelta(days=int(rng.integers(days)), minutes=int(rng.integers(480))),
            customer,
        )
        for customer in range(NUM_CUSTOMERS)
        for _ in range(rng.integers(3, 14))
    )
    # On the first day somebody buys everything, so that evaluation finds its hundred negatives.
    rows: list[tuple[Any, ...]] = [
        (
            "536000",
            code,
            f"PRODUCT {code}",
            1.0,
            datetime(2010, 12, 1, 8),
            1.0 + i / 100,
            12000.0,
            "France",
        )
        for i, code in enumerate(codes)
    ]
    for number, (at, customer) in enumerate(visits):
        invoice = f"{540000 + number}"
        user = 13000.0 + customer
        country = ("France", "United Kingdom")[customer % 2]
        items = np.concatenate([rng.choice(taste[customer], 4), rng.integers(0, NUM_PRODUCTS, 2)])
        for item in items:
            line = (
                codes[item],
                f"PRODUCT {codes[item]}",
                float(rng.integers(1, 9)),
                at,
                round(1 + item / 50, 2),
            )
            rows.append((invoice, *line, user, country))
            if rng.random() < 0.05:
                rows.append((f"C{invoice}", line[0], line[1], -line[2], at, line[4], user, country))
        if rng.random() < 0.3:
            dirt = [
                (invoice, "POST", "POSTAGE", 1.0, at, 5.0, user, country),
                (invoice, codes[0], None, 1.0, at, 2.0, float("nan"), country),
                (invoice, codes[0], "FREE", 1.0, at, 0.0, user, country),
                (f"A{invoice}", codes[0], "?", 1.0, at, 2.0, user, country),
            ]
            rows.append(dirt[rng.integers(4)])
    names = [
        "InvoiceNo",
        "StockCode",
        "Description",
        "Quantity",
        "InvoiceDate",
        "UnitPrice",
        "CustomerID",
        "Country",
    ]
    frame = pd.DataFrame(rows, columns=names)
    return frame.astype({"InvoiceDate": "datetime64[us]"})


def write_film_club(folder: Path, seed: int = 0) -> None:
    """A small folder in the format of MovieLens 1M, one unreadable rating included."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    users = [f"{u}::{'FM'[u % 2]}::{(1, 18, 25)[u % 3]}::{u % 21}::00000" for u in range(1, 41)]
    movies = [
        f"{m}::Film {m} ({1960 + m % 40})::{('Drama', 'Comedy|Drama', 'Action')[m % 3]}"
        for m in range(1, 81)
    ]
    spans = {
        "train": (974000000, 975700000),
        "validation": (975800000, 978000000),
        "test": (978100000, 990000000),
    }
    ratings = []
    for user in range(1, 41):
        low, high = list(spans.values())[user % 3]
        times = np.sort(rng.integers(low, high, 24))
        for movie, at in zip(rng.permutation(80)[:24] + 1, times, strict=True):
            ratings.append(
                f"{user}::{movie}::{int(np.clip(3 + movie % 3 - user % 2 + rng.integers(-1, 2), 1, 5))}::{at}"
            )
    ratings.insert(7, "1::oops::3::974000001")
    for name, lines in (("users.dat", users), ("movies.dat", movies), ("ratings.dat", ratings)):
        (folder / name).write_text("\n".join(lines) + "\n", encoding="latin-1")


@dataclass
class Road:
    """A dataset whose tables are built, registered and materialised under one home."""

    settings: Settings
    data: Path

    @property
    def store(self) -> Any:
        from feature_repo.store.store import open_store

        return open_store(self.settings)


def settings_in(home: Path, dataset: str, data: Path, profile: str = "local") -> Settings:
    """Settings of a dataset under its own home."""
    folder = home / dataset
    folder.mkdir(parents=True, exist_ok=True)
    return Settings(
        dataset, str(data), str(folder), profile, f"sqlite:///{folder}/catalogue.db", False
    )


def run_jobs(settings: Settings, *names: str, **options: Any) -> dict[str, Any]:
    """Run Beam jobs in this process on the local runner; returns their outcomes."""
    from beam_jobs.engine.run import run
    from beam_jobs.registry import load_job
    from feature_repo.datasets import load_contract
    from feature_repo.store.received import collect

    outcomes = {}
    for name in names:
        if name == "events":
            assert collect(settings, load_contract(settings.dataset)) == ""
        job = load_job(name)
        known = {f.name for f in fields(job.options)}
        chosen = job.resolve(
            settings, job.options(**{k: v for k, v in options.items() if k in known})
        )
        outcomes[name] = run(
            job,
            settings,
            chosen,
            ["--runner=FnApiRunner"],
            as_of=options.get("as_of"),
            max_bad_fraction=options.get("max_bad_fraction"),
            force=options.get("force", False),
        )
    return outcomes


TABLE_JOBS = ("events", "user_history", "item_stats", "training_examples")


def apply_in_process(settings: Settings) -> Any:
    """What `feast apply` does, without its eight seconds."""
    from feast import Entity, FeatureService, FeatureView, FileSource

    from feature_repo.store.store import REPO, open_store

    before = {name: os.environ.get(name) for name in ("MEMOIR_DATASET", "MEMOIR_HOME")}
    os.environ |= {
        "MEMOIR_DATASET": settings.dataset,
        "MEMOIR_HOME": str(Path(settings.home).parent),
    }
    try:
        made = runpy.run_path(str(REPO / "feature_definitions.py"))
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
    store = open_store(settings)
    store.apply(
        [
            value
            for value in made.values()
            if isinstance(value, (Entity, FeatureService, FeatureView, FileSource))
        ]
    )
    return store


def walk(settings: Settings, data: Path) -> Road:
    """Build, register and materialise."""
    run_jobs(settings, *TABLE_JOBS, num_partitions=3)
    apply_in_process(settings)
    run_jobs(settings, "materialize")
    return Road(settings, data)


@pytest.fixture(scope="session")
def shop_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the synthetic shop's raw file."""
    folder = tmp_path_factory.mktemp("shop")
    shop_lines().to_parquet(folder / "online_retail.parquet", index=False)
    return folder


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory, shop_data: Path) -> Road:
    """The road over the synthetic shop, up to the online store."""
    return walk(settings_in(tmp_path_factory.mktemp("home"), "online_retail", shop_data), shop_data)


@pytest.fixture(scope="session")
def film_club(tmp_path_factory: pytest.TempPathFactory) -> Road:
    """The road over the synthetic film club."""
    data = tmp_path_factory.mktemp("films")
    write_film_club(data)
    return walk(settings_in(tmp_path_factory.mktemp("home"), "movielens_1m", data), data)


@pytest.fixture(scope="session")
def trained_shop(shop: Road) -> Road:
    """The synthetic shop with the tiny recipe trained, evaluated and live."""
    train_road(shop)
    return shop


@pytest.fixture(scope="session")
def token_shop(shop: Road, tmp_path_factory: pytest.TempPathFactory) -> Road:
    """A synthetic shop of its own whose customers have summary tokens, as of now and of every
    thirty days before.
    """
    return token_road(shop, tmp_path_factory.mktemp("tokens"))


def token_road(road: Road, folder: Path, recipe: str = "vista_tiny", **options: Any) -> Road:
    """A copy of a road, with the recipe trained and its summary tokens built."""
    copy = copied(road, folder)
    train_road(copy, recipe)
    run_jobs(copy.settings, "summary_tokens", bundle=recipe, every_days=30.0, **options)
    return copy


def copied(road: Road, folder: Path) -> Road:
    """The same tables in another home."""
    copy = Road(settings_in(folder, road.settings.dataset, road.data), road.data)
    shutil.copytree(
        road.settings.home,
        copy.settings.home,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("*.db", "*.pb", "*.yaml"),
    )
    apply_in_process(copy.settings)
    run_jobs(copy.settings, "materialize")
    return copy


def server_environment(road: Road, **more: str) -> dict[str, str]:
    """Of a server process over a road, with time enough for a busy machine."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("MEMOIR_")}
    return {
        **own,
        "MEMOIR_HOME": road.settings.root,
        "MEMOIR_DATASET": road.settings.dataset,
        "MEMOIR_DATA": str(road.data),
        "MEMOIR_SERVE_DEADLINE_MS": "10000",
        "MEMOIR_SERVE_STORE_MS": "5000",
        **more,
    }


def train_road(road: Road, recipe: str = "amortised_dlrm_tiny") -> None:
    """Train, evaluate and export a recipe, as the commands do."""
    from feature_repo.home.catalogue import Catalogue
    from modeling import recipes
    from modeling.commands.evaluate import evaluate
    from modeling.commands.export import export
    from modeling.training import training_run

    catalogue = Catalogue(road.settings.catalogue_url)
    run = training_run.open_run(road.settings, recipes.load(recipe))
    training_run.train(run, run.encodings(), catalogue)
    evaluate(training_run.refuse_untrained(run), catalogue)
    export(training_run.refuse_untrained(run), catalogue, live=True)


def missing(what: str) -> None:
    if os.environ.get("MEMOIR_REQUIRE_SERVICES") == "1":
        pytest.fail(f"{what} is not installed, and MEMOIR_REQUIRE_SERVICES=1 makes that a failure")
    pytest.skip(f"{what} is not installed")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[bytes], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert process.poll() is None, f"{process.args} ended before it listened"
        time.sleep(0.05)
    raise AssertionError(f"{process.args} did not listen within {seconds} s")


@pytest.fixture(scope="session")
def redis_address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis of our own on a free loopback port."""
    server = Redis(tmp_path_factory.mktemp("redis"), "--appendonly", "no")
    server.start()
    yield f"127.0.0.1:{server.port}"
    server.stop()


class Redis:
    """A Redis of our own, which may be killed.

    Args:
        folder: its own.
        options: further ones of `redis-server`.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        if not shutil.which("redis-server"):
            missing("redis-server")
        self.port = free_port()
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self._command = [*command, "--dir", str(folder), *options]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        wait_for_port(self.port, self._process)

    def kill(self) -> None:
        """End it as a failing machine would, and start it again from what it wrote."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self.start()

    def kill_with(self, dump: Path, place: Path) -> None:
        """End it as a failing machine would, and start it again from a copy of some time before."""
        self.stop()
        shutil.copy(dump, place)
        self.start()

    def stop(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


class Postgres:
    """A PostgreSQL of our own, which may be stopped and killed.

    Args:
        folder: its own; given to the user `postgres` where we are root.
    """

    def __init__(self, initdb: Path, folder: Path) -> None:
        self.port, self._folder = free_port(), folder
        self.initdb = initdb
        self.as_user: list[str] = []
        if os.getuid() == 0:
            shutil.chown(folder, "postgres")
            self.as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        self._binary = initdb.with_name("postgres")
        subprocess.run(
            [
                *self.as_user,
                str(initdb),
                "-D",
                str(folder / "data"),
                "-A",
                "trust",
                "-U",
                "memoir",
            ],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd=folder,
        )
        self.start()

    @property
    def url(self) -> str:
        """Of an empty database, for SQLAlchemy."""
        return f"postgresql+psycopg://memoir@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        """Start it."""
        command = [*self.as_user, str(self._binary), "-D", str(self._folder / "data")]
        command += ["-p", str(self.port), "-h", "127.0.0.1", "-k", str(self._folder)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=self._folder
        )
        wait_for_port(self.port, self.process)
        time.sleep(0.3)

    def send(self, number: signal.Signals) -> None:
        """A signal to it and to all its processes."""
        parent = self.process.pid
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        for one in [parent, *map(int, children)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(one, number)
        if number == signal.SIGKILL:
            self.process.wait(timeout=10)

    def stop(self) -> None:
        """Stop it for good, whoever is still connected; a plain termination would wait for them."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(timeout=20)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL of our own on a free loopback port."""
    import tempfile

    found = (
        sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
        if Path("/usr/lib/postgresql").exists()
        else []
    )
    binary = Path(shutil.which("initdb") or (found[-1] if found else ""))
    if not binary.name:
        missing("postgresql")
    folder = Path(tempfile.mkdtemp(prefix="memoir-pg-"))
    made = Postgres(binary, folder)
    yield made
    made.stop()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres_url(postgres: Postgres) -> str:
    """Its address."""
    return postgres.url


@pytest.fixture(scope="session")
def helpers() -> Any:
    """The functions above, for tests that build worlds of their own."""

    class Helpers:
        pass

    for function in (
        settings_in,
        run_jobs,
        apply_in_process,
        walk,
        shop_lines,
        write_film_club,
        train_road,
        token_road,
        copied,
        free_port,
        wait_for_port,
    ):
        setattr(Helpers, function.__name__, staticmethod(function))
    Helpers.replace = staticmethod(replace)
    Helpers.checkout = CHECKOUT
    Helpers.table_jobs = TABLE_JOBS
    return Helpers


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setattr(datasets, "__path__", [*datasets.__path__, str(folder)])
    yield folder
    for module in folder.glob("*.py"):
        sys.modules.pop(f"feature_repo.datasets.{module.stem}", None)
    datasets.load.cache_clear()
    datasets.load_contract.cache_clear()
