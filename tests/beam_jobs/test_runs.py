"""Runs: same bytes every time, wherever they are killed; nothing visible before the manifest;
nothing lost.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from beam_jobs.engine.options import RUNNERS, Common
from feature_repo import datasets
from feature_repo.contract.counts import Counts
from feature_repo.contract.schema import Source
from feature_repo.home.tables import (
    JobFolder,
    JobRunningError,
    Manifest,
    Part,
    StaleTableError,
    TableNotBuiltError,
    parquet_bytes,
)

ROOT = Path(__file__).resolve().parents[2]


def snapshot(home: str, job: str) -> tuple[str, dict[str, bytes]]:
    """Manifest and every byte of the published run."""
    folder = JobFolder(home, job)
    manifest = folder.require()
    return manifest.to_json(), {
        part.path: Path(folder.root, part.path).read_bytes()
        for parts in manifest.tables.values()
        for part in parts
    }


def test_kept_and_dead_rows_add_up_to_the_rows_read(shop: Any, shop_data: Path) -> None:
    counts = JobFolder(shop.settings.home, "events").require().counts
    assert (
        counts["rows_read"] == pq.ParquetFile(shop_data / "online_retail.parquet").metadata.num_rows
    )
    assert counts["rows_read"] == counts["rows_events"] + counts["rows_dead"]
    assert counts["rows_dead"] == sum(counts.dead.values()) == counts["rows_dead_letters"]


def test_dead_letters_say_where_and_why(shop: Any, shop_data: Path) -> None:
    raw = pd.read_parquet(shop_data / "online_retail.parquet")
    letters = JobFolder(shop.settings.home, "events").read("dead_letters").to_pylist()
    assert letters
    for letter in letters:
        assert letter["source_file"] == "online_retail.parquet"
        assert raw.iloc[letter["source_row"]]["InvoiceNo"] in letter["raw"]
        row = raw.iloc[letter["source_row"]]
        if pd.isna(row["CustomerID"]):
            expected = "no customer"
        elif row["StockCode"] == "POST":
            expected = "product"
        else:
            expected = "positive" if row["UnitPrice"] <= 0 else "unreadable"
        assert expected in letter["reason"]


@pytest.mark.parametrize("job", ["events", "user_history", "item_stats", "training_examples"])
def test_a_rerun_elsewhere_gives_the_same_bytes(
    job: str, shop: Any, tmp_path: Path, helpers: Any
) -> None:
    again = helpers.settings_in(tmp_path, "online_retail", shop.data)
    helpers.run_jobs(
        again, *helpers.table_jobs[: helpers.table_jobs.index(job) + 1], num_partitions=3
    )
    assert snapshot(again.home, job) == snapshot(shop.settings.home, job)


def test_a_job_that_is_up_to_date_does_nothing(shop: Any, helpers: Any) -> None:
    outcome = helpers.run_jobs(shop.settings, "user_history", num_partitions=3)["user_history"]
    assert not outcome.built


def test_other_options_or_inputs_are_another_run(shop: Any, tmp_path: Path, helpers: Any) -> None:
    from beam_jobs.engine.run import plan_run
    from beam_jobs.registry import load_job

    job = load_job("training_examples")
    ids = {
        plan_run(job, shop.settings, job.options(num_partitions=3, seed=seed), as_of).plan.run_id
        for seed in (1, 2)
        for as_of in (None, "2011-11-01")
    }
    assert len(ids) == 4


def command(job: str) -> list[str]:
    return [sys.executable, "-m", "beam_jobs", job, "--runner=FnApiRunner", "--num_partitions=6"]


def environment(home: Path, data: Path) -> dict[str, str]:
    return {
        **os.environ,
        "MEMOIR_HOME": str(home),
        "MEMOIR_DATA": str(data),
        "MEMOIR_DATASET": "online_retail",
    }


def parts_since(folder: Path, started: float) -> int:
    """Parts and notes written since a moment; folders that vanish while they are counted count
    nothing.
    """
    count = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                count += (
                    name.startswith(("part-", "dead", "user", "history"))
                    and Path(where, name).stat().st_mtime >= started
                )
            except FileNotFoundError:
                continue
    return count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "table", "most"), [("user_history", "history_log", 36), ("events", "events", 30)]
)
def test_killed_at_random_points_and_rerun_gives_the_same_bytes(
    job: str, table: str, most: int, shop: Any, tmp_path: Path, helpers: Any
) -> None:
    """SIGKILL a real process at random moments; whatever it left, nothing is visible, and the next
    run heals it.
    """
    jobs = helpers.table_jobs[: helpers.table_jobs.index(job) + 1]
    reference = helpers.settings_in(tmp_path / "reference", "online_retail", shop.data)
    helpers.run_jobs(reference, *jobs, num_partitions=6)
    home = tmp_path / "killed"
    killed = helpers.settings_in(home, "online_retail", shop.data)
    helpers.run_jobs(killed, *jobs[:-1], num_partitions=6)
    rng, folder, kills = random.Random(7), Path(killed.home, job), 0
    for wanted in [1, *rng.sample(range(2, most), 3)]:
        started = time.time()
        process = subprocess.Popen(
            command(job),
            env=environment(home, shop.data),
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and parts_since(folder, started) < wanted:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL and not (folder / "manifest.json").exists():
            kills += 1
            assert parts_since(folder, started) > 0
            with pytest.raises(TableNotBuiltError):
                JobFolder(killed.home, job).paths(table)
    assert kills >= 2
    done = subprocess.run(
        command(job),
        env=environment(home, shop.data),
        cwd=ROOT,
        check=False,
        stdout=subprocess.DEVNULL,
    )
    assert done.returncode == 0
    assert snapshot(killed.home, job) == snapshot(reference.home, job)


def test_two_runs_of_a_job_at_once_are_refused(shop: Any, helpers: Any) -> None:
    with (
        JobFolder(shop.settings.home, "item_stats").lock(),
        pytest.raises(JobRunningError, match="under way"),
    ):
        helpers.run_jobs(shop.settings, "item_stats", num_partitions=3)


def test_a_run_that_lost_rows_is_not_published(
    shop: Any, tmp_path: Path, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from beam_jobs.engine import run as engine
    from beam_jobs.errors import LostRowsError

    settings = helpers.settings_in(tmp_path, "online_retail", shop.data)
    collect = engine.collect

    def losing(plan: Any) -> Any:
        found = collect(plan)
        return replace(found, counts=found.counts + Counts({"rows_events": -1, "events": -1}))

    with monkeypatch.context() as patch:
        patch.setattr(engine, "collect", losing)
        with pytest.raises(LostRowsError, match="not published"):
            helpers.run_jobs(settings, "events")
    helpers.run_jobs(settings, "events")
    monkeypatch.setattr(engine, "collect", losing)
    for job in ("user_history", "item_stats"):
        with pytest.raises(LostRowsError, match="went in"):
            helpers.run_jobs(settings, job)
        assert JobFolder(settings.home, job).manifest() is None


def test_a_table_without_rows_is_empty_and_not_missing(
    shop: Any, tmp_path: Path, helpers: Any
) -> None:
    frame = pd.read_parquet(shop.data / "online_retail.parquet")
    frame = frame[
        frame["CustomerID"].notna()
        & frame["StockCode"].str.match("^[0-9]{5}A?$")
        & (frame["UnitPrice"] > 0)
    ]
    frame = frame[frame["InvoiceNo"].str.match("^C?[0-9]{6}$")]
    frame.to_parquet(tmp_path / "online_retail.parquet", index=False)
    settings = helpers.settings_in(tmp_path / "home", "online_retail", tmp_path)
    helpers.run_jobs(settings, "events")
    assert JobFolder(settings.home, "events").read("dead_letters").num_rows == 0


@pytest.mark.parametrize(("year", "says"), [(2099, "yet to come"), (None, "dead letters")])
def test_data_of_the_future_or_of_no_event_is_refused(
    year: int | None, says: str, shop: Any, tmp_path: Path, helpers: Any
) -> None:
    frame = pd.read_parquet(shop.data / "online_retail.parquet").head(3)
    if year:
        frame.loc[0, "InvoiceDate"] = pd.Timestamp(year, 1, 1)
    else:
        frame["UnitPrice"] = -1.0
    frame.to_parquet(tmp_path / "online_retail.parquet", index=False)
    settings = helpers.settings_in(tmp_path / "home", "online_retail", tmp_path)
    from beam_jobs.engine.run import run
    from beam_jobs.registry import load_job

    job = load_job("events")
    with pytest.raises(datasets.RawDataError, match=says):
        run(
            job, settings, job.options(), ["--runner=FnApiRunner"], as_of=None, max_bad_fraction=1.0
        )
    assert JobFolder(settings.home, "events").manifest() is None


class StopHereError(Exception):
    """Stands for a crash."""


@pytest.mark.parametrize("after", [0, 1, 5, 9, 11])
def test_a_crash_after_any_number_of_parts_leaves_the_old_run_visible(
    after: int, shop: Any, tmp_path: Path, helpers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = helpers.settings_in(tmp_path, "online_retail", shop.data)
    helpers.run_jobs(settings, "events", "user_history", num_partitions=2)
    before = snapshot(settings.home, "user_history")
    written, original = 0, JobFolder.write_part

    def crashing(self: JobFolder, *arguments: Any) -> Part:
        nonlocal written
        if written == after:
            raise StopHereError("crashed here")
        written += 1
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(JobFolder, "write_part", crashing)
        with pytest.raises((StopHereError, RuntimeError), match="crashed here"):  # Beam may wrap it
            helpers.run_jobs(settings, "user_history", num_partitions=3)
    assert snapshot(settings.home, "user_history") == before
    helpers.run_jobs(settings, "user_history", num_partitions=3)
    assert snapshot(settings.home, "user_history")[0] != before[0]


def test_publishing_replaces_a_run_and_drops_older_ones(tmp_path: Path) -> None:
    folder = JobFolder(str(tmp_path), "job")
    for number in range(4):
        data = parquet_bytes(pa.table({"n": [number]}))
        part = folder.write_part(f"run{number}", "numbers", "part-0.parquet", data, 1)
        manifest = Manifest(
            "job",
            f"run{number}",
            "shop",
            "f" * 16,
            "2011-01-01T00:00:00+00:00",
            {},
            {},
            Counts(),
            {"numbers": [part]},
        )
        folder.publish(manifest)
        assert folder.read("numbers")["n"].to_pylist() == [number]
    assert sorted(p.name for p in Path(folder.root).iterdir() if p.is_dir()) == ["run2", "run3"]


def test_a_manifest_of_another_layout_is_refused(tmp_path: Path) -> None:
    folder = JobFolder(str(tmp_path), "job")
    Path(folder.root).mkdir()
    Path(folder.root, "manifest.json").write_text('{"layout": 99}')
    with pytest.raises(StaleTableError, match="layout 99"):
        folder.manifest()


@pytest.mark.parametrize(
    "job", ["events", "user_history", "item_stats", "training_examples", "materialize"]
)
def test_dry_run_shows_graph_inputs_and_rows_and_writes_nothing(
    job: str, shop: Any, shop_data: Path
) -> None:
    from beam_jobs.engine.describe import describe
    from beam_jobs.engine.run import plan_run
    from beam_jobs.registry import load_job

    before = sorted((p, p.stat().st_mtime_ns) for p in Path(shop.settings.home).rglob("*"))
    loaded = load_job(job)
    planned = plan_run(loaded, shop.settings, loaded.options(), "2011-10-01")
    shown = describe(loaded, planned.plan, planned.units, ["--runner=FnApiRunner"])
    for part in ("would be built", "inputs:", "pieces, about", "graph:", job):
        assert part in shown
    assert sorted((p, p.stat().st_mtime_ns) for p in Path(shop.settings.home).rglob("*")) == before


def test_a_skip_looks_at_inputs_options_store_and_code(
    shop: Any,
    helpers: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What `python -m beam_jobs` decides without importing Beam."""
    from beam_jobs.command import _up_to_date, run_command
    from beam_jobs.engine import plan
    from beam_jobs.engine.options import Common, OnlineOptions, RunOptions, TableOptions
    from feature_repo.store.store import ONLINE, local_file

    road = helpers.copied(shop, tmp_path)
    asked = {"item_stats": TableOptions(num_partitions=2), "materialize": OnlineOptions()}

    def skipped(job: str, options: RunOptions | None = None, **common: Any) -> bool:
        return _up_to_date(job, options or asked[job], Common(**common), road.settings)

    for job, options in asked.items():
        run_command(job, options, Common(), [], road.settings)
        run_command(job, options, Common(), [], road.settings)
        assert "up to date" in capsys.readouterr().out
    assert not skipped("item_stats", TableOptions(num_partitions=4))
    assert not skipped("item_stats", as_of="2011-06-01")
    with monkeypatch.context() as patch:
        patch.setattr(plan, "code_digest", lambda *modules: "edited")
        assert not skipped("item_stats")
    local_file(road.settings, ONLINE).rename(tmp_path / "elsewhere.db")
    assert skipped("item_stats")
    assert not skipped("materialize")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["events", "--max_bad_fractoin", "0.5"], "did you mean max_bad_fraction?"),
        (["events", "--everydays", "7"], "an option of neither"),
        (["events", "--seed", "3"], "an option of neither"),
        (["events", "--as_of", "yesterday"], "--as_of expects an ISO time"),
        (["events", "--as_of", "2011-13-01"], "--as_of expects an ISO time"),
        (["events", "--num_partitions", "0"], "--num_partitions expects"),
        (["events", "--num_partitions", "-1"], "--num_partitions expects"),
        (["events", "--max_bad_fraction", "nan"], "--max_bad_fraction expects"),
        (["events", "--num_partitions", "many"], "num_partitions"),
        (["evnets"], "Did you mean"),
    ],
)
def test_what_a_command_does_not_know_is_refused_in_a_line(
    arguments: list[str],
    says: str,
    shop: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from beam_jobs.__main__ import app
    from feature_repo import cli

    monkeypatch.setenv("MEMOIR_HOME", shop.settings.root)
    monkeypatch.setenv("MEMOIR_DATA", str(shop.data))
    assert cli.run(lambda: app(arguments)) == 2
    said = capsys.readouterr()
    assert says in said.err
    assert "Traceback" not in said.err


def test_options_that_beam_knows_go_to_the_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    from beam_jobs import __main__ as entry

    passed: list[list[str]] = []
    monkeypatch.setattr(entry, "_run", lambda job, options, common, beam: passed.append(list(beam)))
    given = [
        "--project=p",
        "--region=r",
        "--temp_location=gs://b/t",
        "--extra_package",
        "dist/x.whl",
    ]
    entry.app(["events", "--num_partitions", "3", *given])
    assert passed == [given]
    from beam_jobs.command import refuse_unknown
    from beam_jobs.engine.options import Common, TableOptions
    from feature_repo.errors import UsageError

    refuse_unknown(given, "events", TableOptions(), Common())
    with pytest.raises(UsageError, match="did you mean region"):
        refuse_unknown([*given, "--regoin=r"], "events", TableOptions(), Common())


def test_an_event_at_or_after_as_of_is_a_dead_letter(
    shop: Any, tmp_path: Path, helpers: Any
) -> None:
    settings = helpers.settings_in(tmp_path, "online_retail", shop.data)
    helpers.run_jobs(settings, "events", as_of="2011-06-01T00:00:00+00:00")
    whole, cut = (
        JobFolder(home, "events").require().counts for home in (shop.settings.home, settings.home)
    )
    late = cut.dead["time is at or after --as_of"]
    assert late > 0
    assert cut["rows_events"] + late == whole["rows_events"]
    assert cut["events_made"] == cut["rows_events"] + cut["events_dead"]
    assert cut["rows_read"] == cut["rows_used"] + cut["rows_dead"]


def test_the_same_job_runs_through_the_portable_runner(
    shop: Any, tmp_path: Path, helpers: Any
) -> None:
    """The job API, artifact staging and protos that Flink, Spark and Dataflow take, against an
    embedded endpoint.
    """
    from beam_jobs.engine.run import run
    from beam_jobs.registry import load_job

    settings = helpers.settings_in(tmp_path, "online_retail", shop.data)
    helpers.run_jobs(settings, "events", num_partitions=3)
    job = load_job("item_stats")
    flags = ["--runner=PortableRunner", "--job_endpoint=embed", "--environment_type=LOOPBACK"]
    run(job, settings, job.options(num_partitions=3), flags, as_of=None, max_bad_fraction=None)
    assert snapshot(settings.home, "item_stats") == snapshot(shop.settings.home, "item_stats")


@pytest.mark.parametrize("name", ["shop", "film_club", "token_shop"])
def test_built_tables_have_the_contracts_columns(name: str, request: pytest.FixtureRequest) -> None:
    from feature_repo.contract.arrow import arrow_schema

    road = request.getfixturevalue(name)
    contract = datasets.load_contract(road.settings.dataset)
    built = [
        t for t in contract.tables if t.job and (t.job != "summary_tokens" or name == "token_shop")
    ]
    for table in built:
        rows = JobFolder(road.settings.home, table.job).read(table.name)
        assert rows.schema.names == arrow_schema(table).names
        assert rows.schema.types == arrow_schema(table).types
        assert rows.num_rows or table.name == "token_dead_letters"


def test_a_run_reads_the_very_tables_that_it_names_when_they_are_republished_meanwhile(
    shop: Any, tmp_path: Path, helpers: Any
) -> None:
    from beam_jobs.engine.run import plan_run
    from beam_jobs.registry import load_job

    road = helpers.copied(shop, tmp_path)
    job = load_job("training_examples")
    plan = plan_run(job, road.settings, job.options(), None).plan
    before = plan.read_input("item_stats", "item_stats")
    helpers.run_jobs(road.settings, "item_stats", as_of="2011-03-01", num_partitions=2)
    assert JobFolder(road.settings.home, "item_stats").read("item_stats").num_rows < before.num_rows
    assert plan.read_input("item_stats", "item_stats").equals(before)
    assert plan_run(job, road.settings, job.options(), None).plan.run_id != plan.run_id


@pytest.mark.parametrize("mode", ["in_memory", "multi_threading", "multi_processing"])
def test_a_mistake_that_a_worker_finds_is_a_line_and_no_traceback(
    tmp_path: Path, helpers: Any, mode: str
) -> None:
    films = tmp_path / "films"
    helpers.write_film_club(films)
    movies = films / "movies.dat"
    movies.write_text(
        "".join(f"x{line}\n" for line in movies.read_text(encoding="latin-1").splitlines())
    )
    surroundings = {**os.environ, "MEMOIR_HOME": str(tmp_path / "home"), "MEMOIR_DATA": str(films)}
    done = subprocess.run(
        [sys.executable, "-m", "beam_jobs", "events", "--direct_running_mode", mode],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**surroundings, "MEMOIR_DATASET": "movielens_1m"},
        check=False,
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) <= 2
    assert "column 'item_id': expected a whole number" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_runners_are_those_that_beam_knows() -> None:
    from apache_beam.options.pipeline_options import StandardOptions

    from feature_repo.errors import UsageError

    assert set(RUNNERS) == {*StandardOptions.KNOWN_RUNNER_NAMES, "DaskRunner"}
    assert Common(runner="directrunner").runner == "directrunner"  # as Beam takes it
    assert Common(runner="fnapi").runner == "fnapi"
    with pytest.raises(UsageError, match="did you mean FlinkRunner"):
        Common(runner="FlinkRunne")


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["--runner=DataflowRunner"], 2, "Missing required option: project"),
        (["--runner=my.own.Runner"], 2, "my.own.Runner"),
        (["--runner=PortableRunner"], 1, "job_endpoint"),
        (["--direct_running_mode", "nope"], 2, "invalid choice: 'nope'"),
    ],
)
def test_a_runner_that_cannot_run_is_a_line(
    shop: Any, tmp_path: Path, flags: list[str], code: int, says: str
) -> None:
    settings = shop.settings
    done = subprocess.run(
        [sys.executable, "-m", "beam_jobs", "item_stats", "--force", *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            "MEMOIR_HOME": str(Path(settings.home).parent),
            "MEMOIR_DATA": str(settings.data),
            "MEMOIR_DATASET": settings.dataset,
        },
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_the_text_of_a_workers_traceback_becomes_its_mistake() -> None:
    from beam_jobs.engine.pipeline import from_worker

    text = (
        "Traceback (most recent call last):\n  File x\n"
        "feature_repo.errors.RawDataError: a.csv: column 'x'\nexpected a time [while running 'Read']"
    )
    found = from_worker(text)
    assert found is not None
    assert str(found).startswith("a.csv: column 'x'")
    assert from_worker("KeyError: 'x'") is None
    assert from_worker("beam_jobs.errors.LostRowsError: two rows") is None  # a fault of ours


def films(folder: Path, helpers: Any, **changes: Any) -> Any:
    """A film club whose files were changed line by line, and settings of a home for it."""
    helpers.write_film_club(folder / "films")
    for name, change in changes.items():
        file = folder / "films" / f"{name}.dat"
        lines = file.read_text(encoding="latin-1").splitlines()
        file.write_text("\n".join(change(lines)) + "\n", encoding="latin-1")
    return helpers.settings_in(folder / "home", "movielens_1m", folder / "films")


def test_a_rating_that_was_delivered_twice_is_one_event_and_the_other_is_counted(
    tmp_path: Path, helpers: Any
) -> None:
    settings = films(tmp_path, helpers, ratings=lambda lines: [*lines, lines[0], lines[20]])
    manifest = helpers.run_jobs(settings, *helpers.table_jobs)["events"].manifest
    assert manifest.counts.dead["repeated: the same event stands earlier"] == 2
    assert manifest.counts["rows_events"] == 40 * 24
    letters = JobFolder(settings.home, "events").read("dead_letters").to_pylist()
    assert sum("repeated" in letter["reason"] for letter in letters) == 2


def test_one_bad_profile_row_costs_no_other(tmp_path: Path, helpers: Any) -> None:
    users = {
        "users": lambda lines: [lines[0].replace("::M::", "::::"), "x::F::1::1::0", *lines[1:]]
    }
    settings = films(tmp_path, helpers, **users)
    helpers.run_jobs(settings, "events")
    folder = JobFolder(settings.home, "events")
    assert folder.read("user_profile").num_rows == 39
    assert folder.require().counts["profile_rows_dead"] == 2
    reasons = {letter["reason"] for letter in folder.read("dead_letters").to_pylist()}
    assert {
        "user_profile, gender: is missing",
        "user_profile, user_id: is missing",
    } <= reasons


def test_an_invoice_without_country_keeps_its_events(
    shop: Any, tmp_path: Path, helpers: Any
) -> None:
    frame = pd.read_parquet(shop.data / "online_retail.parquet")
    invoice = frame.loc[frame["CustomerID"] == 13001.0, "InvoiceNo"].iloc[0]
    lines = int((frame["InvoiceNo"] == invoice).sum())
    frame.loc[frame["InvoiceNo"] == invoice, "Country"] = None
    frame.to_parquet(tmp_path / "online_retail.parquet", index=False)
    settings = helpers.settings_in(tmp_path / "home", "online_retail", tmp_path)
    helpers.run_jobs(settings, "events")
    counts, whole = (
        JobFolder(home, "events").require().counts for home in (settings.home, shop.settings.home)
    )
    assert counts["rows_events"] == whole["rows_events"]
    assert 0 < counts.dead["user_profile, country: is missing"] <= lines


def test_dead_letters_count_towards_the_limit_whoever_found_them(
    shop: Any, tmp_path: Path, helpers: Any
) -> None:
    """Signs that do not fit their invoice pass every limit of the raw table, and are found by
    `parse` alone.
    """
    from feature_repo.contract.expectations import GateError

    frame = pd.read_parquet(shop.data / "online_retail.parquet")
    bad = (
        frame["CustomerID"].notna()
        & ~frame["InvoiceNo"].str.startswith("C")
        & (frame.index % 10 > 0)
    )
    frame.loc[bad, "Quantity"] = -frame.loc[bad, "Quantity"].abs()
    frame.to_parquet(tmp_path / "online_retail.parquet", index=False)
    settings = helpers.settings_in(tmp_path / "home", "online_retail", tmp_path)
    with pytest.raises(
        GateError, match=r"raw rows are dead letters[\s\S]*unreadable: quantity or its sign"
    ):
        helpers.run_jobs(settings, "events")
    assert JobFolder(settings.home, "events").manifest() is None
    helpers.run_jobs(settings, "events", max_bad_fraction=0.95)


def test_periods_that_the_data_does_not_reach_are_refused_by_name(
    shop: Any, tmp_path: Path, helpers: Any
) -> None:
    from feature_repo.errors import DeclarationError

    frame = pd.read_parquet(shop.data / "online_retail.parquet")
    frame[frame["InvoiceDate"] < "2011-06-01"].to_parquet(
        tmp_path / "online_retail.parquet", index=False
    )
    settings = helpers.settings_in(tmp_path / "home", "online_retail", tmp_path)
    with pytest.raises(
        DeclarationError, match="no request into validation and test: validation_from is 2011-10-25"
    ):
        helpers.run_jobs(settings, *helpers.table_jobs)


def test_the_same_file_under_two_names_is_refused(tmp_path: Path) -> None:
    from beam_jobs.engine.inputs import raw_digest

    retail = datasets.load("online_retail").spec
    folder = datasets.Dataset(replace(retail, events=Source("*.csv")))
    (tmp_path / "a.csv").write_text("1\n")
    (tmp_path / "b.csv").write_text("2\n")
    raw_digest(folder, str(tmp_path))
    (tmp_path / "b.csv").write_text("1\n")
    with pytest.raises(datasets.RawDataError, match=r"b\.csv holds the same bytes as .*a\.csv"):
        raw_digest(folder, str(tmp_path))
    # Where events have an identity, those that come twice are set aside one by one.
    known = replace(folder, spec=replace(folder.spec, event_identity=("user_id",)))
    raw_digest(known, str(tmp_path))
