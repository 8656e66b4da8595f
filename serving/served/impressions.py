"""Served lists as impressions in the dataset's own raw log: `python -m serving impressions LOG FILE`.

The file has the columns and the format that the dataset declares for its events, and lies where the
declaration looks for them, so the next run of the `events` job reads it as any other. An answer that was
logged carries its `request_id`; events that come back under it are the labels.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.parquet as pq

from feature_repo import datasets
from feature_repo.contract.contract import EVENT_ID, REQUEST_ID, Contract
from feature_repo.contract.schema import EVENT_TIMESTAMP, TIME_UNITS, Source
from feature_repo.errors import ExpectedError
from feature_repo.home.erased import erased_of
from feature_repo.raw import parse
from feature_repo.settings import Settings

# The impression feature that says where in the list an item stood, 0 for the first
POSITION = "position"
# Takes a logged request and a place in its list
Value = Callable[[dict[str, Any], int], Any]


class ImpressionsError(ExpectedError, ValueError):
    """The dataset's raw log cannot hold what was served."""


def write_impressions(settings: Settings, log: pa.Table, file: Path, most: int | None) -> int:
    """Write every item that was served as a row of the raw log; returns how many.

    Args:
        log: `served_log.read_log`; answers without scores are left out, because no model ranked them.
        file: a new one below MEMOIR_DATA, where the declaration finds it.
        most: of each list, from its top; default: all of it.

    Raises:
        ImpressionsError: the log needs what was not logged, or the file is there, or not one that the
            declaration reads.
    """
    dataset = datasets.load(settings.dataset)
    contract = datasets.load_contract(settings.dataset)
    columns = values_of(contract)
    if file.exists():
        raise ImpressionsError(f"{file} is there already: name a new file")
    kept = erased_of(settings.home).without(log, contract.user.join_key).to_pylist()
    rows = [
        {name: value(request, place) for name, value in columns.items()}
        for request in kept
        if request["scores"]
        for place in range(len(request["ranked"][:most]))
    ]
    source = dataset.spec.events
    file.parent.mkdir(parents=True, exist_ok=True)
    _write(source, list(columns), rows, file)
    # The check follows the writing, because a glob finds only a file that is there.
    if str(file.resolve()) not in {str(Path(f).resolve()) for f in dataset.files(settings.data)}:
        file.unlink()
        raise ImpressionsError(
            f"{file} is not among the files that {settings.dataset} declares for its events ({source.path!r} below "
            "MEMOIR_DATA): name one that is, or declare a folder or a glob"
        )
    return len(rows)


def values_of(contract: Contract) -> dict[str, Value]:
    """By raw column: what it holds of an item that was served.

    Raises:
        ImpressionsError: it must hold what was not logged.
    """
    spec = contract.spec
    source = spec.events
    # 1. Refuse a dataset whose raw rows hold what no answer's log has.
    if not spec.shown:
        raise ImpressionsError(
            f"{spec.name} declares no action for impressions: set SPEC.shown, and requests by request_id"
        )
    lacking = [*source.derived, *(c.name for c in source.raw)]
    lacking += [c.name for c in spec.event_features if not c.nullable]
    lacking += [c.name for c in spec.shown_features if not c.nullable and c.name != POSITION]
    lacking += [c.name for c in (spec.user_features if spec.users is None else ())]
    lacking += [c.name for c in (spec.item_features if spec.items is None else ())]
    if lacking or source.at_least is not None:
        raise ImpressionsError(
            f"rows of {spec.name}'s raw log need what no log of answers has: {', '.join(lacking) or 'a rating'}"
        )
    # 2. Map each column of the raw log to a value of the logged request.
    logged = {c.name for c in spec.context_features}
    known: dict[str, Value] = {
        "user_id": lambda request, place: request[contract.user.join_key],
        "item_id": lambda request, place: request["ranked"][place],
        EVENT_TIMESTAMP: lambda request, place: time_as_declared(
            source, request["request_timestamp"]
        ),
        REQUEST_ID.name: lambda request, place: request["request_id"],
        EVENT_ID.name: lambda request, place: f"{request['request_id']}-{place}",
        POSITION: lambda request, place: place,
    }
    found: dict[str, Value] = {}
    for column, name in parse.wanted(spec, "events"):
        if column.name in known:
            found[name] = known[column.name]
        elif column.name in logged:
            # A lambda in this loop would read the last column's name; the function binds this one.
            found[name] = _logged(column.name)
        else:
            # Only nullable columns are left here: the check above refuses all others.
            found[name] = lambda request, place: None
    # What happened: that it was shown, and nothing else yet.
    if source.action:
        named = {ours: theirs for theirs, ours in source.actions.items()}
        shown = named.get(spec.shown, spec.shown)
        found[source.action] = lambda request, place: shown
    for theirs in source.flags.values():
        found[theirs] = lambda request, place: 0
    if source.zone_column:
        found[source.zone_column] = lambda request, place: "UTC"
    return found


def _logged(name: str) -> Value:
    return lambda request, place: request[name]


def time_as_declared(source: Source, at: datetime) -> Any:
    """A time as the raw log writes it: with its offset, or in UTC beside a column of zones."""
    if source.time_format:
        zone = UTC if source.zone_column else ZoneInfo(source.zone)
        return at.astimezone(zone).strftime(source.time_format)
    if source.time_unit is None:
        return at.isoformat()
    return int(at.timestamp() * 1_000_000 / TIME_UNITS[source.time_unit])


def _write(source: Source, names: list[str], rows: list[dict[str, Any]], file: Path) -> None:
    kind = source.format or {".parquet": "parquet", ".json": "json", ".jsonl": "json"}.get(
        file.suffix, "csv"
    )
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif kind == "json":
        with file.open("w", encoding=source.encodings[0]) as out:
            out.writelines(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
    else:
        _write_csv(source, names, rows, file)


def _write_csv(source: Source, names: list[str], rows: list[dict[str, Any]], file: Path) -> None:
    if len(source.delimiter) != 1:
        raise ImpressionsError(f"no file is written with the delimiter {source.delimiter!r}")
    order = list(source.header) or names
    with file.open("w", newline="", encoding=source.encodings[0]) as out:
        out.write("\n" * source.skip)
        writer = csv.writer(
            out,
            delimiter=source.delimiter,
            lineterminator="\n",
            quoting=csv.QUOTE_MINIMAL if source.quote else csv.QUOTE_NONE,
            quotechar=source.quote or None,
            escapechar=source.escape or None,
            doublequote=not source.escape,
        )
        if not source.header:
            writer.writerow(order)
        writer.writerows(_texts(source, order, rows))


def _texts(source: Source, order: list[str], rows: list[dict[str, Any]]) -> Iterator[list[Any]]:
    ours = {theirs: name for name, theirs in source.columns.items()}
    signs = [source.decimals.get(ours.get(name, name), source.decimal) for name in order]
    for row in rows:
        values = zip((row.get(name) for name in order), signs, strict=True)
        yield [
            str(value).replace(".", sign)
            if isinstance(value, float)
            else source.list_separator.join(map(str, value))
            if isinstance(value, list)
            else value
            for value, sign in values
        ]
