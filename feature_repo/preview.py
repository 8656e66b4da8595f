"""What `python -m feature_repo check` tells of a dataset in seconds, without Beam: rows are read,
parsed and asked about as the jobs would, and nothing is written.

At most `ROWS` rows are read, from the beginning and the end of the log: enough for every slip of a
declaration to show, and the figures say of how many rows they are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo import limits
from feature_repo.arrow import arrow_schema, iso_micros, micros, micros_iso
from feature_repo.contract import Contract
from feature_repo.datasets import Dataset, Parsed, RawUnit
from feature_repo.examples import UNDEFINED, requests_of
from feature_repo.parse import REPEATED, without_repeats
from feature_repo.schema import EVENT_TIMESTAMP, Column, Examples
from feature_repo.transforms import CONTEXT_FIELDS, MATCH_FEATURES, USER_FEATURES

ROWS = 500_000
SHOWN_EVENTS = 10


@dataclass(frozen=True)
class Preview:
    """What was read.

    Args:
        events: within all limits, sorted by user and time.
        dead: dead letters by reason.
        rows: raw rows that were read; `of_rows` how many there are, where that is known.
        cut: values of bags that no ranker reads, by column.
        known_items, known_users: share of the events' ids that their profiles know; None where these
            come from the events themselves.
    """

    contract: Contract
    events: pa.Table
    dead: Counter[str]
    rows: int
    of_rows: int | None
    cut: Counter[str]
    known_items: float | None
    known_users: float | None

    @property
    def whole(self) -> bool:
        """Whether every row was read."""
        return self.of_rows == self.rows

    def lines(self) -> Iterator[str]:
        """The preview as text."""
        yield from self._rows()
        yield from self._events()
        yield from self._requests()
        yield from self._read()

    def problems(self) -> list[str]:
        """What must be mended before the road can be walked."""
        found = []
        if not len(self.events):
            found.append("not one row is an event")
            return found
        dead, limit = sum(self.dead.values()), self.contract.spec.max_bad_fraction
        dead -= self.dead[REPEATED]  # which says nothing against the data
        if dead > limit * self.rows:
            found.append(
                f"{dead:,} of {self.rows:,} rows are dead letters ({dead / self.rows:.1%}); SPEC.max_bad_fraction allows {limit:.1%}"
            )
        times, rules = micros(self.events[EVENT_TIMESTAMP]), self.contract.spec.requests
        for name in ("validation_from", "test_from"):
            cut = iso_micros(getattr(rules, name))
            if not times.min() < cut < times.max():
                found.append(
                    f"requests.{name} is {getattr(rules, name)}, and events run from {micros_iso(int(times.min()))} to "
                    f"{micros_iso(int(times.max()))}"
                )
        for name, share in (("items", self.known_items), ("users", self.known_users)):
            if share == 0:
                found.append(
                    f"the table of {name} knows none of the events' {name}: are the ids the same?"
                )
        requests = requests_of(self.contract, self.events)
        if not len(requests.first_event):
            found.append(f"no request comes of requests.examples={rules.examples.value}")
        for number, name in enumerate(self.contract.labels):
            if len(requests.labels) and not (requests.labels[:, number] == 1).any():
                found.append(f"no example has {name} = 1")
        return found

    def _rows(self) -> Iterator[str]:
        known = (
            ""
            if self.whole
            else f" of {'unknown' if self.of_rows is None else f'{self.of_rows:,}'}"
        )
        yield f"{self.rows:,}{known} rows read: {len(self.events):,} events, {sum(self.dead.values()):,} dead letters"
        for reason, number in self.dead.most_common(10):
            yield f"  {number:,}  {reason}"
        for name, number in self.cut.items():
            if number:
                yield f"  {number:,}  values of {name.removeprefix('cut: ')} beyond those that are read"
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
        found, rules = requests_of(self.contract, self.events), self.contract.spec.requests
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


def preview(dataset: Dataset, data: str | None) -> Preview:
    """Read what there is time for.

    Raises:
        RawDataError: a source is missing, or of another shape.
    """
    contract = dataset.contract
    units = dataset.raw_units(data)
    events = [unit for unit in units if unit.kind == "events"]
    known = all(unit.rows >= 0 for unit in events)
    read = [p for unit in _some(events) for p in _parsed(dataset, unit)]
    dead: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    kept = [arrow_schema(contract.table("events")).empty_table()]
    for parsed in read:
        checked = limits.check(contract.table("events"), parsed.events)
        dead.update(parsed.dead_letters["reason"].to_pylist())
        dead.update(checked.reasons)
        counts.update(parsed.counts)
        kept.append(checked.kept)
    user, item = contract.user.join_key, contract.item.join_key
    order = [(user, "ascending"), (EVENT_TIMESTAMP, "ascending"), ("source_position", "ascending")]
    table = pa.concat_tables(kept).sort_by(order).combine_chunks()
    table, repeated = without_repeats(table, contract.spec.event_identity)
    dead.update({REPEATED: len(repeated)} if len(repeated) else {})
    profiles = {
        kind: [p for unit in units if unit.kind == kind for p in dataset.parse(unit)]
        for kind in ("users", "items")
    }
    return Preview(
        contract,
        table,
        dead,
        counts["rows_read"],
        sum(unit.rows for unit in events) if known else None,
        Counter({name: n for name, n in counts.items() if name.startswith("cut: ")}),
        _share(table[item], [p.items[item] for p in profiles["items"]]),
        _share(table[user], [p.users[user] for p in profiles["users"]]),
    )


def _some(units: Sequence[RawUnit]) -> list[RawUnit]:
    """Units from both ends of the log, as many as `ROWS` allows, and at least the two ends."""
    if sum(max(unit.rows, 0) for unit in units) <= ROWS:
        return list(units)
    chosen = {0, len(units) - 1}
    rows = sum(units[at].rows for at in chosen)
    for at in np.linspace(0, len(units) - 1, len(units)).astype(int).tolist():
        if at not in chosen and rows + units[at].rows <= ROWS:
            chosen.add(at)
            rows += units[at].rows
    return [units[at] for at in sorted(chosen)]


def _parsed(dataset: Dataset, unit: RawUnit) -> Iterator[Parsed]:
    """Blocks of a unit, until enough rows are read."""
    rows = 0
    for parsed in dataset.parse(unit):
        yield parsed
        rows += parsed.counts["rows_read"]
        if rows >= ROWS:
            return


def _share(ids: pa.ChunkedArray, tables: Sequence[pa.ChunkedArray]) -> float | None:
    if not tables or not len(ids):
        return None
    known = pa.concat_arrays([chunk for table in tables for chunk in table.chunks])
    distinct = pc.unique(ids)
    share: float = pc.mean(pc.is_in(distinct, known).cast(pa.float64())).as_py()
    return share


def _shown(column: Column) -> str:
    assert column.kind is not None
    return f"{column.name} ({column.kind.value})"


def _named(columns: Sequence[Column]) -> str:
    return "".join(f"{_shown(column)}, " for column in columns)
