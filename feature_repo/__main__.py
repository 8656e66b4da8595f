"""`python -m feature_repo new | check | apply | back_up | store_config | dictionary | tokens`."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from feature_repo import cli
from feature_repo.errors import UsageError
from feature_repo.settings import CHECKOUT, IS_INSTALLED, WORK, Settings

if TYPE_CHECKING:
    from feature_repo.home.catalogue import Catalogue

app = cli.app(
    "feature_repo",
    "What a feature is: check a dataset's declaration, register it with Feast, read the data dictionary.",
)


@app.command
def check() -> int:
    """Show in seconds what the dataset in force declares and holds: slips of the declaration, ten events,
    dead letters, requests, labels, and what a ranker reads.
    """
    from feature_repo import datasets
    from feature_repo.scaffold.preview import preview

    settings = Settings.from_env()
    dataset = datasets.load(settings.dataset)
    print(f"{settings.dataset}: {dataset.spec.title}, contract {dataset.contract.fingerprint}")
    found = preview(dataset, settings.data)
    for line in found.lines():
        print(line)
    wrong = found.problems()
    for line in wrong:
        print(f"to mend: {line}")
    if not wrong:
        print("nothing to mend")
    return int(bool(wrong))


@app.command
def new(
    name: str,
    *,
    events: str,
    items: str | None = None,
    users: str | None = None,
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    action: str | None = None,
    force: bool = False,
) -> int:
    """Guess from a log's files what each column is, say why, and write a dataset module to correct.
    What is not sure has `# ?` behind it, here and there. Ends with 1 where no column was
    taken for user, item or time: the draft then has "?" in their place.

    Args:
        name: name of the dataset: small letters, digits and underscores.
        events: file, folder or glob of the log.
        items: file, folder or glob of the table of items.
        users: file, folder or glob of the table of users.
        user: column of the events that names the user; default: the one that looks like it.
        item: column of the events that names the item.
        time: column of the events with the time.
        action: column of the events with the action, in words or as a rating.
        force: overwrite a module of that name.
    """
    from feature_repo import datasets
    from feature_repo.scaffold import suggest
    from feature_repo.scaffold.suggest import UNKNOWN
    from feature_repo.scaffold.suggest_text import module_text

    # 1. Refuse before any file is read.
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UsageError(f"NAME expects small letters, digits and underscores, not {name!r}")
    # Of an installed package, nothing is written among other packages.
    path = (WORK if IS_INSTALLED else Path(datasets.__path__[-1])) / f"{name}.py"
    if path.exists() and not force:
        raise UsageError(f"{path} is there already: choose another name, or pass --force")
    # 2. Look at the files.
    folder, below = _common_folder([file for file in (events, items, users) if file])
    given = {"user": user, "item": item, "time": time, "action": action}
    summary = {role: column for role, column in given.items() if column}
    log = suggest.log_of(
        folder, below[events], users and below[users], items and below[items], summary
    )
    cuts = ("?", "?") if "time" in log.missing else suggest.periods(log.events, folder)
    # 3. Show what each column was taken for, then write the draft.
    for guess in log.guesses:
        print(f"  {guess.column}: {guess.line}")
    for doubt in log.doubts():
        print(f"  # ? {doubt}")
    path.write_text(module_text(name, log, cuts))
    if log.missing:
        flags = " ".join(f"--{role} COLUMN" for role in log.missing)
        print(
            f"wrote {path} with {UNKNOWN!r} in the place of {' and '.join(log.missing)}: no column was taken for it; "
            f"there are {log.events.rows.column_names}. Name it there, or again with {flags} --force"
        )
        return 1
    print(
        f"wrote {path}\ncorrect it, then:\n"
        f"  export MEMOIR_DATASET={path if IS_INSTALLED else name} MEMOIR_DATA={folder}\n"
        "  python -m feature_repo check\n"
        f"  {'python -m beam_jobs refresh' if IS_INSTALLED else 'make demo'}"
    )
    return 0


def _common_folder(files: list[str]) -> tuple[str, dict[str, str]]:
    """The folder that holds all files, and each file's path below it."""
    if remote := [file for file in files if "://" in file]:
        raise UsageError(
            f"new looks at files of this machine, not at {remote[0]}: copy a sample here"
        )
    at = {file: os.path.abspath(file) for file in files}
    folder = os.path.commonpath([os.path.dirname(path) for path in at.values()])
    return folder, {file: os.path.relpath(path, folder) for file, path in at.items()}


