"""`python -m beam_jobs` once its flags are read: progress, counts, dead letters, exit
code.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from typing import TYPE_CHECKING

import pyarrow.fs as pafs
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from beam_jobs.engine.inputs import current_inputs, output_is_there
from beam_jobs.engine.options import Common, RunOptions, TokenOptions
from feature_repo import datasets
from feature_repo.errors import UsageError, nearest
from feature_repo.home.catalogue import Catalogue
from feature_repo.home.tables import JobFolder, Manifest
from feature_repo.settings import Settings

if TYPE_CHECKING:
    from beam_jobs.engine.runs import RunPlan

PLAIN_LINE_S = 10.0  # between lines where there is no terminal
FIRST_LISTING_S = 0.5  # before a run's folder is listed for a bar
console = Console()


def run_command(
    name: str, options: RunOptions, common: Common, beam_args: list[str], settings: Settings
) -> int:
    """Run one job. Returns the exit code 0: built or up to date.

    Raises:
        ExpectedError: it was refused, with a reason.
    """
    datasets.load(settings.dataset)
    refill = isinstance(options, TokenOptions) and options.refill
    if (
        not common.dry_run
        and not common.force
        and not refill
        and not beam_args
        and _up_to_date(name, options, common, settings)
    ):
        return 0
    warnings.filterwarnings("ignore", module="apache_beam")
    # An error in a worker is raised here again, with its traceback where it is a fault of ours:
    # Beam need not print it too.
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    logging.getLogger().setLevel(logging.ERROR)
    refuse_unknown(beam_args, name, options, common)
    from beam_jobs.engine import runs

    job = runs.load_job(name)
    arguments = [f"--runner={common.runner}", *beam_args]
    resolved = job.resolve(settings, options)
    planned = runs.plan_run(job, settings, resolved, common.as_of)
    plan = planned.plan
    if common.dry_run:
        console.print(
            runs.describe(job, plan, planned.units, arguments), highlight=False, markup=False
        )
        return 0
    catalogue = Catalogue(settings.catalogue_url)
    with (
        catalogue.stage(settings.dataset, name, plan.run_id) as stage,
        _progress(plan, job.num_parts(plan, len(planned.units))) as tell,
    ):
        outcome = runs.run(
            job,
            settings,
            resolved,
            arguments,
            as_of=common.as_of,
            max_bad_fraction=common.max_bad_fraction,
            force=common.force,
            tell=tell,
        )
        if not outcome.built:
            stage.discard()
        stage.details = {
            "counts": outcome.manifest.counts,
            "run_id": outcome.manifest.run_id,
            "docs": outcome.docs,
            "inputs": planned.inputs,
            "argv": _asked(options, common),
            "command": _flags(options, common, beam_args),
        }
    if outcome.built:
        _report(outcome.manifest, outcome.docs)
    else:
        console.print(f"{name}: up to date (run {outcome.manifest.run_id})", highlight=False)
    for line in outcome.said:
        console.print(f"  {line}", highlight=False)
    return 0


def refuse_unknown(beam_args: list[str], job: str, options: RunOptions, common: Common) -> None:
    """Refuse arguments that no option class of Beam knows; Beam itself would ignore them.

    Raises:
        UsageError: names the argument, and the nearest option of the job or of Beam.
    """
    if not beam_args:
        return
    from apache_beam.options.pipeline_options import PipelineOptions, _BeamArgumentParser

    parser = _BeamArgumentParser(allow_abbrev=False, add_help=False)
    for options_class in {c.__name__: c for c in PipelineOptions.__subclasses__()}.values():
        options_class._add_argparse_args(parser)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            _, unknown = parser.parse_known_args(beam_args)
    except (SystemExit, argparse.ArgumentError) as error:
        told = (said.getvalue() or str(error)).strip().splitlines()[-1].partition("error: ")[2]
        raise UsageError(f"Beam cannot read {' '.join(beam_args)!r}: {told}") from error
    if unknown:
        known = {f.name for f in (*fields(options), *fields(common))} | set(
            vars(parser.parse_args([]))
        )
        word = unknown[0].lstrip("-").split("=")[0]
        raise UsageError(
            f"{unknown[0]!r} is an option of neither `beam_jobs {job}` nor Beam{nearest(word, known)} "
            f"See `python -m beam_jobs {job} --help`"
        )


def _up_to_date(name: str, options: RunOptions, common: Common, settings: Settings) -> bool:
    """Say so and skip, without importing Beam, where the last run had these very inputs and
    options.
    """
    last = Catalogue(settings.catalogue_url).last_run(settings.dataset, name)
    manifest = JobFolder(settings.home, name).manifest()
    if last is None or manifest is None:
        return False
    if last.inputs != manifest.run_id or last.details.get("argv") != _asked(options, common):
        return False
    if manifest.fingerprint != datasets.load_contract(settings.dataset).fingerprint:
        return False
    if manifest.inputs != current_inputs(name, list(manifest.inputs), settings):
        return False
    if isinstance(options, TokenOptions) and not _made_by(options, settings, manifest):
        return False
    if not output_is_there(name, settings):  # last, for a remote store is asked over the network
        return False
    console.print(f"{name}: up to date (run {manifest.run_id})", highlight=False)
    return True


def _made_by(options: TokenOptions, settings: Settings, manifest: Manifest) -> bool:
    """Return whether the requested bundle is still the one that made the published tokens."""
    catalogue = Catalogue(settings.catalogue_url)
    dataset = settings.dataset
    try:
        row = (
            catalogue.bundle(dataset, options.bundle)
            if options.bundle
            else catalogue.live_bundle(dataset)
        )
    except LookupError:
        return False
    return bool(manifest.options["bundle"] == row.digest)


def live_bundle_makes_tokens(settings: Settings) -> bool:
    """Return whether servers rank from summary tokens that the live bundle's own stage 1 makes; said where
    there are none to refresh.
    """
    catalogue = Catalogue(settings.catalogue_url)
    live = catalogue.live_or_none(settings.dataset)
    if live is None:
        console.print("summary_tokens: no bundle is live, so there are no tokens to refresh")
        return False
    if catalogue.accepted_tokens(live.digest) is None:
        console.print(f"summary_tokens: {live.recipe} reads none", highlight=False)
        return False
    return True


def _asked(options: RunOptions, common: Common) -> str:
    """Return the options that decide a run's rows, as the catalogue keeps them."""
    return json.dumps({**asdict(options), "as_of": common.as_of}, sort_keys=True)


