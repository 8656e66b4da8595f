"""Validation of a dataset's declaration, and its form as JSON. Standard library only.

A slip is named with its field, what it holds and what is possible; all of them at once, because a person
who mends one at a time has to run the command for each.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from feature_repo.contract.contract import EVENT_ID, REQUEST_ID, Contract
from feature_repo.contract.schema import (
    EVENT_TIMESTAMP,
    KEY_TYPES,
    NUMBER_TYPES,
    TIME_UNITS,
    TYPES_OF_KIND,
    WHOLE_TYPES,
    Column,
    DatasetSpec,
    DType,
    Examples,
    Kind,
    Memory,
    OwnView,
    Requests,
    Source,
    Task,
)
from feature_repo.errors import nearest

COLUMN_FIELDS = (
    "event_features",
    "user_features",
    "item_features",
    "context_features",
    "shown_features",
)
OUR_VIEWS = frozenset(
    {
        "events",
        "dead_letters",
        "user_profile",
        "item_profile",
        "user_history",
        "user_stats",
        "item_stats",
        "summary_tokens",
        "token_rows",
        "token_dead_letters",
        "training_examples",
        "store_epoch",
    }
)
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def problems(spec: DatasetSpec) -> list[str]:
    """Yield a line for each slip of a declaration."""
    return [
        *_wrong_ids_and_actions(spec),
        *_wrong_columns(spec),
        *_wrong_names(spec),
        *_wrong_memory(spec),
        *_wrong_tasks(spec),
        *_wrong_requests(spec),
        *_wrong_sources(spec),
        *_wrong_views(spec),
        *_wrong_limits(spec),
    ]


def groups(spec: DatasetSpec) -> list[tuple[str, tuple[Column, ...]]]:
    """Every declared feature by the field that declares it."""
    own = [(f"views {view.name!r}", view.columns) for view in spec.views]
    return [*((name, getattr(spec, name)) for name in COLUMN_FIELDS), *own]


def _wrong_ids_and_actions(spec: DatasetSpec) -> Iterator[str]:
    for field_name, dtype in (("user_id", spec.user_id), ("item_id", spec.item_id)):
        if dtype not in KEY_TYPES:
            yield f"{field_name} is {dtype.value}; an id is one of {[t.value for t in KEY_TYPES]}"
    if not spec.actions or len(set(spec.actions)) < len(spec.actions):
        yield f"actions is {spec.actions}; name at least one, each once"
    elif spec.shown:
        if spec.shown not in spec.actions:
            yield (
                f"shown names {spec.shown!r}; there are "
                f"{list(spec.actions)}{nearest(spec.shown, spec.actions)}"
            )
        if spec.shown == spec.actions[0]:
            yield (
                f"shown is {spec.shown!r}, the first action, which statistics are about; name "
                "another one first"
            )


def _wrong_columns(spec: DatasetSpec) -> Iterator[str]:
    for group, columns in groups(spec):
        for column in columns:
            name = f"{group} {column.name!r}"
            if column.dtype is DType.BYTES:
                yield f"{name} is bytes, which no table of features holds"
            if not NAME.fullmatch(column.name):
                yield (
                    f"{name}: expected a name of letters, digits and underscores; map it by "
                    "Source.columns"
                )
            yield from _wrong_kind(name, column)
            if group in ("context_features", "shown_features") and column.kind is None:
                yield f"{name} has no kind; what no ranker reads need not be declared"


def _wrong_kind(name: str, column: Column) -> Iterator[str]:
    kind = column.kind
    if kind is not None and column.dtype not in TYPES_OF_KIND[kind]:
        yield (
            f"{name} is {column.dtype.value} and of kind {kind.value}, which is one of "
            f"{[t.value for t in TYPES_OF_KIND[kind]]}"
        )
    if column.dtype is DType.FLOAT32_LIST and not column.max_length:
        yield f"{name} is a vector; say how long it is by max_length"
    if column.values is not None and column.dtype not in (*WHOLE_TYPES, DType.STRING):
        yield (
            f"{name} is {column.dtype.value} and has values={column.values}; only texts and "
            "whole numbers may"
        )
    if column.hashed is not None and (kind not in (Kind.CATEGORY, Kind.BAG) or column.hashed < 2):
        yield f"{name} has hashed={column.hashed}; categories and bags may have 2 rows or more"
    if column.buckets is not None and (kind is not Kind.NUMBER or column.buckets < 2):
        yield f"{name} has buckets={column.buckets}; numbers may have 2 or more"


def _wrong_names(spec: DatasetSpec) -> Iterator[str]:
    items = [c.name for c in spec.item_features if c.dtype is DType.STRING]
    numbers = [c.name for c in spec.event_features if c.dtype in NUMBER_TYPES]
    lists = (DType.STRING_LIST, DType.FLOAT32_LIST)
    events = [c.name for c in spec.event_features if c.dtype not in lists]
    for field_name, named, known in (
        ("item_title", (spec.item_title,) if spec.item_title else (), items),
        ("stat_value", (spec.stat_value,) if spec.stat_value else (), numbers),
        (
            "event_identity",
            spec.event_identity,
            ["user_id", "item_id", "action", EVENT_TIMESTAMP, EVENT_ID.name, *events],
        ),
    ):
        for name in named:
            if name not in known:
                yield f"{field_name} names {name!r}; there are {known}{nearest(name, known)}"


def _wrong_memory(spec: DatasetSpec) -> Iterator[str]:
    memory = spec.memory
    known = [c.name for c in spec.item_features if c.kind in (Kind.CATEGORY, Kind.BAG)]
    for name in memory.by:
        if name not in known:
            yield (
                f"memory.by names {name!r}; there are the categories and bags of items "
                f"{known}{nearest(name, known)}"
            )
    single = [c.name for c in spec.item_features if c.kind is Kind.CATEGORY and c.name in memory.by]
    for pair in memory.pairs:
        if len(set(pair)) != 2 or not set(pair) <= set(single):
            yield f"memory.pairs has {pair}; expected two different categories among memory.by, of {single}"
    if len(set(map(frozenset, memory.pairs))) < len(memory.pairs):
        yield f"memory.pairs are {memory.pairs}; name each pair once"
    for pair in memory.pairs:
        if "_".join(pair) in memory.by:
            yield f"memory.pairs has {pair}, whose name {'_'.join(pair)!r} is a column of memory.by: rename the column"
    if not all(0 < days < math.inf for days in memory.half_lives_days):
        yield f"memory.half_lives_days is {memory.half_lives_days}; expected days, each more than 0"
    if not 1 <= memory.kibibytes <= 1024:
        yield f"memory.kibibytes is {memory.kibibytes}; expected 1 to 1,024"


def _wrong_tasks(spec: DatasetSpec) -> Iterator[str]:
    names = [task.name for task in spec.tasks]
    if not names or len(set(names)) < len(names):
        yield f"tasks are {names}; name at least one, each once"
    for number, task in enumerate(spec.tasks):
        if not NAME.fullmatch(task.name):
            yield f"task {task.name!r}: expected a name of letters, digits and underscores"
        if task.action not in spec.actions:
            yield (
                f"task {task.name!r} is about {task.action!r}; there are "
                f"{list(spec.actions)}{nearest(task.action, spec.actions)}"
            )
        # Only a task before it may be named: otherwise two tasks could be given each other.
        if task.given and task.given not in names[:number]:
            yield (
                f"task {task.name!r} is given {task.given!r}; name a task before it, of "
                f"{names[:number]}"
            )
        if not task.weight > 0:
            yield f"task {task.name!r} has weight {task.weight}; expected more than 0"
    for name, weight in spec.rank_by:
        if name not in names:
            yield f"rank_by names {name!r}; there are {names}{nearest(name, names)}"
        if not weight > 0:
            yield f"rank_by gives {name!r} the weight {weight}; expected more than 0"


def _wrong_requests(spec: DatasetSpec) -> Iterator[str]:
    rules = spec.requests
    # 1. Check when validation and test begin.
    times = {}
    for field_name in ("validation_from", "test_from"):
        text = getattr(rules, field_name)
        try:
            times[field_name] = datetime.fromisoformat(text)
        except (ValueError, TypeError):
            yield (
                f"requests.{field_name} is {text!r}; expected an ISO time such as "
                "'2011-11-10T00:00:00+00:00'"
            )
            continue
        if times[field_name].tzinfo is None:
            yield f"requests.{field_name} is {text!r}, without a zone; write +00:00 behind it"
    # Python compares no time with a zone to one without: both must be right first.
    if (
        len(times) == len([t for t in times.values() if t.tzinfo]) == 2
        and times["validation_from"] >= times["test_from"]
    ):
        yield (
            f"requests.validation_from {rules.validation_from} is not before test_from "
            f"{rules.test_from}"
        )
    # 2. Check the negatives: they are drawn only where the log has none.
    for field_name in ("train_negatives_per_positive", "eval_negatives"):
        number = getattr(rules, field_name)
        drawn = rules.examples is Examples.ACTIONS
        if drawn and number < 1:
            yield (
                f"requests.{field_name} is {number}; examples of actions want 1 or more, for "
                "the log has no negatives"
            )
        if not drawn and number:
            yield (
                f"requests.{field_name} is {number}; {rules.examples.value} have labels of "
                "their own, and nothing is drawn"
            )
    # 3. Check how large a request may be, and what its events share.
    if rules.most < 1:
        yield f"requests.most is {rules.most}; expected 1 or more"
    if rules.by not in ("time", "request_id"):
        yield f"requests.by is {rules.by!r}; expected 'time' or 'request_id'"


def _wrong_sources(spec: DatasetSpec) -> Iterator[str]:
    ours = {"user_id", "item_id", EVENT_TIMESTAMP, "action", REQUEST_ID.name, EVENT_ID.name}
    ours |= {c.name for name in COLUMN_FIELDS for c in getattr(spec, name)}
    for field_name in ("events", "users", "items"):
        source: Source | None = getattr(spec, field_name)
        if source is None:
            continue
        # 1. How values are written.
        if source.time_unit not in (None, *TIME_UNITS):
            yield (
                f"{field_name}.time_unit is {source.time_unit!r}; expected one of "
                f"{tuple(TIME_UNITS)}"
            )
        if source.format not in ("", "csv", "json", "parquet"):
            yield f"{field_name}.format is {source.format!r}; expected 'csv', 'json' or 'parquet'"
        if source.decimal not in (".", ","):
            yield f"{field_name}.decimal is {source.decimal!r}; expected '.' or ','"
        if source.time_format and source.time_unit:
            yield f"{field_name} has a time_format and a time_unit; a time is text or a number"
        if source.skip < 0:
            yield f"{field_name}.skip is {source.skip}; expected a number of lines"
        for name, sign in source.decimals.items():
            if name not in ours:
                yield (
                    f"{field_name}.decimals names {name!r}; there are "
                    f"{sorted(ours)}{nearest(name, ours)}"
                )
            if sign not in (".", ","):
                yield f"{field_name}.decimals of {name!r} is {sign!r}; expected '.' or ','"
        if not source.delimiter:
            yield (
                f"{field_name}.delimiter is empty; expected one character or more, such as "
                "',' or '::'"
            )
        try:
            ZoneInfo(source.zone)
        except (ZoneInfoNotFoundError, ValueError):
            yield (
                f"{field_name}.zone is {source.zone!r}; expected a zone such as 'UTC' or "
                "'Europe/London'"
            )
        # 2. Names that must be declared elsewhere.
        for name in source.columns:
            if name not in ours:
                yield (
                    f"{field_name}.columns names {name!r}; there are "
                    f"{sorted(ours)}{nearest(name, ours)}"
                )
        for name in (*source.actions.values(), *source.flags):
            if name not in spec.actions:
                yield (
                    f"{field_name} names the action {name!r}; there are "
                    f"{list(spec.actions)}{nearest(name, spec.actions)}"
                )
        if source.deleted and field_name != "events":
            yield f"{field_name}.deleted is {source.deleted!r}; only lines of events strike something"
    # 3. What says that an action happened, or did not.
    source = spec.events
    ways = [name for name in ("action", "flags") if getattr(source, name)]
    if len(ways) > 1:
        yield (
            f"events declares {' and '.join(ways)}; an action is said by one column, or by "
            "one for each"
        )
    if source.deleted and not spec.event_identity:
        yield (
            f"events.deleted is {source.deleted!r}, and nothing says which event a line strikes: "
            "name it by event_identity"
        )
    if source.at_least is not None and (not source.action or len(spec.actions) != 2):
        yield (
            "events.at_least needs events.action, their number, and two actions: from there "
            "on, and below"
        )


def _wrong_views(spec: DatasetSpec) -> Iterator[str]:
    for view in spec.views:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", view.name):
            yield f"view {view.name!r}: expected a name of small letters, digits and underscores"
        if view.entity not in ("user", "item"):
            yield f"view {view.name!r} is of {view.entity!r}; expected 'user' or 'item'"
        if not view.columns:
            yield f"view {view.name!r} has no column; Feast has no view without a feature"
        if view.ttl_days < 0:
            yield f"view {view.name!r} has ttl_days={view.ttl_days}; expected 0, for ever, or more"
        if view.name in OUR_VIEWS:
            yield f"view {view.name!r} has the name of one of Memoir's tables: {sorted(OUR_VIEWS)}"
    names = [view.name for view in spec.views]
    if len(set(names)) < len(names):
        yield f"views are {names}; name each once"


def _wrong_limits(spec: DatasetSpec) -> Iterator[str]:
    if not 0 <= spec.max_bad_fraction <= 1:
        yield f"max_bad_fraction is {spec.max_bad_fraction}; it is a share, from 0 to 1"
    if spec.num_history_online < 1:
        yield f"num_history_online is {spec.num_history_online}; keep at least one event"


def is_iso_time(text: str) -> bool:
    """Return whether a text is an ISO time, with or without a zone."""
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def plain(spec: DatasetSpec) -> dict[str, Any]:
    """A declaration as JSON holds it, to travel with what was made under it. Where raw tables lie is
    left out.
    """
    found = asdict(spec)
    for name in ("events", "users", "items", "accept"):
        del found[name]
    made: dict[str, Any] = json.loads(json.dumps(found))
    return made


def spec_of(stored: Mapping[str, Any]) -> DatasetSpec:
    """The declaration that `plain` stored, without its sources.

    Raises:
        ValueError, TypeError, KeyError: another version stored it.
    """

    def columns(listed: list[dict[str, Any]]) -> tuple[Column, ...]:
        made = []
        for raw in listed:
            values = None if raw["values"] is None else tuple(raw["values"])
            kind = None if raw["kind"] is None else Kind(raw["kind"])
            made.append(
                Column(**{**raw, "dtype": DType(raw["dtype"]), "values": values, "kind": kind})
            )
        return tuple(made)

    # 1. Restore columns and ids, whose types JSON holds as text.
    found: dict[str, Any] = dict(stored)
    for name in COLUMN_FIELDS:
        found[name] = columns(found[name])
    for name in ("user_id", "item_id"):
        found[name] = DType(found[name])
    # 2. Restore what has a class, and JSON holds as objects.
    requests = found["requests"]
    found["requests"] = Requests(**{**requests, "examples": Examples(requests["examples"])})
    found["tasks"] = tuple(Task(**task) for task in found["tasks"])
    found["views"] = tuple(
        OwnView(**{**view, "columns": columns(view["columns"])}) for view in found["views"]
    )
    memory = found["memory"]
    found["memory"] = Memory(
        tuple(memory["by"]),
        tuple(memory["half_lives_days"]),
        memory["kibibytes"],
        tuple((one, other) for one, other in memory["pairs"]),
    )
    # 3. Restore tuples: `lacks` compares them, and no list equals a tuple.
    found["rank_by"] = tuple((name, weight) for name, weight in found["rank_by"])
    for name in ("actions", "event_identity"):
        found[name] = tuple(found[name])
    # A field of another version is refused, not dropped: a model may depend on it.
    if unknown := set(found) - {f.name for f in fields(DatasetSpec)}:
        raise ValueError(f"unknown fields {sorted(unknown)}")
    return DatasetSpec(**found, events=Source(""))


def lacks(needed: Contract, found: Contract) -> list[str]:
    """Return what a model of the contract `needed` reads and tables of the contract `found` lack.
    Empty: it can go on.

    More features, or more actions behind the known ones, take nothing from it.
    """
    missing = []
    # A history holds indices of actions, so the known ones must keep their places.
    if found.spec.actions[: len(needed.spec.actions)] != needed.spec.actions:
        missing.append(f"actions {needed.spec.actions} in this order")
    if needed.spec.shown != found.spec.shown:
        missing.append(f"histories without the action {needed.spec.shown!r}")
    if found.spec.num_history_online < needed.spec.num_history_online:
        missing.append(f"{needed.spec.num_history_online} events of a history online")
    if found.spec.memory != needed.spec.memory:
        missing.append(f"sketches of {needed.spec.memory}")
    groups = [
        ("users", needed.user_columns, found.user_columns),
        ("items", needed.item_columns, found.item_columns),
        ("a request", needed.spec.context_features, found.spec.context_features),
        ("a history", needed.history_columns, found.history_columns),
    ]
    for group, wanted, held in groups:
        types = {column.name: _shape(column) for column in held}
        missing += [
            f"{c.name} ({c.dtype.value}) of {group}"
            for c in wanted
            if types.get(c.name) != _shape(c)
        ]
    return missing


def _shape(column: Column) -> tuple[DType, int | None]:
    """Return what two columns of one name must share: the type, and the length of a vector."""
    return column.dtype, column.max_length if column.dtype is DType.FLOAT32_LIST else None
