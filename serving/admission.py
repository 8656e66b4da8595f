"""How many requests a process takes on: bounded, and told at once, before a body is read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from serving.errors import OverloadedError


class Admission:
    """Counts requests under way.

    >>> with Admission(1).admitted():
    ...     pass

    Args:
        most: requests at a time; each beyond is refused.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.under_way = 0

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A place, for as long as the block runs.

        Raises:
            OverloadedError: there is none left.
        """
        if self.under_way >= self.most:
            raise OverloadedError(
                f"{self.under_way} requests are under way, as many as this process takes on: try again in a second, "
                "or elsewhere"
            )
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1
