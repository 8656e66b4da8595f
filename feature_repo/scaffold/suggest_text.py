"""The text of a dataset module from what its files were taken for (`suggest.py`)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from feature_repo.contract.schema import DType, Kind, Source
from feature_repo.raw import raw
from feature_repo.scaffold.names import SHOWN_WORDS, means, named_as, singular
from feature_repo.scaffold.suggest import UNKNOWN, Guess, Log, Sampled, texts_of

# From the action that matters most to the one that matters least.
STRENGTH = (
    "purchase", "bought", "buy", "order", "transaction", "checkout", "subscribe", "rate", "cart",
    "favorite", "favourite", "save", "follow", "share", "like", "play", "watch", "read", "download",
    "click", "open",
)  # fmt: skip
# Share of the events below which an action is no task
LEAST_SHARE = 0.001
# Rows of an action that is one
FEWEST = 20
PRICED = {"price", "value", "amount", "total", "paid"}
GROUPS = ("event_features", "user_features", "item_features", "context_features", "shown_features")


@dataclass(frozen=True)
class _Actions:
    """How a log says what happened: lines of the declaration."""

    names: tuple[str, ...]
    # Name, action, given
    tasks: tuple[tuple[str, str, str], ...]
    shown: str = ""
    # Fields of Source
    source: tuple[str, ...] = ()
    doubt: str = ""


def module_text(name: str, log: Log, cuts: tuple[str, str]) -> str:
    """A module that `datasets.load` takes, with `# ?` behind what is not sure; `cuts` say from when on
    validation and test run.
    """
    events = log.events
    actions = _actions(log.events)
    has_request = events.column("request") is not None
    # 1. Who, what and which requests; where the events are.
    body = [
        f'    name="{name}",',
        f'    title="{name.replace("_", " ")}",',
        f"    user_id=DType.{_dtype(events, 'user')},",
        f"    item_id=DType.{_dtype(events, 'item')},",
        f"    actions={_tuple(actions.names)}," + _doubt(actions.doubt),
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
    # 2. Tables of users and items.
    for kind, sampled in (("users", log.users), ("items", log.items)):
        if sampled is not None:
            role = kind.removesuffix("s")
            columns = {f"{role}_id": sampled.column(role) or UNKNOWN} | _renamed(sampled)
            if time := sampled.column("time"):
                columns["event_timestamp"] = time
            body += _source(kind, sampled, [], {o: t for o, t in columns.items() if o != t})
    # 3. Features, by whom they belong to.
    for group in GROUPS:
        chosen = [g for g in log.guesses if g.group == group and g.role == "feature"]
        if group == "event_features":
            chosen = [*(g for g in log.guesses if g.role == "rating"), *chosen]
        if chosen:
            lines = (f"        {_column(g)},{_doubt(g.doubt)}" for g in chosen)
            body += [f"    {group}=(", *lines, "    ),"]
    body += _rest(log)
    # 4. Import only the kinds that the text uses.
    used = "\n".join(body)
    kinds = [k for k in ("AGE", "BAG", "CATEGORY", "NUMBER", "VECTOR") if f"kind={k}" in used]
    imports = [*kinds, "Column", "DatasetSpec", "DType", "Examples", "Requests", "Source", "Task"]
    return "\n".join(
        [
            f'"""{name.replace("_", " ")}: say here what the log is, in a sentence.',
            "",
            "Written by `python -m feature_repo new`; correct it, above all what has `# ?` behind it, and run",
            "`python -m feature_repo check`.",
            '"""',
            "",
            "from feature_repo.contract.schema import (",
            *(f"    {word}," for word in imports),
            ")",
            "",
            "SPEC = DatasetSpec(",
            *body,
            ")",
            "",
        ]
    )


def _dtype(sampled: Sampled, role: str) -> str:
    column = sampled.column(role)
    return DType.STRING.name if column is None else sampled.guesses[column].dtype.name


def _doubt(why: str) -> str:
    return f"  # ? {' '.join(why.split())}" if why else ""


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def _tuple(names: Sequence[str]) -> str:
    return "(" + ", ".join(map(_text, names)) + ("," if len(names) == 1 else "") + ")"


def _strength(action: str) -> int:
    place = means(action, STRENGTH)
    return len(STRENGTH) if place is None else place


def _is_shown(action: str) -> bool:
    return means(action, SHOWN_WORDS) is not None


