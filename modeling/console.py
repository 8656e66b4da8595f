"""The terminal, for every command of this room."""

from __future__ import annotations

import math
import time

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

console = Console()


def say(text: str, style: str = "", soft_wrap: bool = False) -> None:
    """Print a line as it is; with `soft_wrap` in one piece, such as a path that is to be copied."""
    console.print(text, style=style, soft_wrap=soft_wrap, highlight=False)


class ProgressLines:
    """Lines about long work: one at once, then one every ten seconds.

    Example:
        >>> progress = ProgressLines()
        >>> progress("training set: 3 of 40 pieces joined")
    """

    def __init__(self, seconds: float = 10.0) -> None:
        self._seconds = seconds
        self._said = -math.inf

    def __call__(self, text: str) -> None:
        """Say this, unless something was said just before."""
        now = time.monotonic()
        if now - self._said >= self._seconds:
            self._said = now
            say(text)


def print_table(rows: list[list[str]], width: int | None = None) -> None:
    """Print a table on the terminal; the first row is the heading.

    Where it is wider than the terminal, rows become columns, and what is still too wide is cut by
    columns: the first one is repeated before each part.

    Args:
        width: of the terminal; default: as it is, and at least 160 without a terminal.
    """
    available = width or (console.width if console.is_terminal else max(console.width, 160))
    if _width(rows) > available and len(rows) < len(rows[0]):
        rows = [list(column) for column in zip(*rows, strict=True)]
    for part in _parts(rows, available):
        table = RichTable(box=SIMPLE_HEAD, pad_edge=False)
        for index, heading in enumerate(part[0]):
            table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
        for row in part[1:]:
            table.add_row(*row)
        Console(width=max(available, _width(part))).print(table)


def _width(rows: list[list[str]]) -> int:
    return sum(max(len(row[index]) for row in rows) + 2 for index in range(len(rows[0])))


def _parts(rows: list[list[str]], available: int) -> list[list[list[str]]]:
    """The table in parts of as many columns as fit, each with the first column; one column at
    least.
    """
    parts = []
    chosen = [0]
    for index in range(1, len(rows[0])):
        if (
            len(chosen) > 1
            and _width([[row[i] for i in (*chosen, index)] for row in rows]) > available
        ):
            parts.append(chosen)
            chosen = [0]
        chosen = [*chosen, index]
    return [[[row[i] for i in part] for row in rows] for part in [*parts, chosen]]
