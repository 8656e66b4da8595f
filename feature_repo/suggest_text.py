"""The text of a dataset module from what its files were taken for (`suggest.py`)."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from feature_repo import raw
from feature_repo.schema import DType, Kind, Source
from feature_repo.suggest import SHOWN_WORDS, Guess, Log, Looked, named_as, singular, texts_of

# From the action that matters most to the one that matters least.
STRENGTH = (
    "purchase", "bought", "buy", "order", "transaction", "checkout", "subscribe", "rate", "cart",
    "favorite", "favourite", "save", "follow", "share", "like", "play", "watch", "read", "download",
    "click", "open",
)  # fmt: skip
PRICED = {"price", "value", "amount", "total", "paid"}
GROUPS = ("event_features", "user_features", "item_features", "context_features", "shown_features")


@dataclass(frozen=True)
class _Actions:
    """How a log says what happened: lines of the declaration."""

    names: tuple[str, ...]
    tasks: tuple[tuple[str, str, str], ...]  # name, action, given
    shown: str = ""
    source: tuple[str, ...] = ()  # fields of Source


def module_text(name: str, log: Log, cuts: tuple[str, str]) -> str:
    """A module that `datasets.load` takes; `cuts` say from when on validation and test run."""
    events, actions = log.events, _actions(log.events)
    has_request = events.column("request") is not None
    body = [
        f'    name="{name}",',
        f'    title="{name.replace("_", " ")}",',
        f"    user_id=DType.{_dtype(events, 'user')},",
        f"    item_id=DType.{_dtype(events, 'item')},",
        f"    actions={_tuple(actions.names)},",
        *([f'    shown="{actions.shown}",'] if actions.shown else []),
        "    tasks=(",
        *(
            f'        Task("{label}", "{action} at the request", action="{action}"'
            + (f', given="{given}")' if given else ")")
            + ","
            for label, action, given in actions.tasks
        ),
        "    ),",
        *_requests(events, actions, cuts, has_request),
        *_source("events", events, [*actions.source], _event_columns(events)),
    ]
    for kind, looked in (("users", log.users), ("items", log.items)):
        if looked is not None:
            role = kind.removesuffix("s")
            columns = {f"{role}_id": looked.column(role) or ""} | _renamed(looked)
            body += _source(kind, looked, [], {o: t for o, t in columns.items() if o != t})
    for group in GROUPS:
        chosen = [g for g in log.guesses if g.group == group and g.role == "feature"]
        if group == "event_features":
            chosen = [*(g for g in log.guesses if g.role == "rating"), *chosen]
        if chosen:
            body += [f"    {group}=(", *(f"        {_column(g)}," for g in chosen), "    ),"]
    body += _rest(log)
    used = "\n".join(body)
    kinds = [k for k in ("AGE", "BAG", "CATEGORY", "NUMBER", "VECTOR") if f"kind={k}" in used]
    imports = [*kinds, "Column", "DatasetSpec", "DType", "Examples", "Requests", "Source", "Task"]
    return "\n".join(
        [
            f'"""{name.replace("_", " ")}: say here what the log is, in a sentence.',
            "",
            "Written by `python -m feature_repo new`; correct it, and run `python -m feature_repo check`.",
            '"""',
            "",
            "from feature_repo.schema import (",
            *(f"    {word}," for word in imports),
            ")",
            "",
            "SPEC = DatasetSpec(",
            *body,
            ")",
            "",
        ]
    )


def _dtype(looked: Looked, role: str) -> str:
    column = looked.column(role)
    assert column is not None
    return looked.guesses[column].dtype.name


def _tuple(names: tuple[str, ...]) -> str:
    return "(" + ", ".join(f'"{name}"' for name in names) + ("," if len(names) == 1 else "") + ")"


def _strength(action: str) -> int:
    spoken = [place for place, word in enumerate(STRENGTH) if word in action.lower()]
    return min(spoken, default=len(STRENGTH))


def _is_shown(action: str) -> bool:
    return any(word in action.lower() for word in SHOWN_WORDS)


def _actions(events: Looked) -> _Actions:
    flags = [g.column for g in events.guesses.values() if g.role == "flag"]
    if flags:
        return _flagged(events, flags)
    if rating := events.column("rating"):
        top = pc.max(raw.numbers(events.rows[rating])).as_py()
        limit = round(0.8 * top, 1)
        source = (f'action="{rating}"', f"at_least={limit:g}")
        task = ("label_like", "high_rating", "")
        return _Actions(("high_rating", "low_rating"), (task,), source=source)
    column = events.column("action")
    if column is None:
        priced = any(
            named_as(name, "request") or "price" in name.lower() for name in events.guesses
        )
        only = "purchase" if priced else "interaction"
        return _Actions((only,), ((f"label_{only}", only, ""),))
    values = [str(value) for value in pc.unique(texts_of(events.rows[column])).to_pylist() if value]
    ours = {value: "".join(s if s.isalnum() else "_" for s in value).lower() for value in values}
    names = sorted(ours.values(), key=lambda n: (_strength(n), _is_shown(n), n))
    shown = next((n for n in names if _is_shown(n)), "")
    fields = [f'action="{column}"']
    if any(value != name for value, name in ours.items()):
        fields.append("actions={" + ", ".join(f'"{v}": "{n}"' for v, n in ours.items()) + "}")
    if not (shown and len(names) > 1 and events.column("request")):
        return _Actions(tuple(names), ((f"label_{names[0]}", names[0], ""),), source=tuple(fields))
    acted = [name for name in names if name != shown]
    tasks = tuple((f"label_{name}", name, "") for name in reversed(acted))
    return _Actions((*acted, shown), tasks, shown, tuple(fields))


