"""The package as somebody installs it: a wheel, an empty folder, a log of one's own, and no checkout."""

import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import zipfile
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from feature_repo.cli import extra_of
from feature_repo.settings import CHECKOUT

ROAD = (
    ("features", "apply"),
    ("jobs", "refresh", "--runner=FnApiRunner"),
    ("jobs", "training_examples", "--runner=FnApiRunner"),
    ("models", "train", "trees"),
    ("models", "evaluate", "trees"),
    ("models", "export", "trees"),
)
MEMOIR = "from feature_repo.script import main; import sys; sys.exit(main())"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an installer unpacks, which nobody may write to."""
    folder = tmp_path_factory.mktemp("wheel")
    command = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([sys.executable, *command, str(CHECKOUT)], check=True)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    zipfile.ZipFile(wheel).extractall(site)
    return site


def run(site: Path, work: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`memoir …` in a folder of its own."""
    return python(site, work, MEMOIR, *words, **variables)


def python(
    site: Path, work: Path, program: str, *words: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    """A program with the wheel, which comes before this checkout."""
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def write_log(folder: Path, events: int = 6000) -> None:
    rng = random.Random(0)
    first = datetime(2026, 1, 1)
    folder.mkdir()
    with open(folder / "log.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["customer", "product", "time", "price"])
        for _ in range(events):
            user = rng.randrange(60)
            item = (3 * user + int(rng.expovariate(0.2))) % 120
            at = first + timedelta(minutes=rng.randrange(90 * 1440))
            out.writerow([f"user {user}", f"mug {item}", at.isoformat(), f"{item / 4 + 1:.2f}"])


@pytest.mark.slow
def test_from_a_csv_to_a_ranked_list(site: Path, tmp_path: Path) -> None:
    write_log(tmp_path / "raw")
    before = sorted(site.rglob("*.py"))
    made = run(site, tmp_path, "features", "new", "my_shop", "--events", "raw/log.csv")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "my_shop.py").is_file()
    assert f"export MEMOIR_DATASET={tmp_path / 'my_shop.py'}" in made.stdout
    shop = {"MEMOIR_DATASET": "./my_shop.py", "MEMOIR_DATA": "raw"}
    for words in ROAD:
        done = run(site, tmp_path, *words, **shop)
        assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])
    answered = run(site, tmp_path, "serve", "demo", **shop)
    assert answered.returncode == 0, answered.stderr[-2000:]
    assert "candidates ranked for user" in answered.stdout
    assert "python -m serving --replay" in answered.stdout
    assert "degraded by nothing" in answered.stdout
    # What was made lies where one works, and nothing among the packages.
    assert (tmp_path / ".memoir" / "my_shop" / "catalogue.db").is_file()
    assert sorted(site.rglob("*.py")) == before
    assert not (site / ".memoir").exists()


# Every job in one process, on workers of a portable runner
ELSEWHERE = """
import sys
from beam_jobs.__main__ import app as jobs
from feature_repo import cli
from feature_repo.__main__ import app as features
from modeling.__main__ import app as models

FLAGS = ["--runner=PortableRunner", "--job_endpoint=embed", "--environment_type=EXTERNAL", f"--environment_config=localhost:{sys.argv[1]}"]

def run(app, *words):
    code = cli.run(lambda: app(list(words)))
    print("==", words[0], code, flush=True)
    if code:
        sys.exit(code)

for job in ("events", "user_history", "item_stats", "training_examples"):
    run(jobs, job, *FLAGS)
run(features, "apply")
run(jobs, "materialize", *FLAGS)
run(models, "train", "vista_tiny", "--set", "training.epochs=1")
run(models, "evaluate", "vista_tiny", "--set", "training.epochs=1")
run(models, "export", "vista_tiny", "--set", "training.epochs=1")
run(jobs, "summary_tokens", "--bundle=vista_tiny", *FLAGS)
"""


@pytest.mark.slow
def test_every_job_runs_on_a_worker_in_another_place(
    site: Path, tmp_path: Path, redis_address: str, helpers: Any
) -> None:
    """Which has the wheel and an empty environment: tables and bundle come from the home, the declaration with the run, and
    secrets from where the launcher's variables say that they are kept.
    """
    for name in ("launcher", "worker", "bucket"):
        (tmp_path / name).mkdir()
    other = tmp_path / "site"
    shutil.copytree(site, other)
    write_log(tmp_path / "bucket" / "raw", 2000)
    made = run(
        site,
        tmp_path / "launcher",
        "features",
        "new",
        "my_shop",
        "--events",
        "../bucket/raw/log.csv",
    )
    assert made.returncode == 0, made.stderr
    bucket = (tmp_path / "bucket").as_uri()
    secrets = {"REDIS": redis_address, "REGISTRY_URL": f"sqlite:///{tmp_path}/registry.db"}
    for name, value in secrets.items():
        (tmp_path / name).write_text(value)
    port = helpers.free_port()
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    pool = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "apache_beam.runners.worker.worker_pool_main",
            f"--service_port={port}",
        ],
        cwd=tmp_path / "worker",
        env={"PATH": path, "PYTHONPATH": str(other)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        helpers.wait_for_port(port, pool)
        done = python(
            site,
            tmp_path / "launcher",
            ELSEWHERE,
            str(port),
            MEMOIR_DATASET="./my_shop.py",
            MEMOIR_DATA=f"{bucket}/raw",
            MEMOIR_HOME=bucket,
            MEMOIR_PROFILE="production",
            **{f"MEMOIR_{name}": (tmp_path / name).as_uri() for name in secrets},
        )
    finally:
        os.killpg(pool.pid, signal.SIGKILL)
        pool.wait()
    assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-3000:])
    assert "60 of 60 users covered" in done.stdout
    assert "is live" in done.stdout
    home = tmp_path / "bucket" / "my_shop"
    assert (home / "summary_tokens" / "manifest.json").is_file()
    assert list((home / "bundles").rglob("bundle.json"))
    assert not list((tmp_path / "worker").iterdir())


def test_the_wheel_has_what_it_runs_with_and_no_more(site: Path) -> None:
    names = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    for room in ("feature_repo", "beam_jobs", "modeling", "serving"):
        assert f"{room}/py.typed" in names
    assert "feature_repo/.feastignore" in names
    assert "serving/routes/page.html" in names
    assert not [name for name in names if "benchmarks/" in name or name.endswith(".png")]


def test_the_command_loads_the_room_that_it_calls(site: Path, tmp_path: Path) -> None:
    unknown = run(site, tmp_path, "kitchen")
    assert unknown.returncode == 2
    assert "rooms are features (feature_repo), jobs (beam_jobs)" in unknown.stderr
    program = (
        "import sys; sys.argv = ['memoir', 'features', 'new', '--help']\n"
        "from feature_repo.script import main\nmain()\n"
        "loaded = {name.split('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded & {'torch', 'apache_beam', 'feast', 'serving', 'modeling', 'beam_jobs'}))"
    )
    done = python(site, tmp_path, program)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_a_missing_extra_is_named(site: Path, tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['apache_beam'] = None; sys.argv = ['memoir', 'jobs', 'events']\n"
        "from feature_repo.script import main\nsys.exit(main())"
    )
    done = python(site, tmp_path, program)
    assert done.returncode == 1
    assert "pip install 'memoir-rec[beam]'" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("module", "extra"),
    [("apache_beam", "beam"), ("feast", "features"), ("redis", "production"), ("granian", "serve")],
)
def test_extras_by_module(module: str, extra: str) -> None:
    assert extra_of(module) == extra
