"""A user encoded ahead of a ranking whose candidates are not known yet."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from serving.api.degraded import Degraded
from serving.api.messages import PrepareResponse, RankRequest
from serving.ranking.ranker import RankService
from serving.ranking.request import context_columns
from serving.stores.features import UserRow


def prepare(ranker: RankService, request: RankRequest, user: UserRow) -> PrepareResponse:
    """Encode a user and keep it: a ranking as of the same time finds it.

    Args:
        request: without candidates.
        user: who has been read.
    """
    known = ranker.known_now(request, user)
    if known.user.history is None:
        return not_kept(ranker, request, user, known.degraded)
    context = context_columns(ranker.contract, request.context)
    items = ranker.items.take([])
    encoded = ranker.requests.encoded(known.user, [], known.at, items, context)
    batch = ranker.bundle.encoder.collate(encoded, np.array([0]))
    outcome = ranker.keep(request.user_id, batch.user) or "not_kept"
    return PrepareResponse(ranker.bundle.name, known.at, outcome, known.degraded)


def not_kept(
    ranker: RankService, request: RankRequest, user: UserRow, degraded: Sequence[Degraded]
) -> PrepareResponse:
    """The answer to a request whose user is not kept."""
    at = ranker.time_of(request, user)
    return PrepareResponse(ranker.bundle.name, at, "not_kept", list(degraded))
