"""Job `events`: raw rows → events by user, user and item profiles, dead letters with their reasons.

Every raw row is an event, a strike of one, or a dead letter. A row is set aside by its dataset's `parse`, by a
limit of the contract, by `--as_of`, or because another line of the same event holds in its place
(`feature_repo/raw/lines.py`); a profile row by a limit alone, and that costs no other row.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_jobs.engine.build import BuildTables
from beam_jobs.engine.job import Job
from beam_jobs.engine.options import TableOptions
from beam_jobs.engine.partition import (
    Key,
    Piece,
    sort_by_key_and_time,
    split_by_hash,
    split_by_key,
    to_ipc,
)
from beam_jobs.engine.parts import Built
from beam_jobs.engine.plan import RunPlan, Unit
from beam_jobs.errors import LostRowsError
from feature_repo import datasets
from feature_repo.contract import limits
from feature_repo.contract.arrow import arrow_schema, micros, micros_iso
from feature_repo.contract.contract import REPLACED, Contract
from feature_repo.contract.counts import Counts
from feature_repo.contract.meaning import meanings_of, to_json
from feature_repo.contract.schema import DatasetSpec, Table
from feature_repo.history.history import run_starts
from feature_repo.history.known import known_before, known_from
from feature_repo.home.erased import REDACTED, Erased, erased_of
from feature_repo.home.tables import Part, parquet_bytes
from feature_repo.raw import lines
from feature_repo.raw.acknowledged import joined_by_content, joined_by_identity, parse_acknowledged
from feature_repo.raw.parse import NOT_BAD, user_columns, wanted
from feature_repo.settings import Settings
from feature_repo.store import received

# Schema metadata of a unit's dead letters: its counts
COUNTS = b"counts"
LATE = "time is at or after --as_of"
# Pieces of lines by their events' identity, of lines that are no event, and their column that says why
RECEIVED = received.FOLDER
LINES = "lines"
DROPPED = "dropped"
REASON = "__reason"
NOBODY_ERASED = Erased()


MAX_BLOCKS = 1 << 20  # of one unit


def num_partitions(plan: RunPlan) -> int:
    """As the options say."""
    assert isinstance(plan.options, TableOptions)
    return plan.options.num_partitions


def parse_unit(plan: RunPlan, unit: Unit) -> Iterator[tuple[Key, Piece]]:
    """One raw unit, or a file of acknowledged events, as keyed pieces, and its dead letters with its counts."""
    counts = Counts()
    letters = [arrow_schema(plan.contract.table("dead_letters")).empty_table()]
    erased = erased_of(plan.home)
    for number, parsed in enumerate(_parsed(plan, unit)):
        sifted = sift(plan, unit, parsed, erased)
        counts += sifted.counts
        letters.append(sifted.dead_letters)
        for key, rows in sifted.by_key(plan, unit):
            yield key, (unit.number * MAX_BLOCKS + number, to_ipc(rows))
    dead = pa.concat_tables(letters).replace_schema_metadata(
        {COUNTS: json.dumps(asdict(counts)).encode()}
    )
    yield ("dead_letters", unit.number), (unit.number, to_ipc(dead))


def _parsed(plan: RunPlan, unit: Unit) -> Iterable[datasets.Parsed]:
    if unit.table != RECEIVED:
        return datasets.load(plan.dataset).parse(unit.source)
    rows = received.Received(plan.home, plan.contract).read(unit.source)
    return [parse_acknowledged(plan.contract, rows, unit.source.file)]


@dataclass(frozen=True)
class Sifted:
    """The rows of a parsed block, by table; the dead letters; and counts of each."""

    rows: dict[str, pa.Table]
    dead_letters: pa.Table
    counts: Counts

    def by_key(self, plan: RunPlan, unit: Unit) -> Iterator[tuple[Key, pa.Table]]:
        """The rows by table and partition; lines of events that may change their user by identity."""
        user = plan.contract.user.join_key
        number = num_partitions(plan)
        for table, rows in self.rows.items():
            if not rows.num_rows:
                continue
            if table == "events" and lines.is_identified(rows):
                rows = lines.numbered(rows, unit.number)
                if across_users(plan):
                    hashes = lines.identity_hashes(rows, plan.contract.spec.event_identity)
                    for partition, piece in split_by_hash(rows, hashes, number):
                        yield (LINES, partition), piece
                    continue
            key = plan.contract.item.join_key if table == "item_profile" else user
            for partition, piece in split_by_key(rows, key, number):
                yield (table, partition), piece


def across_users(plan: RunPlan) -> bool:
    """Return whether lines of one event may name several users."""
    identity = plan.contract.spec.event_identity
    return bool(identity) and plan.contract.user.join_key not in identity


def sift(
    plan: RunPlan, unit: Unit, parsed: datasets.Parsed, erased: Erased = NOBODY_ERASED
) -> Sifted:
    """Leave out users who were erased; set aside what breaks a limit, and what the run may not know."""
    contract = plan.contract
    user = plan.contract.user.join_key
    letters = [redacted(contract, parsed.dead_letters, erased)]
    counts: Counter[str] = Counter()

    # 1. Who was erased.
    remaining = erased.without(parsed.events, user)
    strikes = erased.without(parsed.strikes, user)
    if erased and across_users(plan):
        # An event that moved to an erased user must not fall back to the one who had it before.
        strikes = pa.concat_tables(
            [strikes, lines.as_strikes(_held(parsed.events, erased, user), user)]
        )
    users = erased.without(parsed.users, user)
    counts["events_erased"] = parsed.events.num_rows - remaining.num_rows

    # 2. What breaks a limit of the contract, row by row.
    events = limits.check(contract.table("events"), remaining)
    letters.append(_letters(plan, unit, remaining.take(pa.array(events.dead)), events.reasons))
    profiles = {}
    for name, rows in (("user_profile", users), ("item_profile", parsed.items)):
        checked = limits.check(contract.table(name), rows)
        reasons = [f"{name}, {reason}" for reason in checked.reasons]
        letters.append(_letters(plan, unit, rows.take(pa.array(checked.dead)), reasons))
        counts.update({f"read_{name}": rows.num_rows, f"dead_{name}": len(checked.dead)})
        counts["profile_rows_dead"] += len(checked.dead)
        counts["nulls_dropped_from_lists"] += checked.nulls_dropped
        profiles[name] = checked.kept

    # 3. What the run may not know.
    known = events.kept
    if plan.as_of is not None:
        late = known_from(known) >= plan.as_of
        letters.append(_letters(plan, unit, known.filter(pa.array(late)), [LATE] * int(late.sum())))
        known = known.filter(pa.array(~late))
        if strikes.num_rows:
            arrived = pc.fill_null(pc.cast(strikes[lines.ARRIVED], pa.int64()), 0).to_numpy()
            strikes = strikes.filter(pa.array(arrived < plan.as_of))
        profiles = {
            n: rows.filter(pa.array(_known_of_profile(rows) <= plan.as_of))
            for n, rows in profiles.items()
        }

    counts["events_dead"] = remaining.num_rows - known.num_rows
    if unit.table == RECEIVED:
        counts["acknowledged_dead"] = len(events.dead) + parsed.counts["rows_dead"]
    rows = {"events": pa.concat_tables([known, strikes]), **profiles}
    return Sifted(rows, pa.concat_tables(letters), parsed.counts + Counts(counts))


def _held(events: pa.Table, erased: Erased, user: str) -> pa.Table:
    """The events of erased users."""
    return events.filter(pa.array(erased.holds(events[user])))


def redacted(contract: Contract, letters: pa.Table, erased: Erased) -> pa.Table:
    """Dead letters that keep their reasons and places, and of erased users nothing else."""
    if not erased or not letters.num_rows:
        return letters
    raw = letters["raw"].to_pylist()
    theirs = erased.in_raw(raw, user_columns(contract.spec), contract.user.join_key)
    blanked = [REDACTED if is_theirs else row for row, is_theirs in zip(raw, theirs, strict=True)]
    place = letters.schema.get_field_index("raw")
    return letters.set_column(place, letters.schema.field(place), pa.array(blanked, pa.string()))


def build(plan: RunPlan, key: Key, rows: pa.Table) -> Iterator[Built]:
    """One partition of one table, sorted; events once each, profiles only where a row changes
    something.
    """
    table, partition = key
    # Dead letters need no order, and carry their counts in the schema's metadata.
    if table == "dead_letters":
        counts = Counts(**json.loads((rows.schema.metadata or {})[COUNTS]))
        yield _dead_letter_part(
            rows.replace_schema_metadata(None), f"part-{partition:05d}.parquet", counts
        )
        return
    counts = Counts()
    if table == DROPPED:
        yield _dropped_part(plan, rows, f"resolved-{partition:05d}.parquet")
        return
    if table == "events":
        if lines.is_identified(rows):
            resolved = _resolved(plan, rows)
            rows = resolved.events
            if resolved.reasons:
                yield _dropped_part(plan, _dropped(resolved), f"repeated-{partition:05d}.parquet")
        joined = joined_by_content(plan.contract, rows)
        if joined.repeated.num_rows:
            again = _because(joined.repeated, lines.REPEATED)
            yield _dropped_part(plan, again, f"acknowledged-{partition:05d}.parquet")
            rows = joined.rows
        # Ties in time go by place and content, so that names of files decide nothing.
        ties = ("source_position", plan.contract.item.join_key, "action")
        rows = sort_by_key_and_time(rows, plan.contract.user.join_key, ties)
        counts = _counts_of(rows)
    else:
        entity = plan.contract.table(table).entity
        assert entity is not None
        by_time = sort_by_key_and_time(rows, entity.join_key, ("created_timestamp",))
        rows = changes_only(by_time, entity.join_key)
    yield Built(table, f"part-{partition:05d}.parquet", parquet_bytes(rows), rows.num_rows, counts)


def resolve(plan: RunPlan, key: Key, rows: pa.Table) -> Iterator[tuple[Key, Piece]]:
    """One partition of lines, all of each event, as events by user; lines that come to no event as `DROPPED`."""
    resolved = _resolved(plan, rows)
    user = plan.contract.user.join_key
    for partition, piece in split_by_key(resolved.events, user, num_partitions(plan)):
        yield ("events", partition), (key[1], to_ipc(piece))
    if resolved.reasons:
        yield (DROPPED, key[1]), (key[1], to_ipc(_dropped(resolved)))


def _resolved(plan: RunPlan, rows: pa.Table) -> lines.Resolved:
    """The events that lines come to, an acknowledged one and a file's that say the same being one."""
    joined = joined_by_identity(plan.contract, rows)
    found = lines.resolve(joined.rows, plan.contract.spec.event_identity)
    again = joined.repeated.select(found.dropped.column_names)
    reasons = [*found.reasons, *[lines.REPEATED] * again.num_rows]
    return lines.Resolved(found.events, pa.concat_tables([found.dropped, again]), reasons)


