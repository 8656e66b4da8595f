"""Lists before and after something befell the store: those that differ without a word."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from serving.api.messages import RankRequest, RankResponse
from serving.live.live import Serving
from serving.ranking.ranker import Clock
from tests.promises import Promises

CANDIDATES = 50


def lists_of(serving: Serving, users: Iterable[Any]) -> dict[Any, RankResponse]:
    """What a server would answer, user by user, of the store as Feast reads it."""
    ranker = serving.ranker
    items = ranker.bundle.encoder.items.values[:CANDIDATES].to_pylist()

    found = {}
    for user in users:
        request = RankRequest(user_id=user, candidates=items)
        found[user] = ranker.answer(request, ranker.reader.read_user(user), Clock()).response
    return found


def note_silent(
    promises: Promises,
    what: str,
    before: Mapping[Any, RankResponse],
    after: Mapping[Any, RankResponse],
    *,
    said: bool,
) -> None:
    """Write down, and hold to, that no list differs of which nothing was said.

    Args:
        said: whether the server is not ready: balancers send nobody there.
    """
    differ = {user for user in before if after[user].item_ids != before[user].item_ids}
    silent = [user for user in differ if not said and not after[user].degraded]
    promises.note(
        what,
        "0 lists differ without a word, once the store was looked at (each second)",
        f"{len(silent)} of {len(before)}; {len(differ)} differ",
        held=not silent,
    )
    assert not any(answer.degraded for answer in before.values())
    # Else nothing befell it.
    assert differ
    assert silent == []
