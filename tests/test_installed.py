"""The package as somebody installs it: a wheel, an empty folder, a log of one's own, and no checkout."""

import csv
import os
import random
import subprocess
import sys
import zipfile
from datetime import datetime, timedelta
from pathlib import Path

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


def write_log(folder: Path) -> None:
    rng = random.Random(0)
    first = datetime(2026, 1, 1)
    folder.mkdir()
    with open(folder / "log.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["customer", "product", "time", "price"])
        for _ in range(6000):
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
