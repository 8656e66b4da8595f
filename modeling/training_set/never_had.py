"""Requests for items that their user never had: a protocol beside the usual one, where counting the item itself says
nothing.

Positives are those of a training example that its user had in no earlier event and that somebody had in the last
weeks; beside them stand items drawn by how often everybody had them in those weeks, none of which the user had. A
request without such a positive has no part. What is on offer is known from the statistics of the midnight before.

Where the users of the last weeks are all new, as on MovieLens, requests are made of each user's own end instead
(`block_examples`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract.arrow import hash_keys, micros
from feature_repo.contract.contract import Contract
from feature_repo.contract.key_index import KeyIndex
from feature_repo.contract.schema import EVENT_TIMESTAMP
from feature_repo.history.history import HistoryLog, run_ends, run_starts
from modeling.errors import DataError
from modeling.inputs.tasks import primary_number
from modeling.training_set.dataset import SPLITS
from modeling.training_set.sample import NeverHad

# Draws for one request, each of as many items as are missing and some more
ROUNDS = 50


class Sales:
    """Statistics of items over time, swept forward.

    Args:
        stats: rows of `item_stats`: item, time, and the statistic.
        by: its name.
    """

    def __init__(self, contract: Contract, stats: pa.Table, by: str) -> None:
        item = contract.item.join_key
        self.items = pc.unique(stats[item].combine_chunks())
        self.index = KeyIndex(self.items)
        stamps = micros(stats[EVENT_TIMESTAMP])
        order = np.argsort(stamps, kind="stable")
        self._stamps = stamps[order]
        self._place = self.index.places(stats[item])[order]
        self._number = stats[by].to_numpy()[order]

    def at(self, times: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """For each time, oldest first: its place among them, and the statistic of all items then; one array that the
        next step changes.
        """
        now = np.zeros(len(self.items), np.int64)
        done = 0
        for place in np.argsort(times, kind="stable"):
            end = int(np.searchsorted(self._stamps, times[place], side="right"))
            now[self._place[done:end]] = self._number[done:end]
            done = end
            yield int(place), now


def never_had_examples(
    contract: Contract,
    log: HistoryLog,
    sales: Sales,
    protocol: NeverHad,
    examples: pa.Table,
    negatives: int,
) -> pa.Table:
    """Examples of the protocol, in the shape of `training_examples`.

    Args:
        examples: whole requests, rows of one together.
        negatives: of each request, as many as are left.
    """
    examples = examples.combine_chunks()
    item = contract.item.join_key
    # 1. The requests, and what their users had by then, as places among the items that have statistics.
    requests = examples["request_id"].combine_chunks()
    starts = run_starts(requests)
    ends = run_ends(starts, len(requests))
    users = examples[contract.user.join_key].combine_chunks().take(pa.array(starts))
    times = micros(examples[EVENT_TIMESTAMP])[starts]
    rows = log.rows_of(users)
    known = log.number_known(rows, times)
    place_of_key = sales.index.places(log.items)
    places = sales.index.places(examples[item])
    ones = [_is_one(examples[name]) & (places >= 0) for name in contract.labels]
    positive = ones[primary_number(contract.spec)]
    # Of several tasks: no item that came to anything in a request is drawn as its negative.
    anything = np.logical_or.reduce(ones)
    seeds = hash_keys(users)
    # 2. Of each request the positives that stay, and negatives beside them.
    chosen: dict[int, _Chosen] = {}
    taken = np.zeros(len(sales.items), bool)
    for request, now in sales.at(times):
        own = np.arange(starts[request], ends[request])
        acted = places[own[anything[own]]]
        own = own[positive[own]]
        history = log.gather(rows[[request]], known[[request]], columns=[], times=times[[request]])
        had = place_of_key[history.item_keys]
        taken[had[had >= 0]] = True
        new = own[~taken[places[own]] & (now[places[own]] > 0)]
        if len(new):
            rng = np.random.default_rng([int(seeds[request]), int(times[request])])
            taken[acted] = True
            new = rng.permutation(new)[: protocol.most]
            chosen[request] = _Chosen.of(rng, new, _drawn(rng, now, taken, negatives))
            taken[acted] = False
        taken[had[had >= 0]] = False
    return _as_rows(contract, examples, sales.items, chosen)


def block_examples(
    contract: Contract, log: HistoryLog, schema: pa.Schema, most: int, every: tuple[int, int]
) -> Iterator[tuple[str, pa.Table]]:
    """Training, validation and test requests of each user's events of the primary action, in blocks of `most` from the
    end: rows of positives, for `never_had_examples`.

    A request is asked at the time of its block's first event; what happened at that very time belongs to it, and only
    what came earlier is known. A user's first block has no past and is left out.

    Args:
        schema: of `training_examples`.
        every: each n-th training request, each m-th of those that evaluate.

    Raises:
        DataError: the dataset has several tasks; requests like these have one label.
    """
    if len(contract.labels) > 1:
        raise DataError(
            f"requests for the ends of users' histories have one label, this dataset has {len(contract.labels)}: leave out --blocks"
        )
    rows = np.arange(len(log.users))
    events = log.gather(rows, log.lengths, columns=["action", EVENT_TIMESTAMP])
    owner = np.repeat(rows, events.lengths)
    primary = np.flatnonzero(events.columns["action"] == 0)
    owner, keys, times = owner[primary], events.item_keys[primary], events.times[primary]
    if not len(primary):
        for name in SPLITS:
            yield name, schema.empty_table()
        return
    # 1. Blocks, counted from each user's end. Events of one time are in one block: that of the last of them.
    number = np.bincount(owner, minlength=len(rows))
    behind = np.cumsum(number)[owner] - 1 - np.arange(len(owner))
    _, moment = np.unique(np.stack([owner, times]), axis=1, return_inverse=True)
    least = np.full(len(owner), len(owner))
    np.minimum.at(least, moment.ravel(), behind // most)
    block = least[moment.ravel()]
    # 2. Requests; the oldest events of a user make no whole block.
    whole = block < number[owner] // most
    (user, _), begun = np.unique(np.stack([owner, -block]), axis=1, return_inverse=True)
    begun = begun.ravel()
    asked = np.full(len(user), np.iinfo(np.int64).max)
    np.minimum.at(asked, begun, times)
    # 3. Requests with a past, each item of one once; the last one of a user is the test, and so on.
    from_end = np.searchsorted(user, user, side="right") - 1 - np.arange(len(user))
    _, once = np.unique(np.stack([begun, keys]), axis=1, return_index=True)
    once = np.sort(once)
    past = asked[begun] > events.times[events.offsets[:-1]][owner]
    kept = once[(whole & past)[once]]
    for place, name in ((2, "train"), (1, "validation"), (0, "test")):
        step = every[0] if name == "train" else every[1]
        own = kept[np.minimum(from_end[begun[kept]], 2) == place]
        _, order = np.unique(begun[own], return_inverse=True)
        own = own[order % step == 0]
        times_of = asked[begun[own]]
        yield name, _positives(contract, log, schema, begun[own], owner[own], keys[own], times_of)


def _positives(
    contract: Contract,
    log: HistoryLog,
    schema: pa.Schema,
    request: np.ndarray,
    owner: np.ndarray,
    keys: np.ndarray,
    times: np.ndarray,
) -> pa.Table:
    """Rows of `training_examples` that came to the primary action; of whatever else a row says nothing is known."""
    known = {
        "request_id": pa.array(request),
        contract.user.join_key: log.users.take(pa.array(owner)),
        contract.item.join_key: log.items.take(pa.array(keys)),
        EVENT_TIMESTAMP: pa.array(times),
        contract.labels[primary_number(contract.spec)]: pa.array(np.ones(len(request), np.int8)),
    }
    columns = []
    for field in schema:
        values = known.get(field.name)
        columns.append(
            pa.nulls(len(request), field.type) if values is None else values.cast(field.type)
        )
    return pa.table(columns, schema=pa.schema([pa.field(f.name, f.type) for f in schema]))


def _is_one(label: pa.ChunkedArray) -> np.ndarray:
    """Bool; not where a label is undefined."""
    return pc.fill_null(pc.equal(label, 1), False).to_numpy(zero_copy_only=False)


@dataclass(frozen=True)
class _Chosen:
    """Candidates of one request, shuffled, so that a place says nothing about a label.

    Args:
        rows: of the example that each comes from: a positive's own, a negative's any of the request.
        drawn: places of negatives among the items; -1 of a positive.
    """

    rows: np.ndarray
    drawn: np.ndarray

    @staticmethod
    def of(rng: np.random.Generator, positives: np.ndarray, negatives: np.ndarray) -> _Chosen:
        rows = np.r_[positives, positives[:1].repeat(len(negatives))]
        drawn = np.r_[np.full(len(positives), -1), negatives]
        order = rng.permutation(len(rows))
        return _Chosen(rows[order], drawn[order])


def _drawn(
    rng: np.random.Generator, weights: np.ndarray, taken: np.ndarray, number: int
) -> np.ndarray:
    """Different items by weight that are not taken; fewer where fewer are left, or are hardly ever drawn."""
    left = np.flatnonzero(~taken & (weights > 0))
    cumulative = np.cumsum(weights[left])
    found = np.zeros(0, np.int64)
    for _ in range(ROUNDS):
        if len(found) >= min(number, len(left)):
            break
        draws = rng.integers(0, cumulative[-1], 2 * (number - len(found)) + 8)
        both = np.r_[found, left[np.searchsorted(cumulative, draws, side="right")]]
        # The order of the draw decides which items stay.
        found = both[np.sort(np.unique(both, return_index=True)[1])][:number]
    return found


def _as_rows(
    contract: Contract, examples: pa.Table, items: pa.Array, chosen: dict[int, _Chosen]
) -> pa.Table:
    """Rows of the requests in their order: positives as they were, negatives with the request's own columns."""
    nothing = np.zeros(0, np.int64)
    order = sorted(chosen)
    rows = np.concatenate([nothing, *(chosen[request].rows for request in order)])
    drawn = np.concatenate([nothing, *(chosen[request].drawn for request in order)])
    table = examples.take(pa.array(rows))
    # What a negative has of its own: its item, no label but 0, and nothing of an impression.
    item = contract.item.join_key
    own: dict[str, pa.Array] = {item: items.take(pa.array(drawn, mask=drawn < 0))}
    for task in contract.spec.tasks:
        own[task.name] = pa.array(
            np.zeros(len(rows), np.int8), mask=np.full(len(rows), bool(task.given))
        )
    for column in contract.spec.shown_features:
        own[column.name] = pa.nulls(len(rows), table.schema.field(column.name).type)
    for name, values in own.items():
        place = table.schema.get_field_index(name)
        field = table.schema.field(place)
        mixed = pc.if_else(
            pa.array(drawn >= 0), values.cast(field.type), table[name].combine_chunks()
        )
        table = table.set_column(place, field, mixed)
    return table
