"""`python -m serving`: rank over HTTP with the live bundle. `python -m serving demo`: start it, ask
it once, show it.
"""

from __future__ import annotations

import sys
from typing import Any

from feature_repo import cli
from feature_repo.errors import UsageError

app = cli.app(
    "serving",
    """Rank over HTTP with the live bundle.

    Example: `python -m serving --port 8000 --replay`. `python -m serving demo` starts a server, sends one request and shows the answer.""",
)


@app.default
def serve(
    *,
    host: str | None = None,
    port: int | None = None,
    processes: int | None = None,
    bundle: str | None = None,
    device: str | None = None,
    replay: bool | None = None,
    repair: bool | None = None,
    item_refresh_s: float | None = None,
) -> int:
    """Rank over HTTP until stopped. Limits, times, TLS and callers' tokens are environment variables:
    MEMOIR_SERVE_DEADLINE_MS and the like, all in serving/api/settings.py.

    Args:
        host: address to listen on; by default 127.0.0.1, this machine only.
        port: port to listen on, by default 8000; 0 for any free one.
        processes: server processes, by default one; each holds the model and all items.
        bundle: folder of a bundle; by default the live one of the catalogue, which is followed.
        device: where the model runs, by default cpu; cuda needs a GPU.
        replay: requests without a time are taken as made at the end of the data, for samples of the
            past.
        repair: fill an online store that was emptied again, from the tables.
        item_refresh_s: seconds between refreshes of item features, by default 300; 0 for never.
    """
    given: dict[str, Any] = {
        "host": host,
        "port": port,
        "processes": processes,
        "bundle": bundle,
        "device": device,
        "replay": replay,
        "repair": repair,
        "item_refresh_s": item_refresh_s,
    }
    from serving import command
    from serving.api.settings import settings_from

    # A flag that is not given leaves the word to the environment.
    asked = {name: value for name, value in given.items() if value is not None}
    return command.serve(settings_from(**asked))


@app.command
def audit(log: str, *, bundle: str | None = None) -> None:
    """Compute what was served anew from the tables, and say which features differ.

    Args:
        log: folder that the server logged to (MEMOIR_SERVE_LOG_FOLDER).
        bundle: folder of the bundle that served; by default the live one.
    """
    from serving import command

    command.run_audit(log, bundle)


@app.command
def replay(log: str, *, bundle: str | None = None) -> None:
    """Rank what was served with another bundle, and say how far the lists part.

    Args:
        log: folder that the server logged to (MEMOIR_SERVE_LOG_FOLDER).
        bundle: folder of the other bundle; by default the live one.
    """
    from serving import command

    command.run_replay(log, bundle)


@app.command
def compile(name: str | None = None) -> int:  # the word that people look for
    """Compile the steps of a bundle's model into machine code for this kind of machine: requests cost less, scores stay
    equal to 1e-5. It takes a minute or two and needs g++; servers use it from when they next load the bundle.

    Args:
        name: recipe, or digest, of a bundle in the catalogue; by default the live one.
    """
    from serving import command

    return command.run_compile(name)


@app.command
def impressions(log: str, file: str, *, top: int | None = None) -> None:
    """Write what was served as rows of the dataset's raw log: impressions for the next training set.

    Args:
        log: folder that the server logged to (MEMOIR_SERVE_LOG_FOLDER).
        file: a new file where the dataset's declaration looks for events.
        top: of each list only so many, from its top; by default all of it.
    """
    from serving import command

    command.run_impressions(log, file, top)


@app.command
def size(
    *,
    bundle: str | None = None,
    candidates: int = 500,
    sample: int = 200,
    users: int | None = None,
    requests_per_s: float | None = None,
    replay: bool = False,
) -> None:
    """Measure what a bundle takes on this machine, over its own store: memory of a process, bytes a user and an item, ms a
    request; and what that makes of so many users and requests.

    Args:
        bundle: folder of a bundle; by default the live one.
        candidates: of a request.
        sample: users who are measured.
        users: to plan for; by default those that the tables have.
        requests_per_s: to plan for, at the peak.
        replay: as of the end of the data.
    """
    from serving.size import run_size

    run_size(bundle, candidates, sample, users, requests_per_s, replay=replay)


@app.command(show=False)
def erase(*users: str) -> None:
    """Say where this command went.

    Raises:
        UsageError: always.
    """
    raise UsageError(f"users are erased by `python -m beam_jobs erase {' '.join(users) or 'USER'}`")


@app.command
def demo(*, recipe: str | None = None) -> int:
    """Start a server, send it one request, show the answer.

    Args:
        recipe: the recipe that was trained; a next-item recipe is not served, which is said.
    """
    from modeling import recipes
    from serving.demo import run_demo

    if recipe is not None and isinstance(recipes.load(recipe), recipes.NextItemRecipe):
        print(f"nothing to serve: {recipes.about(recipes.load(recipe))}")
        return 0
    return run_demo()


def main() -> int:
    """Dispatch."""
    return cli.run(app)


if __name__ == "__main__":
    sys.exit(main())
