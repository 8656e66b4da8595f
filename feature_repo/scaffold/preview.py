"""`python -m feature_repo check` previews a dataset in seconds, without Beam: rows are read,
parsed and asked about as the jobs would, and nothing is written.

At most `ROWS` rows are read, from the beginning and the end of the log: enough for every slip of a
declaration to show, and the figures say of how many rows they are.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract import limits
from feature_repo.contract.arrow import arrow_schema, iso_micros, micros, micros_iso
from feature_repo.contract.contract import Contract
from feature_repo.contract.counts import Counts, total
from feature_repo.contract.schema import EVENT_TIMESTAMP, Column, DType, Examples
from feature_repo.datasets import Dataset, Parsed, RawUnit
from feature_repo.history.known import that_hold
from feature_repo.history.transforms import CONTEXT_FIELDS, MATCH_FEATURES, USER_FEATURES
from feature_repo.raw import lines, parse, sources
from feature_repo.raw.examples import UNDEFINED, LoggedRequests, random_ndcg, requests_of
from feature_repo.raw.parse import NOT_BAD
from feature_repo.scaffold import sniff

ROWS = 500_000
# So many files of a log are read, the first and the last among them
MOST_FILES = 200
# Share of all events above which one user or item is worth a line
LARGE_SHARE = 0.05
# Times the others' mean above which a share is large
TIMES_MEAN = 4
# Share of the examples
RARE_LABEL = 0.001
# Share of the events that may change their user
SHARED = 0.001
# Share of the ids that are another's in another spelling
SPELT_TWICE = 0.001
# Share of the events' items or users below which a table is asked about
FEW_KNOWN = 0.5
# NDCG@10 of a random order from where on the figure tells nothing
RANDOM_TELLS = 0.9
# Microseconds; a request is one moment
LONG_REQUEST = 86_400_000_000
DAY = 86_400_000_000  # microseconds
# The last hour of a clock that says AM or PM beside it
NOON = 12
FEW_REQUESTS = 10  # of a period
SHOWN_EVENTS = 10


@dataclass(frozen=True)
class Finding:
    """Something that would make a ranking wrong, unless a person knows that it is right."""

    name: str
    text: str


@dataclass(frozen=True)
class Preview:
    """The rows that were read, and what they came to.

    Args:
        events: within all limits, sorted by user and time.
        dead: dead letters by reason.
        of_rows: how many raw rows there are; None where that is not known.
        known_items, known_users: share of the events' ids that their profiles know; None where these
            come from the events themselves.
        counts: of what was read, values that were left out among them.
        of_files: what files say against the declaration, each in a line.
        shared_events: events that lines of several users name.
        rows_of_keys: of a table of items or users without a time: its rows and how many keys they
            are of.
    """

    contract: Contract
    events: pa.Table
    dead: Counter[str]
    counts: Counts
    of_rows: int | None
    known_items: float | None
    known_users: float | None
    of_files: tuple[str, ...] = ()
    shared_events: int = 0
    rows_of_keys: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.counts["rows_read"]

    @property
    def whole(self) -> bool:
        """True if every row was read."""
        return self.of_rows == self.rows

    def lines(self) -> Iterator[str]:
        yield from self._rows()
        yield from self._events()
        yield from self._requests()
        yield from self._read()

    def problems(self) -> list[str]:
        """Yield what stops the jobs, and what would make a ranking wrong. Each of the latter has a name,
        by which a person who knows better accepts it.
        """
        accepted = self.contract.spec.accept
        named = [f for f in findings(self) if f.name not in accepted]
        hint = "if it is right, SPEC.accept names"
        return [*self._obstacles(), *(f"{f.text} ({hint} {f.name!r})" for f in named)]

    def _obstacles(self) -> list[str]:
        found = []
        if not len(self.events):
            found.append("not one row is an event")
            return found
        # 1. Count dead letters, but for those that say nothing against the data.
        dead = sum(self.dead.values())
        limit = self.contract.spec.max_bad_fraction
        dead -= sum(self.dead[reason] for reason in NOT_BAD)
        if dead > limit * self.rows:
            found.append(
                f"{dead:,} of {self.rows:,} rows are dead letters ({dead / self.rows:.1%}); SPEC.max_bad_fraction allows {limit:.1%}"
            )
        # 2. Check times: both cuts lie among the events, and no event lies ahead of now.
        times = micros(self.events[EVENT_TIMESTAMP])
        rules = self.contract.spec.requests
        for name in ("validation_from", "test_from"):
            cut = iso_micros(getattr(rules, name))
            if not times.min() < cut < times.max():
                found.append(
                    f"requests.{name} is {getattr(rules, name)}, and events run from {micros_iso(int(times.min()))} to "
                    f"{micros_iso(int(times.max()))}"
                )
        ahead = int((times > time.time() * 1e6).sum())
        if ahead:
            found.append(
                f"{ahead:,} events are yet to come, the last of {micros_iso(int(times.max()))}: `beam_jobs events` stops "
                "at them unless --as_of says what time it is, and later rows become dead letters"
            )
        # 3. Ask whether the tables of users and items know the events' ids.
        for name, share in (("items", self.known_items), ("users", self.known_users)):
            if share == 0:
                found.append(
                    f"the table of {name} knows none of the events' {name}: are the ids the same?"
                )
        # 4. Ask for requests, and for one positive at least of each label.
        requests = self.requests
        if not len(requests.first_event):
            found.append(f"no request comes of requests.examples={rules.examples.value}")
        for number, name in enumerate(self.contract.labels):
            if len(requests.labels) and not (requests.labels[:, number] == 1).any():
                found.append(f"no example has {name} = 1")
        return found

    @cached_property
    def requests(self) -> LoggedRequests:
        """The requests that the events make."""
        return requests_of(self.contract, self.events)

    def _rows(self) -> Iterator[str]:
        known = (
            ""
            if self.whole
            else f" of {'unknown' if self.of_rows is None else f'{self.of_rows:,}'}"
        )
        yield f"{self.rows:,}{known} rows read: {len(self.events):,} events, {sum(self.dead.values()):,} dead letters"
        for reason, number in self.dead.most_common(10):
            yield f"  {number:,}  {reason}"
        for line in self.counts.left_out():
            yield f"  {line}"
        for what, share in (("items", self.known_items), ("users", self.known_users)):
            if share is not None:
                yield f"  {share:.1%} of the events' {what} are in their table"

    def _events(self) -> Iterator[str]:
        if not len(self.events):
            return
        times = micros(self.events[EVENT_TIMESTAMP])
        yield f"events run from {micros_iso(int(times.min()))} to {micros_iso(int(times.max()))}; for example"
        chosen = np.unique(np.linspace(0, len(self.events) - 1, SHOWN_EVENTS).astype(np.int64))
        for row in self.events.take(pa.array(chosen)).to_pylist():
            row["action"] = self.contract.spec.actions[row["action"]]
            row.pop("source_position")
            row[EVENT_TIMESTAMP] = row[EVENT_TIMESTAMP].isoformat()
            yield "  " + ", ".join(f"{name} {limits.shown(value)!r}" for name, value in row.items())

    def _requests(self) -> Iterator[str]:
        found = self.requests
        rules = self.contract.spec.requests
        times = micros(self.events[EVENT_TIMESTAMP])[found.first_event]
        bounds = [iso_micros(rules.validation_from), iso_micros(rules.test_from)]
        by_period = np.bincount(np.searchsorted(bounds, times, side="right"), minlength=3)
        names = ("train", "validation", "test")
        counts = ", ".join(f"{n:,} {name}" for n, name in zip(by_period, names, strict=True))
        yield f"{len(times):,} requests ({counts}) of {len(found.request) / max(len(times), 1):.1f} items"
        drawn = rules.examples is Examples.ACTIONS
        for number, name in enumerate(self.contract.labels):
            labels = found.labels[:, number]
            defined = labels[labels != UNDEFINED]
            share = f"{(defined == 1).mean():.2%}" if len(defined) else "undefined"
            beside = (
                f", and {rules.train_negatives_per_positive} drawn beside each" if drawn else ""
            )
            yield f"  {name}: {share} of {len(defined):,}{beside}"

    def _read(self) -> Iterator[str]:
        contract = self.contract
        stats = [c.name for c in contract.table("item_stats").columns]
        yield "a ranker reads"
        yield f"  of a request: {_named(contract.request_features)}{', '.join((*USER_FEATURES, *CONTEXT_FIELDS))}"
        yield f"  of an event: item, action, time{''.join(', ' + _shown(c) for c in contract.event_features)}"
        yield f"  of a candidate: item, {_named(contract.candidate_features)}{', '.join((*stats, *MATCH_FEATURES))}"


def findings(found: Preview) -> Iterator[Finding]:
    """Yield what would silently make a ranking wrong."""
    yield from (Finding("files_differ", text) for text in found.of_files)
    for kind, (rows, keys) in found.rows_of_keys.items():
        if rows > keys:
            yield Finding(
                "rows_of_keys",
                f"the table of {kind} has {rows:,} rows of {keys:,} {kind}: of several the one that stands last is taken; "
                "name a time by columns={'event_timestamp': …}, or write one row for each",
            )
    if not len(found.events):
        return
    for kind, share in (("items", found.known_items), ("users", found.known_users)):
        if share and share < FEW_KNOWN:
            yield Finding(
                "few_known",
                f"the table of {kind} knows {share:.1%} of the events' {kind}: are all ids spelt the same?",
            )
    yield from _of_spellings(found)
    yield from _of_shares(found)
    yield from _of_times(found)
    yield from _of_repeats(found)
    if len(found.requests.first_event):
        yield from _of_requests(found)


def _of_shares(found: Preview) -> Iterator[Finding]:
    """Yield users or items with a large part of the log: often they are a mark of nothing."""
    for entity in (found.contract.user, found.contract.item):
        counted = found.events[entity.join_key].combine_chunks().value_counts()
        counts = counted.field("counts").to_numpy()
        at = int(counts.argmax())
        total = int(counts.sum())
        others = (total - counts[at]) / max(len(counts) - 1, 1)
        if counts[at] > LARGE_SHARE * total and counts[at] > TIMES_MEAN * others:
            value = counted.field("values")[at].as_py()
            yield Finding(
                "large_share",
                f"one {entity.name}, {value!r}, has {counts[at] / total:.1%} of the events; if it stands for nobody, name "
                f"it in Source.missing",
            )


def _of_spellings(found: Preview) -> Iterator[Finding]:
    """Ids that are another's but for spaces, letter case, or the '.0' of numbers that were floats."""
    for entity in (found.contract.user, found.contract.item):
        if entity.dtype is not DType.STRING:
            continue
        ids = pc.unique(found.events[entity.join_key])
        # 1. Find ids with spaces around them.
        bare = pc.utf8_trim_whitespace(ids)
        padded = pc.sum(pc.not_equal(ids, bare)).as_py() or 0
        if padded:
            same = len(ids) - len(pc.unique(bare))
            yield Finding(
                "padded_ids",
                f"{padded:,} ids of {entity.name}s have spaces around them, and {same:,} are another's but for these: who "
                "asks without them asks for somebody else",
            )
        # 2. Find ids that are written in two ways, spaces aside.
        whole = pc.replace_substring_regex(bare, r"^([0-9]+)\.0+$", r"\1")
        spellings = {
            "with and without '.0' behind them": whole,
            "in small and in large letters": pc.utf8_lower(bare),
        }
        for how, one_way in spellings.items():
            twice = len(pc.unique(bare)) - len(pc.unique(one_way))
            # A few such pairs may be right: some codes differ in letter case alone.
            if twice > SPELT_TWICE * len(ids):
                yield Finding(
                    "spelt_twice",
                    f"{twice:,} of {len(ids):,} ids of {entity.name}s come {how}, and are taken for two: write them one way",
                )


