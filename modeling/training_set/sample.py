"""Which requests of a log a comparison looks at, and how much of their past."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class NeverHad:
    """Requests for items that their user never had (`never_had.py`).

    Args:
        most: positives of a request; further ones are left out by chance.
        negatives: of each request that is evaluated.
        train_negatives: of each training request.
        by: the statistic of items by which negatives are drawn; positives have some of it.
        blocks: ask for each user's events of the primary action in blocks of `most` instead: the last block is the
            test, the one before it validation, earlier ones are training. For logs whose late users are all new.
    """

    most: int = 10
    negatives: int = 100
    train_negatives: int = 50
    by: str = "count_28d"
    blocks: bool = False


@dataclass(frozen=True)
class Sample:
    """Which requests, and what is known of them.

    Args:
        visible: newest events before a request that anything may be read of; default: all.
        every: n and m: each n-th training request, each m-th of those that evaluate; their histories
            are whole.
        protocol: default: requests as the dataset declares them.
        of_user: requests of one user in a period at most; default: all.
        counts: KiB of a user's counts, or "exact" for counts without collisions, which no store of a fixed size can
            serve; default: as the dataset declares.

    Example:
        >>> Sample(visible=50, every=(4, 2), protocol=NeverHad())
    """

    visible: int | None = None
    every: tuple[int, int] = (1, 1)
    protocol: NeverHad | None = None
    of_user: int | None = None
    counts: int | Literal["exact"] | None = None


# All requests as they are declared, of users of whom all is known
WHOLE = Sample()
