"""Job `training_examples`: events and item statistics → requests with candidates, labels, context
and their period.

Which events are asked about together follows from the declaration (`feature_repo/raw/examples.py`).
Where a log has actions alone, negatives are drawn from the items on offer: half by popularity to
date, half uniformly, without repeats and never a positive. The draw is seeded by request, so it
does not depend on partitions or order.

On offer are the items that are known by the request's time: by a row of `item_profile`, or by
statistics, whichever arrived first. Were negatives drawn from items with statistics alone, which an item has from the
midnight after its first event on, every candidate without any would be a positive, and a model
would rank whatever it does not know first. Nothing that becomes known later has a part in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from beam_jobs.engine.build import BuildTables
from beam_jobs.engine.job import Job, refuse_lost_events
from beam_jobs.engine.options import ExampleOptions
from beam_jobs.engine.partition import Key, sort_by_key_and_time
from beam_jobs.engine.parts import Built
from beam_jobs.engine.plan import ReadOnce, RunPlan, Unit
from beam_jobs.errors import NotEnoughItemsError
from beam_jobs.jobs.events import by_user, num_partitions
from feature_repo import datasets
from feature_repo.contract.arrow import (
    arrow_schema,
    from_micros,
    hash_keys,
    iso_micros,
    micros,
    micros_iso,
)
from feature_repo.contract.contract import Contract
from feature_repo.contract.counts import Counts
from feature_repo.contract.key_index import KeyIndex
from feature_repo.errors import DeclarationError
from feature_repo.history.history import run_ends, run_starts
from feature_repo.history.known import that_hold
from feature_repo.home.tables import parquet_bytes
from feature_repo.raw.examples import UNDEFINED, requests_of

PERIODS = ("train", "validation", "test")
# Draws before the popularity half is filled uniformly, where a few items hold nearly all events
POPULARITY_ROUNDS = 20


class ItemPool:
    """Items on offer at a given time, with their counts of events by then, swept forward in time.

    Args:
        items: all of them, sorted.
        stats: rows of `item_stats`.
        profiles: rows of `item_profile`; the first says since when an item is known that has no
            statistics yet.
    """

    def __init__(self, items: pa.Array, stats: pa.Table, profiles: pa.Table, item_key: str) -> None:
        self.items = items
        index = KeyIndex(items)
        stamps = micros(stats["event_timestamp"])
        order = np.argsort(stamps, kind="stable")
        self._stamps = stamps[order]
        self._item = index.places(stats[item_key])[order]
        self._count = stats["count_total"].to_numpy()[order]
        first = np.full(len(items), np.iinfo(np.int64).max)
        np.minimum.at(first, self._item, self._stamps)
        made = np.maximum(
            micros(profiles["event_timestamp"]), micros(profiles["created_timestamp"])
        )
        np.minimum.at(first, index.places(profiles[item_key]), made)
        self._offered_from = first
        self._offers = np.sort(self._offered_from)
        self._now = np.zeros(len(items), np.int64)
        self._next = self._next_offer = 0
        self._taken = np.zeros(len(items), bool)
        self.known = np.zeros(0, np.int64)
        self.cumulative = np.zeros(0, np.int64)
        self.offered = np.zeros(0, np.int64)

    def advance(self, time: int) -> None:
        """Move to a time not before the last one: rows stamped at or before it are known."""
        end = int(np.searchsorted(self._stamps, time, side="right"))
        if end > self._next:
            self._now[self._item[self._next : end]] = self._count[self._next : end]
            self._next = end
            self.known = np.flatnonzero(self._now)
            self.cumulative = np.cumsum(self._now[self.known])
        offers = int(np.searchsorted(self._offers, time, side="right"))
        if offers > self._next_offer:
            self._next_offer = offers
            self.offered = np.flatnonzero(self._offered_from <= time)

    def draw(self, rng: np.random.Generator, positives: np.ndarray, number: int) -> np.ndarray:
        """Distinct items on offer that are no positives: half by popularity, half uniform; fewer
        where fewer are left.
        """
        # One array serves all draws: the end of this function clears what is set here.
        taken = self._taken
        taken[positives] = True
        number = min(number, int((~taken[self.offered]).sum()))
        chosen = [positives[:0]]
        for by_popularity, missing in ((True, number // 2), (False, number - number // 2)):
            rounds = 0
            while missing:
                rounds += 1
                # Draw more than is missing, since some items are taken, or drawn twice.
                size = 2 * missing + 8
                # Where popular items are nearly all taken, the rest is drawn uniformly.
                if by_popularity and rounds <= POPULARITY_ROUNDS and len(self.known):
                    at = np.searchsorted(
                        self.cumulative, rng.integers(0, self.cumulative[-1], size), side="right"
                    )
                    drawn = self.known[at]
                else:
                    drawn = self.offered[rng.integers(0, len(self.offered), size)]
                drawn = drawn[~taken[drawn]]
                # np.unique sorts by item; the order of the draw decides which items stay.
                _, first = np.unique(drawn, return_index=True)
                drawn = drawn[np.sort(first)][:missing]
                taken[drawn] = True
                chosen.append(drawn)
                missing -= len(drawn)
        result = np.concatenate(chosen)
        taken[positives] = taken[result] = False
        return result


@dataclass(frozen=True)
class ItemTables:
    """Statistics and profiles of items, as a run reads them."""

    stats: pa.Table
    profiles: pa.Table


def _read_item_tables(plan: RunPlan) -> ItemTables:
    """Both tables of the very runs that this one names."""
    stats = plan.read_input("item_stats", "item_stats")
    return ItemTables(stats, plan.read_input("events", "item_profile"))


item_tables = ReadOnce(_read_item_tables)


def build(plan: RunPlan, key: Key, events: pa.Table) -> Iterator[Built]:
    """One partition of users: their requests, candidates and labels."""
    assert isinstance(plan.options, ExampleOptions)
    rows, counts = example_rows(plan.dataset, events, item_tables(plan), plan.options.seed)
    yield Built(
        "training_examples",
        f"part-{key[1]:05d}.parquet",
        parquet_bytes(rows),
        rows.num_rows,
        counts,
    )


def example_rows(
    dataset_name: str, events: pa.Table, tables: ItemTables, seed: int
) -> tuple[pa.Table, Counts]:
    """Training examples of whole users, sorted by user and request; and counts.

    Raises:
        NotEnoughItemsError: a validation or test request finds fewer negatives than the protocol
            fixes.
    """
    contract = datasets.load_contract(dataset_name)
    item_key = contract.item.join_key
    # 1. Find the requests, with their items and labels. What was corrected tells neither.
    num_events = events.num_rows
    events = sort_by_key_and_time(that_hold(events), contract.user.join_key)
    # Items are sorted, so that their numbers do not depend on the order of rows.
    known = [
        *tables.stats[item_key].chunks,
        *tables.profiles[item_key].chunks,
        *events[item_key].chunks,
    ]
    items = pc.unique(pa.chunked_array(known)).sort()
    asked = asked_of(contract, events, items)
    # 2. Draw negatives beside them.
    drawn = draw_candidates(
        asked, ItemPool(items, tables.stats, tables.profiles, item_key), contract, seed
    )
    # 3. Count what came of it, by period and label.
    counts = {
        f"requests_{name}": int((asked.period == number).sum())
        for number, name in enumerate(PERIODS)
    }
    for number, name in enumerate(contract.labels):
        counts[f"positives_{name}"] = int((asked.label[:, number] == 1).sum())
        counts[f"undefined_{name}"] = int((asked.label[:, number] == UNDEFINED).sum())
    counts["events"] = num_events
    counts |= {"repeats_in_requests": asked.repeats, "requests_short_of_negatives": drawn.short}
    seen = Counts(counts)
    if len(asked):
        seen += Counts(earliest=int(asked.times.min()), latest=int(asked.times.max()))
    return as_rows(contract, asked, drawn, items, events), seen


@dataclass(frozen=True)
class Asked:
    """Requests of some users, sorted by user and request, with the items that were acted on.

    Args:
        users: of each request.
        ordinal: running number of each request within its user, from 0.
        times: microseconds.
        period: index into `PERIODS`.
        first_event: of each request: where its context stands.
        item, label, event: of each item asked about: its place among all items, its labels (a
            column for each task), its first event. Those of request r are `[first[r], last[r])`,
            each item once.
        repeats: further events of an item in one request, which were left out.
    """

    users: pa.Array
    ordinal: np.ndarray
    times: np.ndarray
    period: np.ndarray
    first_event: np.ndarray
    item: np.ndarray
    label: np.ndarray
    event: np.ndarray
    first: np.ndarray
    last: np.ndarray
    repeats: int

    def __len__(self) -> int:
        return len(self.times)


def asked_of(contract: Contract, events: pa.Table, items: pa.Array) -> Asked:
    """Return the requests of a log, as the dataset declares.

    Args:
        events: of whole users, sorted by user and time.
        items: all item ids, sorted; items are named by their place there.
    """
    found = requests_of(contract, events)
    users = events[contract.user.join_key].combine_chunks().take(pa.array(found.first_event))
    times = micros(events["event_timestamp"])[found.first_event]
    item_of_event = KeyIndex(items).places(events[contract.item.join_key])
    first = np.flatnonzero(np.r_[True, np.diff(found.request) != 0][: len(found.request)])
    rules = contract.spec.requests
    bounds = [iso_micros(rules.validation_from), iso_micros(rules.test_from)]
    return Asked(
        users=users,
        ordinal=_number_within(users),
        times=times,
        period=np.searchsorted(bounds, times, side="right"),
        first_event=found.first_event,
        item=item_of_event[found.event],
        label=found.labels,
        event=found.event,
        first=first,
        last=np.r_[first[1:], len(found.request)].astype(np.int64),
        repeats=found.repeats,
    )


@dataclass(frozen=True)
class Drawn:
    """Candidates of each request, shuffled; and how many training requests got too few negatives.

    Args:
        candidates: items by their place among all.
        origin: which of the items asked about each one is; -1 for a drawn negative.
    """

    candidates: list[np.ndarray]
    origin: list[np.ndarray]
    short: int


def draw_candidates(asked: Asked, pool: ItemPool, contract: Contract, seed: int) -> Drawn:
    """The items of each request, and negatives beside them.

    Raises:
        NotEnoughItemsError: a validation or test request finds fewer negatives than the protocol
            fixes.
    """
    rules = contract.spec.requests
    seeds = hash_keys(asked.users)
    short = 0
    candidates: list[np.ndarray] = [np.zeros(0, np.int64)] * len(asked)
    origin: list[np.ndarray] = [np.zeros(0, np.int64)] * len(asked)
    # The pool is swept forward in time.
    for index in np.argsort(asked.times, kind="stable"):
        numbers = np.arange(asked.first[index], asked.last[index])
        own = asked.item[numbers]
        evaluated = bool(asked.period[index])
        time = int(asked.times[index])
        positives = int((asked.label[numbers] == 1).any(axis=1).sum())
        wanted = (
            rules.eval_negatives if evaluated else rules.train_negatives_per_positive * positives
        )
        # Of the request alone, so that neither partitions nor the order of requests change its
        # draw.
        rng = np.random.default_rng([seed, int(seeds[index]), time, int(asked.ordinal[index])])
        pool.advance(time)
        negatives = pool.draw(rng, own, wanted) if wanted else own[:0]
        if evaluated and len(negatives) < wanted:
            raise NotEnoughItemsError(
                f"request {asked.ordinal[index]} of user {asked.users[int(index)]} finds {len(negatives)} items on offer, the "
                f"protocol needs {wanted}: move validation_from later, or lower eval_negatives in the dataset module"
            )
        short += len(negatives) < wanted
        # Shuffled, so that a candidate's place says nothing about its label.
        shuffled = rng.permutation(len(own) + len(negatives))
        candidates[index] = np.concatenate([own, negatives])[shuffled]
        origin[index] = np.concatenate([numbers, np.full(len(negatives), -1)])[shuffled]
    return Drawn(candidates, origin, short)


def as_rows(
    contract: Contract, asked: Asked, drawn: Drawn, items: pa.Array, events: pa.Table
) -> pa.Table:
    """One row for each request and candidate, candidates of a request together."""
    # 1. What all candidates of a request share.
    owner = pa.array(np.repeat(np.arange(len(asked)), [len(c) for c in drawn.candidates]))
    names = zip(asked.users.to_pylist(), asked.ordinal.tolist(), strict=True)
    request_ids = pa.array([f"{user}:{number}" for user, number in names], pa.string())
    periods = pa.array([PERIODS[number] for number in asked.period.tolist()], pa.string())
    columns: dict[str, pa.Array] = {
        "request_id": request_ids.take(owner),
        contract.user.join_key: asked.users.take(owner),
        "event_timestamp": from_micros(asked.times).take(owner),
        "split": periods.take(owner),
    }
    of_request = pa.array(asked.first_event).take(owner)
    for column in contract.spec.context_features:
        columns[column.name] = events[column.name].combine_chunks().take(of_request)

    # 2. What is each candidate's own; a drawn negative was never shown, and nothing came of it.
    nothing = np.zeros(0, np.int64)
    origin = np.concatenate([nothing, *drawn.origin])
    columns[contract.item.join_key] = items.take(
        pa.array(np.concatenate([nothing, *drawn.candidates]))
    )
    drawn_labels = np.array([UNDEFINED if t.given else 0 for t in contract.spec.tasks], np.int8)
    labels = np.where(
        (origin < 0)[:, None], drawn_labels, asked.label[origin] if len(asked) else drawn_labels
    )
    for number, name in enumerate(contract.labels):
        columns[name] = pa.array(labels[:, number], mask=labels[:, number] == UNDEFINED)
    own_event = asked.event[origin] if len(asked) else nothing
    of_item = pa.array(own_event, mask=origin < 0)
    for column in contract.spec.shown_features:
        columns[column.name] = events[column.name].combine_chunks().take(of_item)
    schema = arrow_schema(contract.table("training_examples"))
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _number_within(keys: pa.Array) -> np.ndarray:
    """0, 1, 2, … within each run of equal keys."""
    starts = run_starts(keys)
    return np.arange(len(keys)) - np.repeat(starts, run_ends(starts, len(keys)) - starts)


def refuse_empty_periods(plan: RunPlan, counts: Counts) -> None:
    """Refuse requests that do not fall into the periods that the dataset declares.

    Raises:
        DeclarationError: no request is in the training period, or all are.
    """
    first = counts.earliest or 0
    last = counts.latest or 0
    empty = [name for name in PERIODS if not counts[f"requests_{name}"]]
    rules = plan.contract.spec.requests
    if len(empty) > 1 or "train" in empty:
        raise DeclarationError(
            f"SPEC.requests of {plan.dataset!r} puts no request into {' and '.join(empty)}: validation_from is "
            f"{rules.validation_from}, test_from {rules.test_from}, and the requests of this data run from "
            f"{micros_iso(first)} to {micros_iso(last)}. Nothing was published"
        )


class TrainingExamplesJob(Job):
    """Events and item statistics → requests with candidates and labels; every event is counted."""

    name = "training_examples"
    doc = "events and item statistics → requests with candidates and labels"
    reads: ClassVar = {"events": ("events",)}
    options = ExampleOptions
    also_depends_on = ("item_stats",)

    def steps(self, plan: RunPlan) -> beam.PTransform:
        """Events → pieces by user → parts."""
        return BuildTables(plan, by_user, build)

    def num_parts(self, plan: RunPlan, units: int) -> int:
        return num_partitions(plan)

    def account(self, plan: RunPlan, units: Sequence[Unit], counts: Counts) -> None:
        """Refuse lost events, and periods without a request."""
        refuse_lost_events(plan, units, counts)
        refuse_empty_periods(plan, counts)


JOB = TrainingExamplesJob()