def _because(rows: pa.Table, reason: str) -> pa.Table:
    """Rows that are no event, with the reason."""
    return rows.append_column(REASON, pa.array([reason] * rows.num_rows, pa.string()))


def _counts_of(events: pa.Table) -> Counts:
    """How many events were replaced later, and when the last one of all arrived or was."""
    replaced = events[REPLACED.name].drop_null()
    latest = int(known_from(events).max()) if events.num_rows else None
    if len(replaced):
        latest = max(latest or 0, int(micros(replaced).max()))
    return Counts({"events_replaced": len(replaced)}, latest=latest)


def _dropped(resolved: lines.Resolved) -> pa.Table:
    reasons = pa.array(resolved.reasons, pa.string())
    return resolved.dropped.append_column(REASON, reasons)


def _dropped_part(plan: RunPlan, dropped: pa.Table, name: str) -> Built:
    reasons = dropped[REASON].to_pylist()
    letters = _letters(plan, None, dropped.drop_columns([REASON]), reasons)
    return _dead_letter_part(letters, name, Counts({"events_dead": len(reasons)}))


def _known_of_profile(rows: pa.Table) -> np.ndarray:
    """Microseconds from which each row of a profile is known."""
    return np.maximum(micros(rows["event_timestamp"]), micros(rows["created_timestamp"]))


