"""What `--help` shows: every key with its meaning and default, as the comments of conf/ have them, and what it accepts."""

import re
from collections.abc import Mapping
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from qbench.keys import Accepted

_KEY = re.compile(r"(?P<indent> *)(?P<name>[a-z_]+):(?: +(?P<default>[^#\s][^#]*?))?(?: +# *(?P<meaning>.*))?")
_NOT_OURS = ("defaults", "hydra")


def read(file: Path, prefix: str = "") -> dict[str, tuple[str, str]]:
    """Of each key of a file of conf/, by its dotted name, default and meaning."""
    found: dict[str, tuple[str, str]] = {}
    section = ""
    for line in file.read_text("utf-8").splitlines():
        key = _KEY.fullmatch(line)
        if not key:
            continue
        if not key["indent"]:
            section = key["name"]
        if section in _NOT_OURS:
            continue
        name = f"{section}.{key['name']}" if key["indent"] else key["name"]
        if key["default"] is not None:
            found[f"{prefix}{name}"] = key["default"], key["meaning"] or ""
    return found


def show(
    header: str,
    groups: Mapping[str, tuple[str, str, str]],
    explained: Mapping[str, tuple[str, str]],
    accepted: Mapping[str, Accepted],
    footer: str,
) -> None:
    """groups: of each that can be chosen the default, the meaning and the names."""
    console = Console(highlight=False, markup=False)
    table = Table(
        Column("key=default", no_wrap=True, style="bold"),
        Column("what it means", ratio=3, overflow="fold"),
        Column("what it accepts", ratio=2, overflow="fold"),
        box=SIMPLE_HEAD,
        show_edge=False,
        expand=True,
        padding=(0, 1, 0, 0),
    )
    for name, (default, meaning, names) in groups.items():
        table.add_row(f"{name}={default}", meaning, names)
    for name, accepts in accepted.items():
        default, meaning = explained[name]
        table.add_row(f"{name}={default}", meaning, accepts.words.rstrip(","))
    console.print(header)
    console.print(table)
    console.print()
    console.print(footer)
