"""The terminal, for every command of this room."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable

console = Console()


def print_table(rows: list[list[str]]) -> None:
    """A table on the terminal; the first row is the heading."""
    table = RichTable(box=SIMPLE_HEAD, pad_edge=False)
    for index, heading in enumerate(rows[0]):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    Console(width=max(console.width, 160)).print(table)