def _dead_letter_part(letters: pa.Table, name: str, counts: Counts) -> Built:
    counts += Counts(dead=Counter(letters["reason"].to_pylist()))
    return Built("dead_letters", name, parquet_bytes(letters), letters.num_rows, counts)


def changes_only(rows: pa.Table, key: str) -> pa.Table:
    """Keep, of rows sorted by key and time, the last of each instant, and among these the ones that differ
    from the one before.
    """
    if not rows.num_rows:
        return rows
    stamps = ["event_timestamp", "created_timestamp"]
    ends_instant = np.r_[_differs(rows, [key, *stamps]), True]
    rows = rows.filter(pa.array(ends_instant))
    values = [name for name in rows.column_names if name not in stamps]
    changes = np.r_[True, _differs(rows, values)]
    # A row that came before the one that it repeats tells of it while that one is not known.
    made = micros(rows["created_timestamp"])
    earlier = np.r_[False, made[1:] < made[:-1]]
    return rows.filter(pa.array(changes | earlier))


def _differs(rows: pa.Table, columns: list[str]) -> np.ndarray:
    """For each row but the last: whether the next one differs in any of these columns."""
    differs = np.zeros(max(rows.num_rows - 1, 0), bool)
    for name in columns:
        values = rows[name].combine_chunks()
        if pa.types.is_list(values.type):
            differs |= _lists_differ(values)
            continue
        codes = values.dictionary_encode(null_encoding="encode").indices
        starts = np.zeros(rows.num_rows, bool)
        starts[run_starts(codes)] = True
        differs |= starts[1:]
    return differs