def _of_times(found: Preview) -> Iterator[Finding]:
    """Events far from all others, and dates whose day and month are told apart by nothing."""
    # 1. Find stray times by quantiles: the ends of the log may be such times themselves.
    times = np.sort(micros(found.events[EVENT_TIMESTAMP]))
    low, high = (int(v) for v in np.quantile(times, [0.01, 0.99]))
    far = times[(times < low - (high - low)) | (times > high + (high - low))]
    if len(far) and high > low:
        yield Finding(
            "far_times",
            f"{len(far):,} events lie far from all others, such as of {micros_iso(int(far[0]))}; the others run from "
            f"{micros_iso(low)} to {micros_iso(high)}",
        )
    # 2. Look at hours in the source's zone: a clock of 12 hours says neither 0 nor 13.
    source = found.contract.spec.events
    local = pa.array(times, pa.timestamp("us", "UTC")).cast(pa.timestamp("us", source.zone))
    hours = set(pc.unique(pc.hour(local)).to_pylist())
    written_out = not (source.time_unit or source.zone_column)
    if written_out and min(hours) > 0 and max(hours) == NOON and len(hours) > NOON - 2:
        yield Finding(
            "half_days",
            "no event is of an hour before 1 or after 12: do the files say AM or PM, and does the declaration read it?",
        )
    # 3. Look at days: without one after the 12th, day and month cannot be told apart.
    written = source.time_format
    days = {datetime.fromtimestamp(at // 1e6, UTC).day for at in np.unique(times // DAY) * DAY}
    if (
        {"%d", "%m"} <= set(re.findall("%.", written))
        and "%Y-%m" not in written
        and max(days) <= 12
    ):
        yield Finding(
            "day_and_month",
            f"no event is of a day after the 12th: {written!r} may have day and month in the wrong order",
        )


def _shared_events(contract: Contract, lines_of_events: pa.Table) -> int:
    """Count the events that lines of several users name."""
    user = contract.user.join_key
    identity = list(contract.spec.event_identity)
    if user in identity:
        return 0
    named = lines_of_events.select([*identity, user])
    for name in identity:
        named = named.filter(pc.is_valid(named[name]))
    users = named.group_by(identity).aggregate([(user, "count_distinct")])
    return int(pc.sum(pc.greater(users[f"{user}_count_distinct"], 1)).as_py() or 0)


def _of_repeats(found: Preview) -> Iterator[Finding]:
    """Events that are the same in all that is known of them, or that several users share."""
    identity = found.contract.spec.event_identity
    if found.shared_events > SHARED * len(found.events):
        yield Finding(
            "shared_identity",
            f"{found.shared_events:,} events are named by lines of several users, and the line that arrived last takes each "
            f"from the others; if {identity!r} is one user's own, write SPEC.event_identity={('user_id', *identity)!r}",
        )
    if identity:
        return
    names = [n for n in found.events.column_names if n != "source_position"]
    flat = [n for n in names if not pa.types.is_nested(found.events.schema.field(n).type)]
    distinct = found.events.select(flat).group_by(flat).aggregate([]).num_rows
    repeats = len(found.events) - distinct
    if repeats:
        yield Finding(
            "repeats",
            f"{repeats:,} events are the same as another in all that is declared of them; if they were delivered twice, "
            "SPEC.event_identity names what says so, such as "
            f"{tuple(n for n in flat if n not in ('user_id', 'action'))[:2]!r}",
        )


def _of_requests(found: Preview) -> Iterator[Finding]:
    """Requests that last, that have nothing to rank, and labels that hardly ever are."""
    spec = found.contract.spec
    requests = found.requests
    # 1. Measure how long requests last; those of ratings may join what was said over weeks.
    times = micros(found.events[EVENT_TIMESTAMP])
    begins = times[requests.first_event]
    lasts = np.zeros(len(begins), np.int64)
    np.maximum.at(lasts, requests.request, times[requests.event] - begins[requests.request])
    long = (lasts > LONG_REQUEST).mean()
    if long > 0.01 and spec.requests.examples is not Examples.RATINGS:
        yield Finding(
            "long_requests",
            f"{long:.1%} of the requests last longer than a day, one of them {lasts.max() / LONG_REQUEST:,.0f} days: does "
            f"{spec.events.columns.get('request_id', 'request_id')!r} name a visitor rather than a request?",
        )
    # 2. Ask whether there is anything to rank.
    drawn = spec.requests.eval_negatives
    reached = random_ndcg(requests, drawn)
    if reached >= RANDOM_TELLS:
        yield Finding(
            "nothing_to_rank",
            f"a random order reaches an NDCG@10 of {reached:.2f}: requests have "
            f"{len(requests.request) / len(begins):.1f} items, and no figure of quality tells anything",
        )
    # 3. Count the requests of each period; a sample may miss a period, and proves nothing.
    bounds = [iso_micros(spec.requests.validation_from), iso_micros(spec.requests.test_from)]
    by_period = np.bincount(np.searchsorted(bounds, begins, side="right"), minlength=3)
    for name, number in zip(("train", "validation", "test"), by_period, strict=True):
        if found.whole and number < FEW_REQUESTS <= len(begins) / 10:
            yield Finding("few_requests", f"{number:,} of {len(begins):,} requests are of {name}")
    # 4. Find labels that are nearly always 0.
    for number, label in enumerate(found.contract.labels):
        defined = requests.labels[:, number] != UNDEFINED
        share = (requests.labels[defined, number] == 1).mean() if defined.any() else 0.0
        if 0 < share < RARE_LABEL:
            yield Finding(
                "rare_label", f"{label} is 1 in {share:.3%} of {defined.sum():,} examples"
            )


def preview(dataset: Dataset, data: str | None) -> Preview:
    """Read what there is time for.

    Raises:
        RawDataError: a source is missing, or of another shape.
    """
    contract = dataset.contract
    units = dataset.raw_units(data)
    events = [unit for unit in units if unit.kind == "events"]
    known = all(unit.rows >= 0 for unit in events)
    # 1. Parse and check events as the `events` job would.
    parsed_units = [list(_parsed(dataset, unit)) for unit in _some(dataset, events)]
    read = [parsed for blocks in parsed_units for parsed in blocks]
    dead: Counter[str] = Counter()
    counts = total(parsed.counts for parsed in read)
    kept = []
    for number, blocks in enumerate(parsed_units):
        for parsed in blocks:
            checked = limits.check(contract.table("events"), parsed.events)
            dead.update(parsed.dead_letters["reason"].to_pylist())
            dead.update(checked.reasons)
            rows = pa.concat_tables([checked.kept, parsed.strikes])
            kept.append(lines.numbered(rows, number) if lines.is_identified(rows) else rows)
    # 2. Sort them as histories are.
    user = contract.user.join_key
    item = contract.item.join_key
    order = [(user, "ascending"), (EVENT_TIMESTAMP, "ascending"), ("source_position", "ascending")]
    nothing = arrow_schema(contract.table("events")).empty_table()
    table = pa.concat_tables(kept or [nothing]).combine_chunks()
    shared = 0
    if lines.is_identified(table):
        shared = _shared_events(contract, table)
        resolved = lines.resolve(table, contract.spec.event_identity)
        dead.update(resolved.reasons)
        table = that_hold(resolved.events)
    table = table.sort_by(order).combine_chunks()
    # 3. Compare their ids with the tables of users and items.
    profiles = {
        kind: [p for unit in units if unit.kind == kind for p in dataset.parse(unit)]
        for kind in ("users", "items")
    }
    counts += total(parsed.counts for found in profiles.values() for parsed in found)
    keys = {"users": [p.users[user] for p in profiles["users"]]}
    keys["items"] = [p.items[item] for p in profiles["items"]]
    return Preview(
        contract,
        table,
        dead,
        counts,
        sum(unit.rows for unit in events) if known else None,
        _share(table[item], keys["items"]),
        _share(table[user], keys["users"]),
        tuple(_of_files(dataset, units)),
        shared,
        {
            kind: (sum(map(len, found)), len(pc.unique(_joined(found))))
            for kind, found in keys.items()
            if found and EVENT_TIMESTAMP not in dataset.sources[kind].columns
        },
    )


def _of_files(dataset: Dataset, units: Sequence[RawUnit]) -> Iterator[str]:
    """Yield what files say against the declaration: stray quotes, columns that some of them lack."""
    for kind, source in dataset.sources.items():
        files = list(dict.fromkeys(unit.file for unit in units if unit.kind == kind))
        if not files:
            # None of them has a row
            continue
        chosen = np.unique(np.linspace(0, len(files) - 1, MOST_FILES).astype(int))
        for at in chosen:
            if finding := sniff.same_dialect(source, files[at]):
                yield f"{files[at]}: {finding}"
        if sources.format_of(source, files[0]) == "json":
            # Objects of JSON leave out what is null.
            continue
        wanted = parse.theirs(dataset.spec, kind)
        lacking = Counter(
            name
            for file in files
            for name in wanted
            if len(files) > 1 and name not in sources.columns_in(source, file)
        )
        for name, number in lacking.items():
            yield f"column {name!r} is not in {number:,} of {len(files):,} files of {kind}, and missing there"


def _some(dataset: Dataset, units: Sequence[RawUnit]) -> list[RawUnit]:
    """All units; or of a long log, for each of at most `MOST_FILES` files, units from both of its ends
    on until it has its share of `ROWS`.
    """
    if sum(max(unit.rows, 0) for unit in units) <= ROWS:
        return list(units)
    files = list(dict.fromkeys(unit.file for unit in units))
    chosen = [files[at] for at in np.unique(np.linspace(0, len(files) - 1, MOST_FILES).astype(int))]
    share = ROWS // len(chosen)
    some = []
    for file in chosen:
        of_file = [unit for unit in units if unit.file == file]
        ends = {id(unit): unit for unit in (of_file[0], of_file[-1])}
        if sum(max(unit.rows, 0) for unit in ends.values()) > share:
            some += sources.ends_of(dataset.spec.events, of_file)
            continue
        rows = sum(unit.rows for unit in ends.values())
        for unit in of_file:
            if id(unit) not in ends and rows + unit.rows <= share:
                ends[id(unit)] = unit
                rows += unit.rows
        some += sorted(ends.values(), key=lambda unit: unit.start)
    return some


def _parsed(dataset: Dataset, unit: RawUnit) -> Iterator[Parsed]:
    """Blocks of a unit until enough rows are read, and the last one: a packed file is unpacked to its
    end, for one that was cut off says so only there.
    """
    rows = 0
    last = None
    for block in dataset.blocks(unit):
        last = block
        if rows < ROWS:
            yield dataset.parse_block(unit, block)
            rows = rows + block.num_read
            last = None
    if last is not None:
        yield dataset.parse_block(unit, last)


def _share(ids: pa.ChunkedArray, tables: Sequence[pa.ChunkedArray]) -> float | None:
    if not tables or not len(ids):
        return None
    distinct = pc.unique(ids)
    share: float = pc.mean(pc.is_in(distinct, _joined(tables)).cast(pa.float64())).as_py()
    return share


def _joined(tables: Sequence[pa.ChunkedArray]) -> pa.Array:
    return pa.concat_arrays([chunk for table in tables for chunk in table.chunks])


def _shown(column: Column) -> str:
    assert column.kind is not None
    return f"{column.name} ({column.kind.value})"


def _named(columns: Sequence[Column]) -> str:
    return "".join(f"{_shown(column)}, " for column in columns)
