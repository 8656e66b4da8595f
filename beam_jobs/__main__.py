"""`python -m beam_jobs <job>`: options only. Options that neither the job nor Beam knows are
refused.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import Annotated

from cyclopts import Parameter

from beam_jobs.engine.options import (
    Common,
    ExampleOptions,
    OnlineOptions,
    RunOptions,
    TableOptions,
    TokenOptions,
)
from feature_repo import cli

app = cli.app(
    "beam_jobs",
    """Compute rows with Apache Beam, a job at a time.

    Example: `python -m beam_jobs events --num_partitions 16`. Further options go to the Beam runner, such as
    `--runner DataflowRunner --project my-project`. `python -m beam_jobs <job> --help` lists a job's own.""",
)
Flat = Parameter(name="*")
BeamArguments = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]
CommonOptions = Annotated[Common, Flat]
DEFAULTS = Common()


@app.command
def events(
    *beam: BeamArguments,
    options: Annotated[TableOptions, Flat] = TableOptions(),  # noqa: B008
    common: CommonOptions = DEFAULTS,
) -> int:
    """Raw rows → events by user, user and item profiles, dead letters with their reasons."""
    return _run("events", options, common, beam)


@app.command
def user_history(
    *beam: BeamArguments,
    options: Annotated[TableOptions, Flat] = TableOptions(),  # noqa: B008
    common: CommonOptions = DEFAULTS,
) -> int:
    """Events → history log, user statistics, and each user's newest events packed."""
    return _run("user_history", options, common, beam)


@app.command
def item_stats(
    *beam: BeamArguments,
    options: Annotated[TableOptions, Flat] = TableOptions(),  # noqa: B008
    common: CommonOptions = DEFAULTS,
) -> int:
    """Events → windowed counts and mean values by item."""
    return _run("item_stats", options, common, beam)


@app.command
def training_examples(
    *beam: BeamArguments,
    options: Annotated[ExampleOptions, Flat] = ExampleOptions(),  # noqa: B008
    common: CommonOptions = DEFAULTS,
) -> int:
    """Events and item statistics → requests with candidates and labels."""
    return _run("training_examples", options, common, beam)


@app.command
def materialize(
    *beam: BeamArguments,
    options: Annotated[OnlineOptions, Flat] = OnlineOptions(),  # noqa: B008
    common: CommonOptions = DEFAULTS,
) -> int:
    """Newest row of each key → online store; keys that are gone lose their values there."""
    return _run("materialize", options, common, beam)


@app.command
def summary_tokens(
    *beam: BeamArguments,
    options: Annotated[TokenOptions, Flat] = TokenOptions(),  # noqa: B008
    common: CommonOptions = DEFAULTS,
) -> int:
    """Histories → summary tokens, offline as they were and online as they are."""
    return _run("summary_tokens", options, common, beam)


@app.command
def refresh(
    *beam: BeamArguments,
    common: CommonOptions = DEFAULTS,
) -> int:
    """New raw rows → tables → online store → summary tokens of the live bundle, one job after another.

    What is up to date is skipped, so it may run as often as there is something new, as by cron:
    `17 * * * * cd /srv/memoir && .venv/bin/python -m beam_jobs refresh >> refresh.log 2>&1`
    """
    from beam_jobs.command import tokens_to_refresh
    from feature_repo.settings import Settings

    jobs: dict[str, RunOptions] = {
        "events": TableOptions(),
        "user_history": TableOptions(),
        "item_stats": TableOptions(),
        "materialize": OnlineOptions(),
    }
    for job, options in jobs.items():
        _tell_time(f"refresh: {job}")
        _run(job, options, common, beam)
    of_tokens = tokens_to_refresh(Settings.from_env())
    if of_tokens is not None:
        _tell_time("refresh: summary_tokens")
        _run("summary_tokens", of_tokens, common, beam)
    _tell_time("refresh: done")
    return 0


@app.command
def erase(*users: str, logs: tuple[str, ...] = (), allow: bool = False) -> None:
    """Take users out of every table, store, version and log, prove it, and keep them out of later runs.

    Args:
        users: ids of the users.
        logs: folders that servers logged to; MEMOIR_SERVE_LOG_FOLDER always counts.
        allow: take them off the list of erased users: jobs and servers may know them again.
    """
    from beam_jobs.command import run_erase

    run_erase(list(users), list(logs), allow=allow)


def _tell_time(what: str) -> None:
    """A line with the time in front, for a log that cron appends to."""
    print(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {what}", flush=True)


def _run(job: str, options: RunOptions, common: Common, beam: tuple[str, ...]) -> int:
    from feature_repo.settings import Settings

    settings = Settings.from_env()
    from beam_jobs.command import run_command

    return run_command(job, options, common, list(beam), settings)


def main() -> int:
    """Dispatch."""
    return cli.run(app)


if __name__ == "__main__":
    sys.exit(main())
