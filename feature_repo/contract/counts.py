"""What a piece of work counted: numbers that add up, dead letters by reason, values that were left out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Counts:
    """The counts of a part of a run, or of a whole run.

    Args:
        numbers: by name; `counts["rows_read"]` is 0 where no job counted.
        dead: dead letters by reason.
        cut: values of a list beyond the bound that is read, by column.
        lost: values that could not be read and are missing, by column.
        earliest, latest: microseconds, of the events or requests that were seen; None of none.

    Example:
        >>> both = Counts({"rows": 2}, latest=5) + Counts({"rows": 3}, latest=4)
        >>> both["rows"], both.latest
        (5, 5)
    """

    numbers: Mapping[str, int] = field(default_factory=dict)
    dead: Mapping[str, int] = field(default_factory=dict)
    cut: Mapping[str, int] = field(default_factory=dict)
    lost: Mapping[str, int] = field(default_factory=dict)
    earliest: int | None = None
    latest: int | None = None

    def __getitem__(self, name: str) -> int:
        return self.numbers.get(name, 0)

    def __add__(self, other: Counts) -> Counts:
        """Add up everything but the instants: the earliest and the latest stay."""
        groups = ("numbers", "dead", "cut", "lost")
        added = {name: _sums(getattr(self, name), getattr(other, name)) for name in groups}
        return Counts(
            **added,
            earliest=min(_known(self.earliest, other.earliest), default=None),
            latest=max(_known(self.latest, other.latest), default=None),
        )

    def reasons(self) -> list[str]:
        """A line for each reason of dead letters, most frequent first."""
        most_first = sorted(((n, reason) for reason, n in self.dead.items()), reverse=True)
        return [f"{n:>9,}  {reason}" for n, reason in most_first]

    def left_out(self) -> list[str]:
        """A line for each column whose values were left out."""
        return [
            f"{n:,}  values of {column} {why}"
            for group, why in (
                (self.cut, "beyond those that are read"),
                (self.lost, "that could not be read and are missing"),
            )
            for column, n in group.items()
            if n
        ]


def total(counts: Iterable[Counts]) -> Counts:
    """Return the sum of all."""
    return sum(counts, Counts())


def _sums(ours: Mapping[str, int], theirs: Mapping[str, int]) -> dict[str, int]:
    return {name: ours.get(name, 0) + theirs.get(name, 0) for name in sorted({*ours, *theirs})}


def _known(*instants: int | None) -> list[int]:
    return [instant for instant in instants if instant is not None]