def _actions(events: Sampled) -> _Actions:
    # 1. Take logs with flags, with a rating, or without a word on actions.
    flags = [g.column for g in events.guesses.values() if g.role == "flag"]
    if flags:
        return _flagged(events, flags)
    if rating := events.column("rating"):
        return _rated(events, rating)
    column = events.column("action")
    if column is None:
        priced = any(
            named_as(name, "request") or "price" in name.lower() for name in events.guesses
        )
        only = "purchase" if priced else "interaction"
        return _Actions((only,), ((f"label_{only}", only, ""),))
    # 2. Name each value, and count the rows of each name.
    spelt = raw.without_missing(events.rows[column])
    values = Counter(value for value in texts_of(spelt).to_pylist() if value)
    ours = {value: _name_of(value, place) for place, value in enumerate(values, 1)}
    rows = Counter[str]()
    for value, number in values.items():
        rows[ours[value]] += number
    # A few stray rows are nothing to rank by, however strong their word.
    total = sum(rows.values())
    rare = {
        name for name, n in rows.items() if n < max(LEAST_SHARE * total, min(FEWEST, total / 50))
    }
    coded = events.guesses[column].doubt

    def order(name: str) -> tuple[bool, int, bool, int, str]:
        return name in rare, _strength(name), _is_shown(name), rows[name] if coded else 0, name

    # 3. Sort from the strongest action to the weakest: statistics are about the first.
    names = sorted(rows, key=order)
    shown = next((n for n in names if _is_shown(n)), "")
    doubt = coded or ", ".join(
        f"{name} has {rows[name]:,} of {total:,} rows" for name in sorted(rare)
    )
    fields = [f"action={_text(column)}"]
    if any(value != name for value, name in ours.items()):
        pairs = ", ".join(f"{_text(v)}: {_text(n)}" for v, n in ours.items())
        fields.append(f"actions={{{pairs}}}")
    # 4. Make tasks: more than one needs impressions that say what else was shown.
    if not (shown and len(names) > 1 and events.column("request")):
        task = (f"label_{names[0]}", names[0], "")
        return _Actions(tuple(names), (task,), source=tuple(fields), doubt=doubt)
    acted = [name for name in names if name != shown]
    asked = [name for name in acted if name not in rare] or acted
    tasks = tuple((f"label_{name}", name, "") for name in reversed(asked))
    return _Actions((*acted, shown), tasks, shown, tuple(fields), doubt)


def _name_of(value: str, place: int) -> str:
    """A name of ours for an action: small letters, digits and underscores."""
    name = "".join(sign if sign.isascii() and sign.isalnum() else "_" for sign in value).lower()
    name = name.strip("_")
    return name if name[:1].isalpha() else f"action_{name or place}"


def _rated(events: Sampled, rating: str) -> _Actions:
    """Ratings from 0.8 of the highest on are high. A value below a scale that else begins at 1 was no
    rating where it is negative, or the commonest of all.
    """
    stars = raw.numbers(events.rows[rating]).drop_null().to_numpy()
    values, counts = np.unique(stars, return_counts=True)
    source = [f"action={_text(rating)}", f"at_least={round(0.8 * float(values[-1]), 1):g}"]
    unrated = [
        f"{value:g}"
        for value, number in zip(values, counts, strict=True)
        if value < 0 or (value == 0 and number == counts.max() and min(values[values > 0]) >= 1)
    ]
    if unrated:
        share = np.isin(stars, [float(value) for value in unrated]).mean()
        marks = f"missing_in={{{_text(rating)}: {_tuple(unrated)}}}"
        source.append(f"{marks},{_doubt(f'{share:.0%} of the rows, below all other ratings')}")
    task = ("label_like", "high_rating", "")
    return _Actions(("high_rating", "low_rating"), (task,), source=tuple(source))


def _flagged(events: Sampled, flags: list[str]) -> _Actions:
    """A row is an impression, and says by 0 and 1 what came of it."""
    happened = {
        f: pc.fill_null(raw.truths(texts_of(events.rows[f])), 0).to_numpy() > 0 for f in flags
    }
    by_rate = sorted(flags, key=lambda flag: -happened[flag].sum())
    tasks = []
    before = ""
    for place, flag in enumerate(by_rate):
        # What never happened without the one before it is asked only where that one happened.
        earlier = by_rate[place - 1] if place else ""
        implied = bool(earlier) and not (happened[flag] & ~happened[earlier]).any()
        tasks.append((f"label_{singular(flag)}", singular(flag), before if implied else ""))
        before = tasks[-1][0]
    acted = sorted((singular(flag) for flag in flags), key=_strength)
    pairs = ", ".join(f"{_text(singular(flag))}: {_text(flag)}" for flag in by_rate)
    doubt = "; ".join(f"{f}: {why}" for f in flags if (why := events.guesses[f].doubt))
    names = (*acted, "impression")
    return _Actions(names, tuple(tasks), "impression", (f"flags={{{pairs}}}",), doubt)