@app.command
def apply(*, force: bool = False) -> None:
    """`feast apply` for the dataset in force; skipped when nothing changed and the online store has
    its tables.

    Args:
        force: register again, changed or not.
    """
    from rich.console import Console

    from feature_repo import datasets
    from feature_repo.home.catalogue import Catalogue
    from feature_repo.store.store import (
        REGISTRY,
        feast_apply,
        local_file,
        missing_tables,
        store_digest,
        yaml_path,
    )

    settings = Settings.from_env()
    contract = datasets.load_contract(settings.dataset)
    catalogue = Catalogue(settings.catalogue_url)
    config = yaml_path(settings)
    # The registry depends on the contract, on every file that Feast scans, and on where the stores are.
    content = hashlib.sha256(contract.fingerprint.encode())
    for file in definition_files():
        content.update(file.name.encode() + file.read_bytes())
    # Feast's sources hold absolute paths
    content.update(f"{store_digest(settings)} {settings.home}".encode())
    inputs = content.hexdigest()
    # The view `token_rows` is for training alone and has no online table.
    served = [table.name for table in contract.views if table.name != "token_rows"]
    current = catalogue.is_current(settings.dataset, "apply", inputs)
    if current and not force and not missing_tables(settings, served):
        print("feast apply: up to date")
        return
    # Feast prints a page for each apply: it goes to a log, and a line to the terminal.
    with (
        catalogue.stage(settings.dataset, "apply", inputs),
        Console(stderr=True).status("feast apply"),
    ):
        _forget_foreign_registry(settings)
        printed = feast_apply(settings)
    log = settings.path("feast_apply.log")
    log.write_text(printed)
    summary = changes_of(printed)
    shown = config.relative_to(CHECKOUT) if config.is_relative_to(CHECKOUT) else config
    print(
        f"feast apply: registered {settings.dataset} with {shown}: {summary}; what Feast said is in {log}"
    )
    assert settings.profile == "production" or local_file(settings, REGISTRY).exists()


