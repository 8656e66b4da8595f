"""`python -m feature_repo apply | store_config | dictionary | tokens`: register definitions, say where things are."""

from __future__ import annotations

import argparse
import hashlib

from feature_repo.settings import CHECKOUT, Settings


def main() -> None:
    """Dispatch."""
    parser = argparse.ArgumentParser(prog="python -m feature_repo", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("apply", help="`feast apply` for the dataset in force; skipped when nothing changed")
    commands.add_parser("store_config", help="path of the Feast configuration in force")
    commands.add_parser("dictionary", help="every table and column of the dataset in force")
    tokens = commands.add_parser("tokens", help="token versions: coverage, who accepts them; and removal of old ones")
    tokens.add_argument("--retire", action="store_true", help="remove versions that no server can still need")
    tokens.add_argument(
        "--longest_life_days",
        type=float,
        default=7.0,
        help="how long a server may go on with a bundle that is no longer live (default 7)",
    )
    arguments = parser.parse_args()
    command, settings = arguments.command, Settings.from_env()
    if command == "apply":
        _apply(settings)
    elif command == "store_config":
        from feature_repo.store import yaml_path

        print(yaml_path(settings))
    elif command == "tokens":
        _tokens(settings, arguments.retire, arguments.longest_life_days)
    else:
        _dictionary(settings)


def _apply(settings: Settings) -> None:
    from rich.console import Console

    from feature_repo import datasets
    from feature_repo.catalogue import Catalogue
    from feature_repo.store import REPO, feast_apply, local_store_files, store_digest, yaml_path

    catalogue, config = Catalogue(settings.catalogue_url), yaml_path(settings)
    content = hashlib.sha256(datasets.load_contract(settings.dataset).fingerprint.encode())
    content.update((REPO / "feature_definitions.py").read_bytes())
    content.update(f"{store_digest(settings)} {settings.home}".encode())
    inputs = content.hexdigest()
    if all(file.exists() for file in local_store_files(settings)) and catalogue.is_current(
        settings.dataset, "apply", inputs
    ):
        print("feast apply: up to date")
        return
    with catalogue.stage(settings.dataset, "apply", inputs), Console().status("feast apply"):
        printed = feast_apply(settings)
    print(printed.strip())
    shown = config.relative_to(CHECKOUT) if config.is_relative_to(CHECKOUT) else config
    print(f"feast apply: registered {settings.dataset} with {shown}")


def _tokens(settings: Settings, retire: bool, longest_life_days: float) -> None:
    from datetime import timedelta

    from feature_repo import datasets
    from feature_repo.catalogue import Catalogue

    catalogue, dataset = Catalogue(settings.catalogue_url), settings.dataset
    old = catalogue.retirable_tokens(dataset, timedelta(days=longest_life_days))
    try:
        live = catalogue.accepted_tokens(catalogue.live_bundle(dataset).digest)
    except LookupError:
        live = None
    for row in catalogue.token_versions(dataset):
        state = "live" if row.fingerprint == live else "no longer needed" if row.fingerprint in old else "kept"
        size = f"{row.num_tokens} × {row.width}"
        print(
            f"{row.fingerprint}  {row.recipe}, {size}, {row.covered:,} of {row.users:,} users ({row.coverage:.1%}), {state}"
        )
    if retire and old:
        from feature_repo.online_tokens import CannotRemoveError, OnlineTokens
        from feature_repo.store import open_store
        from feature_repo.token_log import drop_version

        contract = datasets.load_contract(dataset)
        online = OnlineTokens(open_store(settings), contract)
        for version in old:
            rows = drop_version(contract, settings.home, version)  # refused while the job is under way
            try:
                removed = online.remove(version)
            except CannotRemoveError as error:
                print(error)
                continue
            catalogue.forget_tokens(dataset, version)
            print(f"removed {version}: {removed:,} users online, {rows:,} rows of the token log")
    elif retire:
        print("nothing to remove")


def _dictionary(settings: Settings) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    from feature_repo import datasets

    contract = datasets.load_contract(settings.dataset)
    console = Console()
    console.print(f"{contract.spec.title}, contract {contract.fingerprint}")
    for table in contract.tables:
        shown = RichTable(title=f"{table.name}: {table.doc}", title_justify="left", show_header=True)
        for heading in ("column", "type", "unit", "meaning"):
            shown.add_column(heading)
        for column in table.all_columns:
            shown.add_row(column.name, column.dtype.value, column.unit, column.doc)
        console.print(shown)


if __name__ == "__main__":
    main()