def _lists_differ(lists: pa.Array) -> np.ndarray:
    """For each list but the last: whether the next one differs."""
    joined = pc.cast(lists, pa.list_(pa.string()))
    # A separator that no text of a log holds; null and empty are told apart by the lengths.
    text = pc.fill_null(pc.binary_join(joined, "\x1f"), "")
    lengths = pc.fill_null(pc.list_value_length(lists), -1)
    differs = np.zeros(max(len(lists) - 1, 0), bool)
    for column in (text, lengths):
        changed = np.zeros(len(lists), bool)
        changed[run_starts(column)] = True
        differs |= changed[1:]
    return differs


def _letters(plan: RunPlan, unit: Unit | None, rows: pa.Table, reasons: list[str]) -> pa.Table:
    """Rows of a built table as dead letters. Where they stood is known of events alone, and of
    their file in their unit.
    """
    number = rows.num_rows
    has_position = "source_position" in rows.column_names
    return pa.table(
        [
            pa.array(
                ["" if unit is None else unit.source.file.rsplit("/", 1)[-1]] * number, pa.string()
            ),
            rows["source_position"] if has_position else pa.nulls(number, pa.int64()),
            pa.array(reasons, pa.string()),
            pa.array(limits.raw_rows(rows, np.arange(number)), pa.string()),
        ],
        schema=arrow_schema(plan.contract.table("dead_letters")),
    )


def by_user(plan: RunPlan, unit: Unit) -> Iterator[tuple[Key, Piece]]:
    """One built part of `events` as pieces by user; events at or after `as_of` are left out."""
    return _read_events(plan, unit, plan.contract.user.join_key)


def by_item(plan: RunPlan, unit: Unit) -> Iterator[tuple[Key, Piece]]:
    """One built part of `events` as pieces by item; events at or after `as_of` are left out."""
    return _read_events(plan, unit, plan.contract.item.join_key)


def _read_events(plan: RunPlan, unit: Unit, key: str) -> Iterator[tuple[Key, Piece]]:
    events = plan.read_unit(unit)
    if plan.as_of is not None:
        events = known_before(events, plan.as_of)
    for partition, piece in split_by_key(events, key, num_partitions(plan)):
        yield ("events", partition), (unit.number, to_ipc(piece))


def in_histories(contract: Contract, events: pa.Table) -> pa.Table:
    """Events without impressions, which are in no history and no statistic."""
    if not contract.spec.shown:
        return events
    allowed = pa.array(contract.history_actions, pa.int8())
    return events.filter(pc.is_in(events["action"].combine_chunks(), allowed))