def changes_of(printed: str) -> str:
    """Return what an apply did, out of what Feast printed. For SQL registries it prints no plan, but which views it
    deploys.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", printed)
    kinds = {
        "created": r"^Created ",
        "updated": r"^Updated ",
        "deleted": r"^Deleted ",
        "views deployed": r"^Deploying infrastructure for ",
        "views removed": r"^Removing infrastructure for ",
    }
    counts = {name: len(re.findall(sign, plain, re.MULTILINE)) for name, sign in kinds.items()}
    counted = ", ".join(f"{number} {name}" for name, number in counts.items() if number)
    if not counted and "No changes to registry" in plain:
        return "the registry holds it already"
    return counted or "done"


def definition_files() -> list[Path]:
    """Files that `feast apply` imports: ours, and any that a person has put beside it."""
    from feature_repo.store.store import REPO

    ignored = {
        line
        for line in (REPO / ".feastignore").read_text().splitlines()
        if line and not line.startswith("#")
    }
    return sorted(file for file in REPO.glob("*.py") if file.name not in ignored)


def _forget_foreign_registry(settings: Settings) -> None:
    """Drop a registry that came with a copied home: from it, Feast would drop the online tables of
    the original.
    """
    from feature_repo.store.store import REGISTRY, local_file, tables_elsewhere

    if settings.profile == "local" and (elsewhere := tables_elsewhere(settings)):
        print(
            f"feast apply: the registry was copied from a home with tables in {elsewhere[0]}; it is made anew here"
        )
        local_file(settings, REGISTRY).unlink()


@app.command
def back_up(target: str) -> None:
    """Copy the home of the dataset in force, whole, while jobs, training and servers go on. What acknowledged events the
    online store alone holds is not in it: `python -m beam_jobs events` brings them first.

    Args:
        target: a folder that is not there yet.
    """
    from feature_repo.home import back_up as copying

    settings = Settings.from_env()
    print(f"{target}: {copying.back_up(settings, Path(target))}")


@app.command
def store_config() -> None:
    """Path of the Feast configuration in force, for `feast -c feature_repo -f PATH`."""
    from feature_repo.store.store import yaml_path

    print(yaml_path(Settings.from_env()))


@app.command
def tokens(*, retire: bool = False, longest_life_days: float = 7.0) -> None:
    """Token versions: coverage, who accepts them; and removal of old ones.

    Args:
        retire: remove versions that no server can still need.
        longest_life_days: how long a server may go on with a bundle that is no longer live.
    """
    from feature_repo.home.catalogue import Catalogue

    # The limit is a century; in this form the test refuses NaN as well.
    if not 0 <= longest_life_days < 36_525:
        raise UsageError(f"--longest_life_days expects a number of days, not {longest_life_days}")
    settings = Settings.from_env()
    catalogue = Catalogue(settings.catalogue_url)
    dataset = settings.dataset
    # 1. Ask which versions are no longer needed, and which one the live bundle accepts.
    old = catalogue.retirable_tokens(dataset, timedelta(days=longest_life_days))
    try:
        live = catalogue.accepted_tokens(catalogue.live_bundle(dataset).digest)
    except LookupError:
        live = None
    # 2. Show a line for each version.
    for row in catalogue.token_versions(dataset):
        if row.fingerprint == live:
            state = "live"
        else:
            state = "no longer needed" if row.fingerprint in old else "kept"
        size = f"{row.num_tokens} × {row.width}"
        print(
            f"{row.fingerprint}  {row.recipe}, {size}, {row.covered:,} of {row.users:,} users ({row.coverage:.1%}), {state}"
        )
    # 3. Remove old versions only when asked: their tokens would have to be computed anew.
    if retire and old:
        _retire(settings, catalogue, old)
    elif retire:
        print("nothing to remove")


def _retire(settings: Settings, catalogue: Catalogue, versions: list[str]) -> None:
    from feature_repo import datasets
    from feature_repo.history.token_log import JOB, drop_version
    from feature_repo.home.tables import JobFolder
    from feature_repo.store.online_tokens import CannotRemoveError, OnlineTokens
    from feature_repo.store.store import note_epoch, open_store

    contract = datasets.load_contract(settings.dataset)
    online = OnlineTokens(open_store(settings), contract)
    for version in versions:
        # Refused while the job is under way
        rows = drop_version(contract, settings.home, version)
        try:
            removed = online.remove(version)
        except CannotRemoveError as error:
            print(error)
            continue
        catalogue.forget_tokens(settings.dataset, version)
        print(f"removed {version}: {removed:,} users online, {rows:,} rows of the token log")
    note_epoch(settings, JOB, JobFolder(settings.home, JOB).require().run_id)


@app.command
def dictionary() -> None:
    """Every table and column of the dataset in force."""
    from rich.console import Console
    from rich.table import Table as RichTable

    from feature_repo import datasets

    contract = datasets.load_contract(Settings.from_env().dataset)
    console = Console()
    console.print(f"{contract.spec.title}, contract {contract.fingerprint}")
    for table in contract.tables:
        shown = RichTable(
            title=f"{table.name}: {table.doc}", title_justify="left", show_header=True
        )
        for heading in ("column", "type", "unit", "meaning"):
            shown.add_column(heading)
        for column in table.all_columns:
            shown.add_row(column.name, column.dtype.value, column.unit, column.doc)
        console.print(shown)


def main() -> int:
    """Dispatch."""
    return cli.run(app)


if __name__ == "__main__":
    sys.exit(main())
