"""Relations of items, fitted on what lies before the validation period: who goes with whom by the histories of all
users, slice by slice of time, and what the words of items say.

Texts are as they were known by the validation period, whatever the time of a training request: words say nothing of
what came of it.

A request must not read what came of itself: a pair of items that one user had counts for little among many users, and
for much among few. So requests of a slice of the training period read what was known before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.contract.arrow import arrow_type, iso_micros, micros
from feature_repo.contract.contract import Contract
from feature_repo.contract.key_index import KeyIndex
from feature_repo.contract.schema import CREATED_TIMESTAMP, EVENT_TIMESTAMP, DType
from feature_repo.history.history import HistoryLog
from modeling.inputs.relations import Relations, Slice

# Shares of the events before the validation period behind which a slice begins; the last begins with that period
SLICES = (0.15, 0.3, 0.5, 0.7, 0.85)
# Users of an item, and of a pair of items, without which it is no evidence
LEAST_USERS = 5
LEAST_TOGETHER = 3
# Of each item: kept for candidates, and for vectors
NEIGHBOURS = 64
STRONGEST = 200
# Numbers of a vector, and of an item's factors
WIDTH = 64
FACTORS = 32
TEXT_WIDTH = 32
# Pairs of items in histories; of more, users are sampled
MOST_PAIRS = 1 << 32
# Items whose pairs are in memory at a time
BLOCK = 4_096
# Events of the log read at a time
EVENTS = 1 << 22
# Of the largest singular value
FAINTEST = 1e-6
# Between two words
NO_WORD = r"[^\pL\pN]+"


def fit_relations(contract: Contract, log: HistoryLog, profiles: pa.Table) -> Relations:
    """Relations of the items that have any by the validation period.

    Args:
        profiles: rows of `item_profile`.
    """
    until = iso_micros(contract.spec.requests.validation_from)
    # 1. Which items have users or words enough to be a row.
    text = _text_vectors(contract, profiles, log.items, until)
    by_then = items_by_user(log, until)
    users_of = np.bincount(by_then[1], minlength=len(log.items))
    together = np.flatnonzero(users_of >= LEAST_USERS)
    described = np.flatnonzero((users_of < LEAST_USERS) & text.any(axis=1))
    # Those that may have neighbours stand first: slices hold nothing of the others.
    kept = np.r_[together, described]
    row = np.zeros(len(log.items), np.int64)
    row[kept] = np.arange(1, len(kept) + 1)
    # 2. At each cut, who goes with whom by what was known then.
    slices = []
    for cut in _cuts(log, until):
        user, item = by_then if cut == until else items_by_user(log, cut)
        place = row[item]
        slices.append(
            _slice(cut, user, np.where(place > len(together), 0, place), len(together) + 1)
        )
    text_IE = np.concatenate([np.zeros((1, text.shape[1]), np.float32), text[kept]])
    ids = log.items.take(pa.array(kept)).cast(arrow_type(contract.item.dtype))
    return Relations(ids, text_IE, slices)


def _cuts(log: HistoryLog, until: int) -> list[int]:
    """When slices begin: after equal shares of the events, the last at the end."""
    every = -(-int(log.lengths.sum()) // EVENTS) or 1
    rows = np.arange(0, len(log.users), every)
    times = log.gather(rows, log.lengths[rows], columns=[EVENT_TIMESTAMP]).times
    times = times[times < until]
    if not len(times):
        return []
    cuts = {int(np.quantile(times, share)) for share in SLICES}
    return [*sorted(cuts), until]


def items_by_user(log: HistoryLog, cut: int) -> tuple[np.ndarray, np.ndarray]:
    """User and item of each pair with an event of the first action that was known by then, each once; of a sample of
    users where all have too many pairs of items.
    """
    found = [np.zeros(0, np.int64)]
    for rows in _users_at_a_time(log):
        times = np.full(len(rows), cut)
        histories = log.gather(rows, log.number_known(rows, times), columns=["action"], times=times)
        users = np.repeat(rows, histories.lengths)
        chosen = histories.columns["action"] == 0
        found.append(np.unique(users[chosen] * len(log.items) + histories.item_keys[chosen]))
    user, item = np.divmod(np.concatenate(found), max(len(log.items), 1))
    together = np.bincount(user, minlength=len(log.users)).astype(np.float64) ** 2
    if together.sum() <= MOST_PAIRS:
        return user, item
    order = np.random.default_rng(0).permutation(len(together))
    sampled = np.zeros(len(together), bool)
    sampled[order[np.cumsum(together[order]) <= MOST_PAIRS]] = True
    return user[sampled[user]], item[sampled[user]]


def _users_at_a_time(log: HistoryLog) -> Iterator[np.ndarray]:
    bounds = np.cumsum(log.lengths) // EVENTS
    for number in np.unique(bounds):
        yield np.flatnonzero(bounds == number)


def _slice(cut: int, user: np.ndarray, item: np.ndarray, items: int) -> Slice:
    """Neighbours, vectors and factors by which users had which items.

    Args:
        user, item: each pair once; item 0 is none.
        items: how many there are.
    """
    from scipy import sparse

    users_I = np.bincount(item, minlength=items)
    often = (users_I >= LEAST_USERS) & (np.arange(items) > 0)
    user = user[often[item]]
    item = item[often[item]]
    everybody, user = np.unique(user, return_inverse=True)
    had = sparse.csr_matrix(
        (np.ones(len(user), np.float32), (user, item)), shape=(len(everybody), items)
    )
    neighbours = np.zeros((items, NEIGHBOURS), np.int32)
    strengths = np.zeros((items, NEIGHBOURS), np.float32)
    rows: list[np.ndarray] = [np.zeros(0, np.int64)]
    columns: list[np.ndarray] = [np.zeros(0, np.int64)]
    values: list[np.ndarray] = [np.zeros(0, np.float32)]
    # A block of items at a time: all pairs at once may be a million times a million.
    for start in range(0, items, BLOCK):
        together = (had[:, start : start + BLOCK].T @ had).tocsr()
        for place in np.flatnonzero(often[start : start + BLOCK]):
            entries = slice(together.indptr[place], together.indptr[place + 1])
            own = start + int(place)
            found = _related(
                own, together.indices[entries], together.data[entries], users_I, len(everybody)
            )
            # For candidates those that say most of many users: the strongest of a few are in hardly any history.
            told = np.lexsort((found.others, -found.strength * found.together))[:NEIGHBOURS]
            neighbours[own, : len(told)] = found.others[told]
            strengths[own, : len(told)] = found.strength[told]
            strongest = found.others[:STRONGEST]
            rows.append(np.full(len(strongest), own))
            columns.append(strongest)
            values.append(found.strength[:STRONGEST])
    places = (np.concatenate(rows), np.concatenate(columns))
    matrix = sparse.csr_matrix((np.concatenate(values), places), shape=(items, items))
    vectors = _leading(matrix.maximum(matrix.T), WIDTH)
    return Slice(cut, neighbours, strengths, vectors, _factors(had))


class Related(NamedTuple):
    """The items that one goes with, strongest first.

    Args:
        strength: positive pointwise mutual information, with one user added to what was seen and what was expected.
        together: users who have both.
    """

    others: np.ndarray
    strength: np.ndarray
    together: np.ndarray


def _related(
    own: int, others: np.ndarray, together: np.ndarray, users_I: np.ndarray, users: int
) -> Related:
    some = (together >= LEAST_TOGETHER) & (others != own)
    others = others[some]
    together = together[some]
    expected = users_I[own] * users_I[others] / users
    strength = np.log((together + 1) / (expected + 1)).astype(np.float32)
    # Ties by number, so that equal data gives equal neighbours
    order = np.lexsort((others, -strength))
    order = order[strength[order] > 0]
    return Related(others[order].astype(np.int64), strength[order], together[order])


def _leading(matrix: Any, width: int) -> np.ndarray:
    """Rows of length 1 along the leading eigenvectors of a symmetric sparse matrix; zeros of an empty row."""
    from scipy.sparse.linalg import eigsh

    some = np.flatnonzero(np.diff(matrix.indptr))
    found = np.zeros((matrix.shape[0], width), np.float32)
    number = min(width, len(some) - 1)
    if number < 1:
        return found
    within = matrix[some][:, some].astype(np.float64)
    size, vectors = eigsh(
        within, number, which="LA", v0=np.ones(len(some)), rng=np.random.default_rng(0)
    )
    rows = vectors * np.sqrt(np.maximum(size, 0))
    found[some, :number] = _unit(rows)
    return found


def _factors(had: Any) -> np.ndarray:
    """The leading right singular vectors of who had what, items × at most `FACTORS`, float32; zeros of an item that
    nobody had.
    """
    from scipy.sparse.linalg import svds

    # What nobody had would be rounding, and another one at each fit.
    some = np.flatnonzero(had.getnnz(axis=0))
    within = had[:, some].astype(np.float64)
    number = min(FACTORS, min(within.shape) - 1)
    if number < 1:
        return np.zeros((had.shape[1], 0), np.float32)
    _, values, right = svds(
        within, number, v0=np.ones(min(within.shape)), rng=np.random.default_rng(0)
    )
    # Fewer directions than were asked for: the rest is rounding.
    told = values > FAINTEST * values.max()
    found = np.zeros((had.shape[1], int(told.sum())), np.float32)
    found[some] = right[told].T
    return found


def _unit(rows: np.ndarray) -> np.ndarray:
    size = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, size, out=np.zeros_like(rows), where=size > 1e-9).astype(np.float32)


def _text_vectors(
    contract: Contract, profiles: pa.Table, items: pa.Array, until: int
) -> np.ndarray:
    """A vector of each item's words, float32: TF-IDF along its leading singular vectors; no column where items have no
    text.
    """
    from scipy import sparse
    from scipy.sparse.linalg import svds

    texts = (DType.STRING, DType.STRING_LIST)
    names = [c.name for c in contract.spec.item_features if c.dtype in texts]
    nothing = np.zeros((len(items), 0), np.float32)
    # 1. The words of each item, each once.
    made = np.maximum(micros(profiles[EVENT_TIMESTAMP]), micros(profiles[CREATED_TIMESTAMP]))
    known = profiles.filter(pa.array(made < until))
    place = KeyIndex(items).places(known[contract.item.join_key])
    rows, words, number_of_words = _words_of(known, names, place)
    # 2. Words of two items or more, the rarer the heavier.
    items_of = np.bincount(words, minlength=number_of_words)
    shared = items_of[words] > 1
    if not shared.any():
        return nothing
    weight = np.log((1 + len(items)) / (1 + items_of)) + 1
    matrix = sparse.csr_matrix(
        (weight[words[shared]], (rows[shared], words[shared])), shape=(len(items), number_of_words)
    )
    number = min(TEXT_WIDTH, min(matrix.shape) - 1)
    if number < 1:
        return nothing
    size = np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1))).ravel()
    scaled = sparse.diags(1 / np.maximum(size, 1e-9)) @ matrix
    left, values, _ = svds(
        scaled, number, v0=np.ones(min(scaled.shape)), rng=np.random.default_rng(0)
    )
    # Fewer directions than were asked for: the rest is rounding.
    told = values > FAINTEST * values.max()
    return _unit(left[:, told] * values[told])


def _words_of(
    table: pa.Table, names: Sequence[str], place: np.ndarray
) -> tuple[np.ndarray, np.ndarray, int]:
    """Item and word of each pair, each once, and how many words there are.

    Args:
        names: of the columns, texts or lists of texts.
        place: of each row's item; -1 for none.
    """
    owners = [np.zeros(0, np.int64)]
    spelt = [pa.array([], pa.string())]
    for name in names:
        texts = table[name].combine_chunks()
        owner = place
        if pa.types.is_list(texts.type):
            owner = place[pc.list_parent_indices(texts).to_numpy()]
            texts = pc.list_flatten(texts)
        parts = pc.split_pattern_regex(pc.fill_null(pc.utf8_lower(texts), ""), NO_WORD)
        owners.append(owner[pc.list_parent_indices(parts).to_numpy()])
        spelt.append(pc.list_flatten(parts))
    owner = np.concatenate(owners)
    coded = pa.concat_arrays(spelt).dictionary_encode()
    word = coded.indices.to_numpy()
    # What lies between two marks may be nothing.
    some = (owner >= 0) & ~np.isin(
        word, np.flatnonzero(pc.equal(coded.dictionary, "").to_numpy(zero_copy_only=False))
    )
    number = len(coded.dictionary)
    pairs = np.unique(owner[some] * max(number, 1) + word[some])
    return pairs // max(number, 1), pairs % max(number, 1), number
