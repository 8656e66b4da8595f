"""A shadow bundle, asked beside the one that ranks, on a share of the requests: how far would its lists
part? It never touches an answer, has a separate thread, and is dropped where that lags.
"""

from __future__ import annotations

import logging
import random
import threading
from dataclasses import replace

import numpy as np

from serving.api.messages import RankRequest, RankResponse
from serving.api.metrics import Metrics
from serving.api.pools import one_thread
from serving.ranking.ranker import Clock, RankService
from serving.stores.features import UserRow

MAX_WAITING = 8
logger = logging.getLogger(__name__)


class Shadow:
    """See the module docstring.

    Args:
        ranker: of the other bundle. A user's tokens are those of the bundle that ranks; where the other
            accepts another version it ranks from the newest events.
        share: of the requests.
    """

    def __init__(self, ranker: RankService, metrics: Metrics, share: float, seed: int = 0) -> None:
        self._ranker = ranker
        self._metrics = metrics
        self._share = share
        self._rng = random.Random(seed)  # noqa: S311  # a sample, no secret
        self._thread = one_thread("shadow")
        self._waiting = 0
        self._lock = threading.Lock()

    def consider(self, asked: RankRequest, user: UserRow, answer: RankResponse) -> None:
        """Compare with this answer, later and perhaps."""
        if not answer.scores or self._rng.random() >= self._share:
            return
        with self._lock:
            if self._waiting >= MAX_WAITING:
                self._metrics.shadow.labels("dropped").inc()
                return
            self._waiting += 1
        self._thread.submit(self._compare, asked, user, answer)

    def close(self) -> None:
        """Wait for what waits, which is little."""
        self._thread.shutdown(wait=True)

    def _compare(self, asked: RankRequest, user: UserRow, answer: RankResponse) -> None:
        try:
            tokens = user.tokens
            if tokens is not None and tokens.fingerprint != self._ranker.bundle.tokens:
                user = replace(user, tokens=None)
            other = self._ranker.answer(asked, user, Clock()).response
            self._metrics.shadow.labels("compared").inc()
            if other.item_ids[0] == answer.item_ids[0]:
                self._metrics.shadow.labels("same_first").inc()
            if (found := rank_correlation(answer.item_ids, other.item_ids)) is not None:
                self._metrics.shadow_correlation.observe(found)
        except Exception:
            self._metrics.shadow.labels("failed").inc()
            logger.exception("the shadow bundle %s could not rank", self._ranker.bundle.name)
        finally:
            with self._lock:
                self._waiting -= 1


def rank_correlation(one: list[int | str], other: list[int | str]) -> float | None:
    """Spearman's correlation of two orders, over the items that both have; None of fewer than two.

    >>> rank_correlation(["a", "b", "c"], ["c", "b", "a"])
    -1.0
    """
    place = {item: at for at, item in enumerate(other)}
    common = [place[item] for item in one if item in place]
    if len(common) < 2:
        return None
    ranks = np.argsort(np.argsort(common))
    return round(float(np.corrcoef(np.arange(len(common)), ranks)[0, 1]), 9)
