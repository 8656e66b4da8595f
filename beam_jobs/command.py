"""`python -m beam_jobs` once its flags are read: progress, counts, dead letters, exit
code.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.fs as pafs
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from beam_jobs.engine.inputs import current_inputs, output_is_there, why_anew
from beam_jobs.engine.options import Common, RunOptions, TokenOptions, naming
from beam_jobs.registry import MODULES, load_job
from feature_repo import datasets
from feature_repo.errors import UsageError, nearest
from feature_repo.home.catalogue import Catalogue
from feature_repo.home.erased import list_erased
from feature_repo.home.tables import JobFolder, Manifest
from feature_repo.settings import Settings
from feature_repo.store.received import collect

if TYPE_CHECKING:
    from beam_jobs.engine.job import Job
    from beam_jobs.engine.plan import RunPlan

# Folder that a server of this machine logs to
SERVED_LOG = "MEMOIR_SERVE_LOG_FOLDER"
# Seconds between lines where there is no terminal
PLAIN_LINE_S = 10.0
# Seconds before a run's folder is listed for a bar
FIRST_LISTING_S = 0.5
console = Console()


def run_command(
    name: str, options: RunOptions, common: Common, beam_args: list[str], settings: Settings
) -> int:
    """Run one job. Returns the exit code 0: built or up to date.

    Raises:
        ExpectedError: it was refused, with a reason.
    """
    contract = datasets.load(settings.dataset).contract
    # 1. What servers have acknowledged since is input as well, and decides whether the run is up to date.
    if name == "events" and not common.dry_run and (line := collect(settings, contract)):
        console.print(f"events: {line}", highlight=False)
    # 2. Skip where nothing changed, without the cost of importing Beam.
    if (
        not common.dry_run
        and not common.force
        and not options.repeats
        and not beam_args
        and _up_to_date(name, options, common, settings)
    ):
        return 0
    warnings.filterwarnings("ignore", module="apache_beam")
    # An error in a worker is raised here again, with its traceback where it is a fault of ours:
    # Beam need not print it too.
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    logging.getLogger().setLevel(logging.ERROR)
    from beam_jobs.engine.pipeline import with_dask

    arguments = with_dask([f"--runner={common.runner}", *beam_args])
    refuse_unknown(beam_args, name, options, common)
    from beam_jobs.engine.describe import describe
    from beam_jobs.engine.run import plan_run, run

    # 3. Name the run by its inputs and options.
    job = load_job(name)
    resolved = job.resolve(settings, options)
    planned = plan_run(job, settings, resolved, common.as_of)
    plan = planned.plan
    if common.dry_run:
        console.print(describe(job, plan, planned.units, arguments), highlight=False, markup=False)
        return 0
    _say_why_anew(name, planned.inputs, [unit.rows for unit in planned.units], settings)
    # 4. Run it, and note in the catalogue what the next run is compared with.
    catalogue = Catalogue(settings.catalogue_url)
    with (
        catalogue.stage(settings.dataset, name, plan.run_id) as stage,
        _progress(plan, job.num_parts(plan, len(planned.units))) as tell,
    ):
        outcome = run(
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
            "counts": asdict(outcome.manifest.counts),
            "run_id": outcome.manifest.run_id,
            "docs": outcome.docs,
            "inputs": planned.inputs,
            "options": asdict(options),
            "common": asdict(replace(common, dry_run=False, force=False)),
            "beam": beam_args,
        }
    # 5. Say what came of it.
    if outcome.built:
        _report(job, outcome.manifest, outcome.docs)
    else:
        console.print(f"{name}: up to date (run {outcome.manifest.run_id})", highlight=False)
    for line in outcome.lines:
        console.print(f"  {line}", highlight=False)
    return 0


def _say_why_anew(name: str, inputs: dict[str, str], rows: list[int], settings: Settings) -> None:
    """Say why a job that has run before runs again, and that it reads everything: rows do not build on a run
    before.
    """
    published = JobFolder(settings.home, name).manifest()
    if published is None:
        return
    fingerprint = datasets.load_contract(settings.dataset).fingerprint
    if reasons := why_anew(published, fingerprint, inputs):
        number = "all" if min(rows, default=0) < 0 else f"all {sum(rows):,}"
        told = f"{name}: runs again, because {', '.join(reasons)}; {number} rows of its input are read anew"
        console.print(told, highlight=False)


def refuse_unknown(beam_args: list[str], job: str, options: RunOptions, common: Common) -> None:
    """Refuse arguments that no option class of Beam knows; Beam itself would ignore them.

    Raises:
        UsageError: names the argument, and the nearest option of the job or of Beam.
    """
    if not beam_args:
        return
    from apache_beam.options.pipeline_options import PipelineOptions, _BeamArgumentParser

    parser = _BeamArgumentParser(allow_abbrev=False, add_help=False)
    # As in Beam, the last class of a name counts: argparse refuses an option given twice.
    for options_class in {c.__name__: c for c in PipelineOptions.__subclasses__()}.values():
        options_class._add_argparse_args(parser)
    # argparse prints a refusal and exits; both are caught, so that one error says it.
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            _, unknown = parser.parse_known_args(beam_args)
    except (SystemExit, argparse.ArgumentError) as error:
        message = (stderr.getvalue() or str(error)).strip().splitlines()[-1].partition("error: ")[2]
        raise UsageError(f"Beam cannot read {' '.join(beam_args)!r}: {message}") from error
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
    asked = (naming(asdict(options)), common.as_of)
    details = last.details
    if last.inputs != manifest.run_id or "options" not in details:
        return False
    if asked != (naming(details["options"]), details["common"]["as_of"]):
        return False
    if manifest.fingerprint != datasets.load_contract(settings.dataset).fingerprint:
        return False
    if manifest.inputs != current_inputs(MODULES[name], list(manifest.inputs), settings):
        return False
    if not options.still_mean(manifest.options, settings):
        return False
    # Last, for a remote store is asked over the network
    if not output_is_there(name, settings):
        return False
    console.print(f"{name}: up to date (run {manifest.run_id})", highlight=False)
    return True


def tokens_to_refresh(settings: Settings) -> TokenOptions | None:
    """The options of a run that refreshes the summary tokens which servers rank from: of the live bundle, or of the
    newest one that made what the live one reads. None, and said, where there are none to refresh.
    """
    catalogue = Catalogue(settings.catalogue_url)
    live = catalogue.live_or_none(settings.dataset)
    if live is None:
        console.print("summary_tokens: no bundle is live, so there are no tokens to refresh")
        return None
    if live.tokens is None:
        console.print(f"summary_tokens: {live.recipe} reads none", highlight=False)
        return None
    maker = catalogue.maker_of(settings.dataset, live.tokens)
    if maker is None or maker.recipe == live.recipe:
        return TokenOptions()
    # The maker's tokens are wanted, and not the maker itself.
    return TokenOptions(bundle=maker.digest, not_live=True)


def run_again(name: str, settings: Settings) -> None:
    """Run a job as it was run last.

    Raises:
        ExpectedError: it was refused, with a reason.
    """
    last = Catalogue(settings.catalogue_url).last_run(settings.dataset, name)
    details = last.details if last else {}
    options = load_job(name).options(**details.get("options", {}))
    common = Common(**details.get("common", {}))
    run_command(name, options, common, details.get("beam", []), settings)


def run_erase(users: list[str], logs: list[str], *, allow: bool) -> None:
    """Erase users and print what was found where; or allow them again.

    Raises:
        ErasureError: something of them is left, or no such user can be erased.
    """
    from beam_jobs.erase import erase, ids_of

    settings = Settings.from_env()
    ids = ids_of(datasets.load_contract(settings.dataset), users)
    if allow:
        # Only the list changes: the next jobs build these users' rows again.
        left = list_erased(settings.home, ids, allow=True)
        console.print(f"{len(left.users):,} users stay erased; the others come back with the jobs")
        return
    # The folder that the environment names is searched too, so that --logs may leave it out.
    folders = {Path(log) for log in (*logs, os.environ.get(SERVED_LOG)) if log}
    proof, path = erase(
        settings,
        ids,
        sorted(folders),
        lambda name: run_again(name, settings),
        tell=lambda step: console.print(f"erase: {step}"),
    )
    table = Table("searched", "rows or keys there", "of these users", box=SIMPLE_HEAD)
    for one in proof.searched:
        table.add_row(one.place, "" if one.of is None else f"{one.of:,}", f"{one.theirs:,}")
    console.print(table)
    # The command does not reach everything, and must say what it left.
    for line in proof.left:
        console.print(f"not touched: {line}", highlight=False, soft_wrap=True)
    console.print(
        f"{len(ids):,} users erased in {proof.took_s:g} s; proof: {path}", highlight=False
    )


def _report(job: Job, manifest: Manifest, docs: str | None) -> None:
    counts = manifest.counts
    lines = [f"{job.name}: run {manifest.run_id}, as of {manifest.as_of}"]
    lines += [f"  {job.headline(counts)}"]
    lines += [f"    {reason}" for reason in counts.reasons()]
    lines += [f"  {left_out}" for left_out in counts.left_out()]
    console.print("\n".join(lines), highlight=False)
    if docs:
        console.print(f"  data docs: {docs}", highlight=False, soft_wrap=True)


@contextmanager
def _progress(plan: RunPlan, num_parts: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, plain lines otherwise, from the parts that appear in the run's folder;
    yields `tell`.
    """
    from beam_jobs.engine.parts import NOTES

    folder = plan.folder
    done = threading.Event()
    phase = "starting"
    started = time.monotonic()
    root = f"{folder.root}/{plan.run_id}/{NOTES}"
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