def raw_table(spec: DatasetSpec) -> Table:
    """The raw events' table as it is read, with the limits of our columns."""
    derives = bool(spec.events.derived or spec.events.raw)
    # What a dataset's own code replaces has its limits afterwards, not before.
    columns = (
        replace(c, minimum=None, maximum=None, pattern=None) if derives else c
        for c, _ in wanted(spec, "events")
    )
    return Table("raw_events", f"Raw events of {spec.title}, as they are read.", tuple(columns))


def raw_gate(plan: RunPlan, units: Sequence[Unit], settings: Settings) -> str | None:
    """A sample of the raw rows, read as their types declare, against the raw table's limits; what
    cannot be read counts as missing. `account` judges every row, once all are read.

    Raises:
        GateError: too many rows are bad.
    """
    from feature_repo.contract import expectations

    dataset = datasets.load(plan.dataset)
    events = [unit for unit in units if unit.table == "raw" and unit.source.kind == "events"]
    sampled = expectations.spread(events, [unit.rows for unit in events])
    erased = erased_of(plan.home)
    user = plan.contract.user.join_key
    raw = (rows for unit in sampled for rows in dataset.read_raw(unit.source))
    # Nobody finds them in a report either
    if erased:
        raw = (erased.without(rows, user) if user in rows.column_names else rows for rows in raw)
    # A line that strikes an event need not say more than which.
    raw = (without_strikes(rows) for rows in raw)
    batches = expectations.rebatch(expectations.first_rows(raw))
    table = raw_table(dataset.spec)
    return expectations.gate(table, batches, settings.path("expectations"), _limit(plan)).docs


def without_strikes(rows: pa.Table) -> pa.Table:
    """Raw rows without the ones that strike an event."""
    if lines.DELETED not in rows.column_names:
        return rows
    strikes = pc.fill_null(rows[lines.DELETED], 0)
    return rows.filter(pc.equal(strikes, 0))


def account(plan: RunPlan, units: Sequence[Unit], counts: Counts) -> None:
    """Check that every raw row came out as an event or a dead letter, and not too many as dead letters.

    Raises:
        LostRowsError: a row came out as neither.
        RawDataError: not one row is an event, or the newest is yet to come.
        GateError: more rows are dead letters than is allowed, or more than half of a profile's
            rows.
    """
    # 1. Every row must be accounted for: kept, a dead letter, or of an erased user.
    raw = [unit for unit in units if unit.table == RECEIVED or unit.source.kind == "events"]
    given = None if any(unit.rows < 0 for unit in raw) else sum(unit.rows for unit in raw)
    read = counts["rows_read"]
    used = counts["rows_used"]
    dead = counts["rows_dead"]
    made = counts["events_made"]
    kept = counts["rows_events"]
    lost = counts["events_dead"]
    gone = counts["events_erased"]
    # A compressed file knows how many rows it has only once it is read.
    if given not in (None, read) or read != used + dead or made != kept + lost + gone:
        raise LostRowsError(
            f"{'unknown' if given is None else f'{given:,}'} raw rows, {read:,} read, {used:,} used + {dead:,} dead; "
            f"{made:,} events made, {kept:,} kept + {lost:,} dead + {gone:,} of erased users: the run was not published"
        )
    # 2. Without any event, the dataset or --as_of must be wrong.
    if not kept:
        raise datasets.RawDataError(
            f"all {read:,} raw rows are dead letters: is this {plan.dataset!r}, and --as_of right? Nothing was published. "
            f"Reasons:{_listed(counts)}"
        )
    _refuse_too_many_dead(plan, counts)
    # 3. One wrong clock would move the end of the data, which the newest event sets.
    newest = counts.latest
    if plan.as_of is None and newest is not None and newest > time.time() * 1e6:
        raise datasets.RawDataError(
            f"the newest event happened or arrived at {micros_iso(newest)}, which is yet to come: pass --as_of, and later "
            "rows become dead letters. Nothing was published"
        )