def _requests(
    events: Sampled, actions: _Actions, cuts: tuple[str, str], has_request: bool
) -> list[str]:
    by = ['        by="request_id",'] if has_request else []
    drawn = ["        train_negatives_per_positive=4,", "        eval_negatives=100,"]
    if events.column("rating"):
        kind = "RATINGS"
        rest = []
    elif actions.shown:
        kind = "IMPRESSIONS"
        rest = by
    else:
        kind = "ACTIONS"
        rest = [*drawn, *by]
    return [
        "    requests=Requests(",
        f"        Examples.{kind},",
        f'        validation_from="{cuts[0]}",',
        f'        test_from="{cuts[1]}",',
        *rest,
        "    ),",
    ]


def _renamed(sampled: Sampled) -> dict[str, str]:
    return {g.ours: g.column for g in sampled.guesses.values() if g.ours}


def _event_columns(events: Sampled) -> dict[str, str]:
    roles = {
        "user": "user_id",
        "item": "item_id",
        "time": "event_timestamp",
        "request": "request_id",
        "event id": "event_id",
    }
    found = {ours: column for role, ours in roles.items() if (column := events.column(role))}
    found |= {roles[role]: UNKNOWN for role in ("user", "item", "time") if not events.column(role)}
    found |= _renamed(events)
    # A column of our name is written as well where there is a doubt to write behind it.
    return {o: t for o, t in found.items() if o != t or events.guesses[t].doubt}


def _source(kind: str, sampled: Sampled, more: list[str], columns: dict[str, str]) -> list[str]:
    source = sampled.source
    plain = Source("")
    assert isinstance(source.path, str)
    lines = [_text(source.path)]
    if columns:
        pairs = (f"    {_text(o)}: {_text(t)},{_doubt_of(sampled, t)}" for o, t in columns.items())
        lines += ["columns={", *pairs, "}"]
    # How the text is cut into fields; defaults are left out.
    if source.format and not source.path.lower().endswith((".csv", ".csv.gz")):
        lines.append(f'format="{source.format}"')
    if source.delimiter != plain.delimiter:
        lines.append(f"delimiter={_text(source.delimiter)}")
    if source.quote != plain.quote:
        lines.append(f"quote={_text(source.quote)}")
    if source.escape:
        lines.append(f"escape={_text(source.escape)}")
    if source.quoted_newlines:
        lines.append("quoted_newlines=True")
    if source.skip:
        lines.append(f"skip={source.skip},{_doubt(sampled.doubts.get('skip', ''))}")
    if source.header:
        lines.append(f"header={_tuple(source.header)},{_doubt(sampled.doubts.get('header', ''))}")
    if source.encodings != plain.encodings:
        doubt = _doubt(sampled.doubts.get("encodings", ""))
        lines.append(f"encodings={_tuple(source.encodings)},{doubt}")
    # How values are written.
    if source.decimal != plain.decimal:
        lines.append(f'decimal="{source.decimal}"')
    # A column declares its sign only where it differs from the sign of the source.
    signed = (Kind.NUMBER, Kind.VECTOR)
    own = {g.ours: g.decimal for g in sampled.guesses.values() if g.kind in signed and g.ours}
    if odd := {name: sign for name, sign in own.items() if sign not in ("", source.decimal)}:
        lines.append(f"decimals={json.dumps(odd)}")
    signs = {g.separator for g in sampled.guesses.values() if g.separator}
    if signs - {plain.list_separator}:
        lines.append(f'list_separator="{sorted(signs)[0]}"')
    if source.time_unit:
        lines.append(f'time_unit="{source.time_unit}"')
    if source.time_format:
        doubt = _doubt(sampled.doubts.get("time_format", ""))
        lines.append(f"time_format={_text(source.time_format)},{doubt}")
    if source.zone_column:
        lines.append(f"zone_column={_text(source.zone_column)}")
    lines += more
    if len(lines) == 1:
        return [f"    {kind}=Source({lines[0]}),"]
    ended = ("{", ",")
    shown = [
        f"        {line}" + ("" if line.endswith(ended) or "# ?" in line else ",") for line in lines
    ]
    return [f"    {kind}=Source(", *shown, "    ),"]


def _doubt_of(sampled: Sampled, column: str) -> str:
    """Return the doubts about a column, as a comment."""
    if column == UNKNOWN:
        return _doubt("no column was taken for it; name one here, or by --user, --item or --time")
    return _doubt(sampled.guesses[column].doubt) if column in sampled.guesses else ""


def _column(guess: Guess) -> str:
    kind = "NUMBER" if guess.role == "rating" else guess.kind.name if guess.kind else ""
    parts = [_text(guess.ours), f"DType.{guess.dtype.name}", _text(guess.why)]
    parts += [f"unit={_text(guess.unit)}"] if guess.unit else []
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
