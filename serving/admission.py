"""How many requests a process takes on: bounded, and told at once, before a body is read.

A body that is still arriving takes no place: whoever sends a thousand of them slowly would otherwise
take all. How much of them is held is bounded by bytes.
"""

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
        most_bytes: of bodies that are arriving.
    """

    def __init__(self, most: int, most_bytes: int = 64 << 20) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.under_way = 0
        self.arriving_bytes = 0

    @property
    def full(self) -> bool:
        """Whether there is no place."""
        return self.under_way >= self.most or self.arriving_bytes >= self.most_bytes

    def error(self) -> OverloadedError:
        """What is told whoever finds none."""
        return OverloadedError(
            f"{self.under_way} requests are under way, as many as this process takes on: try again in a second, "
            "or elsewhere"
        )

    def refuse_if_full(self) -> None:
        """For a request whose body is not read yet.

        Raises:
            OverloadedError: there is no place.
        """
        if self.full:
            raise self.error()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """A place, for as long as the block runs.

        Raises:
            OverloadedError: there is none left.
        """
        self.refuse_if_full()
        self.under_way += 1
        try:
            yield
        finally:
            self.under_way -= 1