def _refuse_too_many_dead(plan: RunPlan, counts: Counts) -> None:
    from feature_repo.contract.expectations import GateError

    limit = _limit(plan)
    # What a server once took says nothing of the files.
    read = counts["rows_read"] - counts["rows_acknowledged"]
    excused = sum(counts.dead.get(reason, 0) for reason in (LATE, *NOT_BAD))
    excused += counts["acknowledged_dead"]
    dead = counts["rows_dead"] + counts["events_dead"] - excused
    if dead > limit * read:
        raise GateError(
            f"{dead:,} of {read:,} raw rows are dead letters ({dead / read:.1%}); --max_bad_fraction allows {limit:.1%}. "
            f"Nothing was published. Reasons:{_listed(counts)}"
        )
    for table in ("user_profile", "item_profile"):
        lost = counts[f"dead_{table}"]
        rows = counts[f"read_{table}"]
        if 2 * lost > rows:
            raise GateError(
                f"{lost:,} of {rows:,} rows for {table} break the contract. Nothing was published. Reasons:{_listed(counts)}"
            )


def _limit(plan: RunPlan) -> float:
    return (
        plan.contract.spec.max_bad_fraction
        if plan.max_bad_fraction is None
        else plan.max_bad_fraction
    )


def _listed(counts: Counts) -> str:
    return "".join(f"\n{reason}" for reason in counts.reasons())


class EventsJob(Job):
    """Raw rows → events, profiles and dead letters; every raw row is accounted for."""

    name = "events"
    doc = "raw rows → events by user, profiles, dead letters"
    # What servers acknowledged comes first: where nothing says when a file's line arrived, that line is the later one.
    reads: ClassVar = {RECEIVED: (), "raw": ()}
    also_depends_on = ("erased",)
    set_aside = ("dead_letters",)

    def gate(self, plan: RunPlan, units: Sequence[Unit], settings: Settings) -> str | None:
        """Check a sample of the raw rows."""
        return raw_gate(plan, units, settings)

    def steps(self, plan: RunPlan) -> beam.PTransform:
        """Raw units → pieces by user → parts; where an event may change its user, by identity before."""
        if across_users(plan):
            return BuildTables(plan, parse_unit, build, resolve, LINES)
        return BuildTables(plan, parse_unit, build)

    def num_parts(self, plan: RunPlan, units: int) -> int:
        """Three tables and what other lines replaced in each partition, and dead letters of each unit."""
        return 6 * num_partitions(plan) + units

    def account(self, plan: RunPlan, units: Sequence[Unit], counts: Counts) -> None:
        """Refuse lost rows, and too many dead letters."""
        account(plan, units, counts)

    def as_of(self, plan: RunPlan, counts: Counts) -> int:
        """Return the time just after the last event happened or arrived, unless another was asked for."""
        assert counts.latest is not None
        return counts.latest + 1 if plan.as_of is None else plan.as_of

    def columns(self, plan: RunPlan, tables: Mapping[str, Sequence[Part]]) -> dict[str, Any]:
        """Say what columns mean, by a sample of the parts that is the same for every run of a size."""
        from feature_repo.contract import expectations

        def read(table: str, columns: list[str]) -> pa.Table:
            parts = expectations.spread(tables[table], [part.rows for part in tables[table]])
            sampled = (plan.folder.read_path(plan.folder.verified(p), columns) for p in parts)
            return pa.concat_tables(sampled)

        dataset = datasets.load(plan.dataset)
        return to_json(meanings_of(plan.contract, dataset.code, read))

    def finish(self, plan: RunPlan, counts: Counts | None, settings: Settings) -> list[str]:
        """Drop the acknowledged events that the published run has from the online store's log."""
        manifest = plan.folder.require()
        line = received.trim(settings, plan.contract, manifest.received)
        return [line] if line else []

    def built_limit(self, plan: RunPlan) -> float:
        """Return 0: `max_bad_fraction` is about raw rows here."""
        return 0.0

    def headline(self, counts: Counts) -> str:
        """Say how many rows became what."""
        used = counts["rows_used"]
        made = counts["events_made"]
        kept = counts["rows_events"]
        events = "" if made == used == kept else f"; {made:,} events, {kept:,} kept"
        if by_http := counts["rows_acknowledged"]:
            events += f"; {by_http:,} rows came by HTTP"
        return f"read {counts['rows_read']:,} = used {used:,} + dead letters {counts['rows_dead']:,}{events}"


JOB = EventsJob()
