"""Events → requests: what was asked about together, and how each item of it turned out.

Three declared ways (`schema.Examples`): logged impressions, actions of one moment (negatives are
drawn later), and ratings. Nothing here knows a dataset.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract.arrow import iso_micros, micros
from feature_repo.contract.contract import REQUEST_ID, Contract
from feature_repo.contract.schema import EVENT_TIMESTAMP, Examples
from feature_repo.history.history import run_ends, run_starts

# A label that has no meaning for the item
UNDEFINED = -1


@dataclass(frozen=True)
class LoggedRequests:
    """Requests of some users, in the order of their events, and the items of each.

    Args:
        first_event: of each request: index of its first event, whose time and context are its own.
        request: of each item: the request that it belongs to, in ascending order.
        event: of each item: index of its first event there.
        labels: items × tasks: 1, 0, or `UNDEFINED`.
        repeats: further events of an item in one request that say nothing new.
    """

    first_event: np.ndarray
    request: np.ndarray
    event: np.ndarray
    labels: np.ndarray
    repeats: int


def random_ndcg(requests: LoggedRequests, drawn: int) -> float:
    """NDCG@10 of the first task that a random order is expected to reach: 1 where each request has one
    candidate. NaN where no request has a positive.

    Args:
        requests: whose candidates are ranked.
        drawn: negatives that are drawn beside each request's.
    """
    label = requests.labels[:, 0] if len(requests.labels) else np.array([], np.int8)
    defined = label != UNDEFINED
    number = len(requests.first_event)
    size = np.bincount(requests.request[defined], minlength=number) + drawn
    positive = np.bincount(requests.request[defined & (label == 1)], minlength=number)
    asked = positive > 0
    if not asked.any():
        return float("nan")
    gain = np.r_[0.0, np.cumsum(1 / np.log2(np.arange(2, 12)))]
    # Each place holds a positive in the share that positives have of the candidates.
    reached = positive[asked] / size[asked] * gain[np.minimum(size[asked], 10)]
    return float((reached / gain[np.minimum(positive[asked], 10)]).mean())


def requests_of(contract: Contract, events: pa.Table) -> LoggedRequests:
    """Return the requests of a log, as the dataset declares.

    Args:
        events: of whole users, sorted by user, time and position.
    """
    rules = contract.spec.requests
    # 1. Number the requests, and the items within each.
    action = events["action"].to_numpy()
    chosen, key = _asked_together(contract, events, action)
    first, request = _numbered(key)
    item = events[contract.item.join_key].combine_chunks().dictionary_encode().indices.to_numpy()
    pair = request * (int(item.max(initial=0)) + 1) + item[chosen]
    first_of_pair, pair_of_event = _numbered(pair)

    # A rating is the user's first word on the item; other labels say whether an action came at all.
    tells = np.ones(len(chosen), bool)
    if rules.examples is Examples.RATINGS:
        tells = np.zeros(len(chosen), bool)
        tells[first_of_pair] = True
    # 2. Label the items: one is positive if any of its events in the request says so.
    labels = np.zeros((len(first_of_pair), len(contract.spec.tasks)), np.int8)
    for number, task in enumerate(contract.spec.tasks):
        about = tells & (action[chosen] == contract.spec.actions.index(task.action))
        labels[pair_of_event[about], number] = 1
        if task.given:
            given = labels[:, contract.labels.index(task.given)]
            labels[given != 1, number] = UNDEFINED
    # 3. Bring the items of a request together, in the order of their first events.
    order = np.argsort(request[first_of_pair], kind="stable")
    # All events beyond the distinct pairs of item and action say nothing new.
    pairs = np.stack([pair_of_event, action[chosen].astype(np.int64)])
    distinct = np.unique(pairs, axis=1).shape[1]
    return LoggedRequests(
        first_event=chosen[first],
        request=request[first_of_pair][order],
        event=chosen[first_of_pair][order],
        labels=labels[order],
        repeats=len(chosen) - distinct,
    )


def _asked_together(
    contract: Contract, events: pa.Table, action: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Events that some request is about, and a number for each that those of one request share."""
    rules = contract.spec.requests
    number = events.num_rows
    user = events[contract.user.join_key].combine_chunks()
    starts = run_starts(user)
    lengths = run_ends(starts, number) - starts
    owner = np.repeat(np.arange(len(starts)), lengths)
    # No request lies in two periods, or labels of one would be learned in the one before: an id of a
    # session that lasts names another request from the next period on.
    bounds = [iso_micros(rules.validation_from), iso_micros(rules.test_from)]
    part = owner * 3 + np.searchsorted(bounds, micros(events[EVENT_TIMESTAMP]), side="right")
    if rules.examples is Examples.RATINGS:
        chosen = np.flatnonzero(np.isin(action, contract.history_actions))
        part = part[chosen]
        within = np.arange(len(chosen)) - np.searchsorted(part, part, "left")
        return chosen, _joined(part, within // rules.most)
    about = np.ones(number, bool)
    if rules.examples is Examples.ACTIONS:
        tasks = [contract.spec.actions.index(task.action) for task in contract.spec.tasks]
        about = np.isin(action, tasks)
    # Without ids one instant of a user is a request, and an instant lies in one period.
    if not rules.has_request_id:
        chosen = np.flatnonzero(about)
        return chosen, _joined(owner[chosen], micros(events[EVENT_TIMESTAMP])[chosen])
    named = events[REQUEST_ID.name].combine_chunks()
    chosen = np.flatnonzero(about & pc.is_valid(named).to_numpy(zero_copy_only=False))
    codes = pc.fill_null(named.dictionary_encode().indices, 0).to_numpy()
    return chosen, _joined(part[chosen], codes[chosen])


def _joined(owner: np.ndarray, within: np.ndarray) -> np.ndarray:
    """One number for each pair of numbers."""
    _, place = np.unique(within, return_inverse=True)
    return owner * (int(place.max(initial=0)) + 1) + place


def _numbered(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys in the order of their first occurrence: where that is, and which one each key
    is.
    """
    _, first, place = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first, kind="stable")
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return first[order], rank[place]
