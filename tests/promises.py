"""What a run found of what is promised: a page with figure, seed and commit of each, red where it falls
short.

A promise of correctness is asserted by its test as well; one of speed is written down, for a busy machine
breaks it and nothing is wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from feature_repo.benchmarks import commit, hardware

SHORT = "🟥 short"


@dataclass(frozen=True)
class Promise:
    """One line of the page.

    Args:
        seed: of what was drawn; None where nothing was.
    """

    what: str
    asked: str
    found: str
    held: bool
    seed: int | None = None


class Promises:
    """Those of a run.

    Example:
        >>> promises = Promises()
        >>> promises.note("a thousand swaps", "no error", "0 errors", held=True)
        >>> promises.write(Path("page.md"), 60.0)
    """

    def __init__(self) -> None:
        self.kept: list[Promise] = []

    def note(
        self, what: str, asked: str, found: str, *, held: bool, seed: int | None = None
    ) -> None:
        """Write one down."""
        self.kept.append(Promise(what, asked, found, held, seed))

    def write(self, path: Path, seconds: float) -> None:
        """The page."""
        short = sum(not one.held for one in self.kept)
        about = (
            f"{datetime.now(UTC):%Y-%m-%d}, commit {commit()}, {hardware()}; client, stores and server on the "
            f"same cores. `make reliability`, {seconds / 60:.0f} minutes: {len(self.kept)} promises, "
            f"{short} short."
        )
        head = ["# What was promised, and what was found", "", about, ""]
        head += ["| promise | asked | found | seed | |", "|---|---|---|---|---|"]
        rows = [
            [one.what, one.asked, one.found, one.seed, "" if one.held else SHORT]
            for one in self.kept
        ]
        text = [
            f"| {' | '.join('' if cell is None else str(cell) for cell in row)} |" for row in rows
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*head, *text]) + "\n")