def _flagged(events: Looked, flags: list[str]) -> _Actions:
    """A row is an impression, and says by 0 and 1 what came of it."""
    happened = {
        f: pc.fill_null(raw.whole_numbers(_plain(events.rows[f])), 0).to_numpy() > 0 for f in flags
    }
    by_rate = sorted(flags, key=lambda flag: -happened[flag].sum())
    tasks, before = [], ""
    for place, flag in enumerate(by_rate):
        # What never happened without the one before it is asked only where that one happened.
        earlier = by_rate[place - 1] if place else ""
        implied = bool(earlier) and not (happened[flag] & ~happened[earlier]).any()
        tasks.append((f"label_{singular(flag)}", singular(flag), before if implied else ""))
        before = tasks[-1][0]
    acted = sorted((singular(flag) for flag in flags), key=_strength)
    pairs = ", ".join(f'"{singular(flag)}": "{flag}"' for flag in by_rate)
    return _Actions((*acted, "impression"), tuple(tasks), "impression", (f"flags={{{pairs}}}",))


def _plain(column: pa.ChunkedArray) -> pa.Array:
    """Flags as numbers, however they are spelt."""
    texts = pc.utf8_lower(texts_of(column))
    spelt = pc.replace_with_mask(texts, pc.equal(texts, "true"), pa.scalar("1"))
    return pc.replace_with_mask(spelt, pc.equal(spelt, "false"), pa.scalar("0"))


def _requests(
    events: Looked, actions: _Actions, cuts: tuple[str, str], has_request: bool
) -> list[str]:
    by = ['        by="request_id",'] if has_request else []
    drawn = ["        train_negatives_per_positive=4,", "        eval_negatives=100,"]
    if events.column("rating"):
        kind, rest = "RATINGS", []
    elif actions.shown:
        kind, rest = "IMPRESSIONS", by
    else:
        kind, rest = "ACTIONS", [*drawn, *by]
    return [
        "    requests=Requests(",
        f"        Examples.{kind},",
        f'        validation_from="{cuts[0]}",',
        f'        test_from="{cuts[1]}",',
        *rest,
        "    ),",
    ]


def _renamed(looked: Looked) -> dict[str, str]:
    return {g.ours: g.column for g in looked.guesses.values() if g.ours}


def _event_columns(events: Looked) -> dict[str, str]:
    roles = {
        "user": "user_id",
        "item": "item_id",
        "time": "event_timestamp",
        "request": "request_id",
        "event id": "event_id",
    }
    found = {ours: column for role, ours in roles.items() if (column := events.column(role))}
    found |= _renamed(events)
    return {ours: theirs for ours, theirs in found.items() if ours != theirs}


def _source(kind: str, looked: Looked, more: list[str], columns: dict[str, str]) -> list[str]:
    source, plain = looked.source, Source("")
    assert isinstance(source.path, str)
    lines = [f'"{source.path}"']
    if columns:
        lines += ["columns={", *(f'    "{o}": "{t}",' for o, t in columns.items()), "}"]
    if source.format and not source.path.lower().endswith((".csv", ".csv.gz")):
        lines.append(f'format="{source.format}"')
    if source.delimiter != plain.delimiter:
        lines.append(f"delimiter={source.delimiter!r}".replace("'", '"'))
    if source.header:
        lines.append(f"header={_tuple(source.header)}")
    if source.encodings != plain.encodings:
        lines.append(f"encodings={_tuple(source.encodings)}")
    if source.decimal != plain.decimal:
        lines.append(f'decimal="{source.decimal}"')
    signs = {g.separator for g in looked.guesses.values() if g.separator}
    if signs - {plain.list_separator}:
        lines.append(f'list_separator="{sorted(signs)[0]}"')
    if source.time_unit:
        lines.append(f'time_unit="{source.time_unit}"')
    lines += more
    if len(lines) == 1:
        return [f"    {kind}=Source({lines[0]}),"]
    shown = [f"        {line}" + ("" if line.endswith(("{", ",")) else ",") for line in lines]
    return [f"    {kind}=Source(", *shown, "    ),"]


def _column(guess: Guess) -> str:
    kind = "NUMBER" if guess.role == "rating" else guess.kind.name if guess.kind else ""
    parts = [f'"{guess.ours}"', f"DType.{guess.dtype.name}", f'"{guess.why}"']
    parts += [f"kind={kind}"] if kind else []
    parts += ["values=(0, 1)"] if guess.dtype is DType.INT8 else []
    parts += ["nullable=True"] if guess.nullable else []
    parts += [f"max_length={guess.length}"] if guess.length else []
    parts += [f"hashed={guess.hashed}"] if guess.hashed else []
    return f"Column({', '.join(parts)})"


def _rest(log: Log) -> list[str]:
    """Which columns people read, which number is averaged, and what says that events are the same."""
    titles = [
        g.ours for g in log.guesses if g.group == "item_features" and g.kind is None and g.ours
    ]
    numbers = [g for g in log.guesses if g.group == "event_features" and g.kind is Kind.NUMBER]
    priced = [g.ours for g in numbers if PRICED & set(g.ours.split("_"))]
    rated = [g.ours for g in log.guesses if g.role == "rating"]
    lines = [f'    item_title="{titles[0]}",'] if titles else []
    lines += [f'    stat_value="{value}",' for value in (rated or priced)[:1]]
    if log.events.column("event id"):
        lines.append('    event_identity=("event_id",),')
    return lines
