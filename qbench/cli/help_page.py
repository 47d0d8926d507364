"""The page of --help, alike for every command: examples, then a table of the arguments."""

import sys
from collections.abc import Iterable
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table


def show(header: str, head: str, rows: Iterable[tuple[str, str, str]], footer: str) -> None:
    """Print the page. head: heading of the first column. rows: name with default, meaning, accepted values."""
    console = Console(highlight=False, markup=False)
    table = Table(
        Column(head, no_wrap=True, style="bold"),
        Column("what it means", ratio=3, overflow="fold"),
        Column("what it accepts", ratio=2, overflow="fold"),
        box=SIMPLE_HEAD,
        show_edge=False,
        expand=True,
        padding=(0, 1, 0, 0),
    )
    for row in rows:
        table.add_row(*map(as_typed, row))
    console.print(as_typed(header))
    console.print(table)
    if footer:
        console.print()
        console.print(as_typed(footer))


def as_typed(text: str) -> str:
    """Returns `text` with `qbench plan` for `python -m qbench plan` if the user started the console script `qbench`."""
    if Path(sys.argv[0]).name not in ("qbench", "qbench.exe"):
        return text
    return text.replace("python -m qbench", "qbench")