def _flags(options: RunOptions, common: Common, beam_args: list[str]) -> list[str]:
    """Return the flags that start the same run once more."""
    said = {**asdict(options), **asdict(common), "dry_run": False, "force": False}
    flags = [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in said.items()
        if value is not None and value is not False
    ]
    return [*flags, *beam_args]


def _report(manifest: Manifest, docs: str | None) -> None:
    counts = manifest.counts
    console.print(f"{manifest.job}: run {manifest.run_id}, as of {manifest.as_of}", highlight=False)
    if "rows_read" in counts:
        used = counts["rows_used"]
        dead = counts["rows_dead"]
        made = counts["events_made"]
        kept = counts["rows_events"]
        events = "" if made == used == kept else f"; {made:,} events, {kept:,} kept"
        console.print(
            f"  read {counts['rows_read']:,} = used {used:,} + dead letters {dead:,}{events}",
            highlight=False,
        )
        reasons = sorted(
            ((n, name[6:]) for name, n in counts.items() if name.startswith("dead: ")), reverse=True
        )
        for number, reason in reasons:
            console.print(f"    {number:>9,}  {reason}", highlight=False)
        for name, number in counts.items():
            if name.startswith("cut: ") and number:
                what = f"values of {name[5:]} beyond those that are read"
                console.print(f"  {number:,} {what}", highlight=False)
            if name.startswith("lost: ") and number:
                what = f"values of {name[6:]} that could not be read and are missing"
                console.print(f"  {number:,} {what}", highlight=False)
    else:
        console.print(
            "  " + ", ".join(f"{name} {number:,}" for name, number in counts.items()),
            highlight=False,
        )
    if docs:
        console.print(f"  data docs: {docs}", highlight=False, soft_wrap=True)


@contextmanager
def _progress(plan: RunPlan, num_parts: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, plain lines otherwise, from the parts that appear in the run's folder;
    yields `tell`.
    """
    from beam_jobs.engine.runs import PARTS

    folder = plan.folder
    done = threading.Event()
    phase = "starting"
    started = time.monotonic()
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
        bar.update(task, description=f"{plan.job}: {phase}")

    # Workers may run elsewhere: all that is sure to be seen from here is the parts that appear. Their
    # folder may be an object store, so it is listed less and less often, and never for nothing.
    def watch() -> None:
        wait_s = FIRST_LISTING_S if console.is_terminal else PLAIN_LINE_S
        while not done.wait(wait_s):
            wait_s = min(1.5 * wait_s, PLAIN_LINE_S)
            infos = folder.filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))
            parts = min(sum(not info.base_name.startswith(".") for info in infos), num_parts)
            bar.update(task, completed=parts)
            if not console.is_terminal:
                spent_s = time.monotonic() - started
                console.print(
                    f"{plan.job}: {phase}, {parts} of {num_parts} parts, {spent_s:.0f} s",
                    highlight=False,
                )

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        with bar:
            yield tell
    finally:
        done.set()
        thread.join()
