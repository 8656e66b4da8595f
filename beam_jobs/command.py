"""What `python -m beam_jobs` does once its flags are read: progress, counts, dead letters, exit code."""

from __future__ import annotations

import argparse
import json
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pyarrow.fs as pafs
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from beam_jobs.inputs import current_inputs, output_is_there
from feature_repo.catalogue import Catalogue
from feature_repo.datasets import RawDataError
from feature_repo.settings import Settings
from feature_repo.tables import JobFolder, JobRunningError, Manifest, TableNotBuiltError

if TYPE_CHECKING:
    from beam_jobs.runs import RunPlan

PLAIN_LINE_S = 10  # seconds between lines where there is no terminal
console = Console()


def run_command(known: argparse.Namespace, beam_args: list[str], settings: Settings) -> int:
    """Run one job. Returns the exit code: 0 built or up to date, 1 refused with a reason."""
    if not known.dry_run and not known.refill and _up_to_date(known, settings):
        return 0
    warnings.filterwarnings("ignore", module="apache_beam")
    logging.getLogger("apache_beam").setLevel(logging.ERROR)
    logging.getLogger().setLevel(logging.ERROR)
    from beam_jobs import runs
    from beam_jobs.training_examples import NotEnoughItemsError
    from feature_repo.expectations import GateError

    job = runs.load_job(known.job)
    options = {
        name: given if (given := getattr(known, name)) is not None else default for name, default in job.options.items()
    }
    arguments = [f"--runner={known.runner}", *beam_args]
    try:
        options = job.resolve(settings, options)
        plan, units, inputs = runs.plan_run(job, settings, options, known.as_of)
        if known.dry_run:
            console.print(runs.describe(job, plan, units, arguments), highlight=False, markup=False)
            return 0
        catalogue = Catalogue(settings.catalogue_url)
        with (
            catalogue.stage(settings.dataset, known.job, plan.run_id) as stage,
            _progress(plan, job.num_parts(plan, len(units))) as tell,
        ):
            outcome = runs.run(
                job,
                settings,
                options,
                arguments,
                as_of=known.as_of,
                max_bad_fraction=known.max_bad_fraction,
                tell=tell,
            )
            if not outcome.built:
                stage.discard()
            stage.details = {
                "counts": outcome.manifest.counts,
                "run_id": outcome.manifest.run_id,
                "docs": outcome.docs,
                "inputs": inputs,
                "argv": _argv(known),
            }
    except (
        GateError,
        RawDataError,
        TableNotBuiltError,
        NotEnoughItemsError,
        JobRunningError,
        runs.LostRowsError,
        runs.OptionsError,
    ) as error:
        console.print(f"{known.job}: {error}", style="red", highlight=False, markup=False)
        return 1
    if outcome.built:
        _report(outcome.manifest, outcome.docs)
        for line in outcome.said:
            console.print(f"  {line}", highlight=False)
    else:
        console.print(f"{known.job}: up to date (run {outcome.manifest.run_id})", highlight=False)
        for line in outcome.said:
            console.print(f"  {line}", highlight=False)
    return 0


def _up_to_date(known: argparse.Namespace, settings: Settings) -> bool:
    """Say so and skip, without importing Beam, where the last run had these very inputs and flags."""
    from feature_repo import datasets

    last = Catalogue(settings.catalogue_url).last_run(settings.dataset, known.job)
    manifest = JobFolder(settings.home, known.job).manifest()
    if not output_is_there(known.job, settings):
        return False
    if last is None or manifest is None or last.inputs != manifest.run_id or last.details.get("argv") != _argv(known):
        return False
    if manifest.fingerprint != datasets.load_contract(settings.dataset).fingerprint:
        return False
    if manifest.inputs != current_inputs(known.job, list(manifest.inputs), settings):
        return False
    if known.job == "summary_tokens" and not _made_by(known, settings, manifest):
        return False
    console.print(f"{known.job}: up to date (run {manifest.run_id})", highlight=False)
    return True


def _made_by(known: argparse.Namespace, settings: Settings, manifest: Manifest) -> bool:
    """Whether the bundle that is asked for is still the one that made the published tokens."""
    catalogue, dataset = Catalogue(settings.catalogue_url), settings.dataset
    try:
        row = catalogue.bundle(dataset, known.bundle) if known.bundle else catalogue.live_bundle(dataset)
    except LookupError:
        return False
    return bool(manifest.options["bundle"] == row.digest)


def _argv(known: argparse.Namespace) -> str:
    return json.dumps(
        {k: v for k, v in vars(known).items() if k not in ("runner", "dry_run", "max_bad_fraction")}, sort_keys=True
    )


def _report(manifest: Manifest, docs: str | None) -> None:
    counts = manifest.counts
    console.print(f"{manifest.job}: run {manifest.run_id}, as of {manifest.as_of}", highlight=False)
    if "rows_read" in counts:
        kept, dead = counts.get("rows_events", 0), counts.get("rows_dead", 0)
        console.print(f"  read {counts['rows_read']:,} = kept {kept:,} + dead letters {dead:,}", highlight=False)
        reasons = sorted(((n, name[6:]) for name, n in counts.items() if name.startswith("dead: ")), reverse=True)
        for number, reason in reasons:
            console.print(f"    {number:>9,}  {reason}", highlight=False)
    else:
        console.print("  " + ", ".join(f"{name} {number:,}" for name, number in counts.items()), highlight=False)
    if docs:
        console.print(f"  data docs: {docs}", highlight=False, soft_wrap=True)


@contextmanager
def _progress(plan: RunPlan, num_parts: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, plain lines otherwise, from the parts that appear in the run's folder; yields `tell`."""
    from beam_jobs.runs import PARTS

    folder, done, phase, started = plan.folder, threading.Event(), "starting", time.monotonic()
    root = f"{folder.root}/{plan.run_id}/{PARTS}"
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    task = bar.add_task(plan.job, total=num_parts)

    def tell(new_phase: str) -> None:
        nonlocal phase
        phase = new_phase

    def watch() -> None:
        said = 0.0
        while not done.wait(0.2):
            infos = folder.filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))
            parts, now = sum(not info.base_name.startswith(".") for info in infos), time.monotonic()
            bar.update(task, completed=parts, description=f"{plan.job}: {phase}")
            if not console.is_terminal and now - said >= PLAIN_LINE_S:
                said = now
                console.print(
                    f"{plan.job}: {phase}, {parts} of {num_parts} parts, {now - started:.0f} s", highlight=False
                )

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        with bar:
            yield tell
    finally:
        done.set()
        thread.join()
