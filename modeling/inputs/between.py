"""The numbers between a history and its candidates: matches, counts, and relations of items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from feature_repo.contract.contract import Contract
from feature_repo.history.counts import Readings
from feature_repo.history.history import Histories
from feature_repo.history.transforms import (
    MATCH_FEATURES,
    match_features,
    sketch_features,
    sketch_names,
)
from modeling.inputs.items import ItemNumbers
from modeling.inputs.relations import RELATION_FEATURES, Relations


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Some requests with all that is between their histories and candidates.

    Args:
        times: of B requests, microseconds.
        histories: of each, events strictly before it.
        offsets: request b's candidates are `[offsets[b], offsets[b + 1])`.
        keys: item keys of all N candidates, comparable with the histories'.
        candidates: N.
        user_mean: mean value of each request's user; NaN where it is not known.
        relation_of_key: row of the relations of each item key.
    """

    times: np.ndarray
    histories: Histories
    offsets: np.ndarray
    keys: np.ndarray
    candidates: ItemNumbers
    user_mean: np.ndarray
    relation_of_key: np.ndarray


class Between:
    """Numbers between histories and candidates.

    Example:
        >>> between = Between(contract, relations)
        >>> between.numbers(asked, readings).shape == (len(asked.keys), len(between.names))
        True

    Args:
        relations: of items.
    """

    def __init__(self, contract: Contract, relations: Relations) -> None:
        self.relations = relations
        self.sketch_names = sketch_names(contract)
        self.names = (*MATCH_FEATURES, *self.sketch_names, *RELATION_FEATURES)

    def numbers(self, asked: Compared, readings: Readings | None) -> np.ndarray:
        """Float32, N × `names`.

        Args:
            readings: of the users' counts; None: nothing is known of them.
        """
        candidates = asked.candidates
        matches = match_features(
            asked.histories,
            asked.offsets,
            asked.keys,
            asked.times,
            list(candidates.stats.T),
            asked.user_mean,
        )
        counts = np.full((len(asked.keys), len(self.sketch_names)), np.nan, np.float32)
        if readings is not None:
            counts = sketch_features(readings.of_known(candidates.known), candidates.shares)
        return np.concatenate([matches, counts, self._related(asked)], axis=1)

    def _related(self, asked: Compared) -> np.ndarray:
        rows = asked.relation_of_key[asked.histories.item_keys]
        events = asked.histories.offsets
        found = np.empty((len(asked.keys), len(RELATION_FEATURES)), np.float32)
        for number, time in enumerate(asked.times.tolist()):
            own = slice(asked.offsets[number], asked.offsets[number + 1])
            history = rows[events[number] : events[number + 1]]
            found[own] = self.relations.features(time, history, asked.candidates.relation_row[own])
        return found
