"""python -m qbench --formats: a table of the formats, and where each comes from."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

import formats
from formats import Format
from formats.contract import first_line

WEIGHTS = 4096 * 4096  #: size of the tensor whose bytes are counted; it is so large that a table per tensor adds little

NOTES = (
    "bits: per weight in blocks of 64, including scales and tables; + dq: with double quantization of the scales. levels:"
    " how many there are, and their range; own: each tensor has its own table; z: each block has a shift.",
    "For a format that is not listed: +format=custom format.target=module.Class. How to write one: docs/formats.md.",
)


def show(console: Console | None = None) -> int:
    """Print the formats, and those that cannot be used, each with the reason. Returns the exit code, 0."""
    console = console or Console(highlight=False, markup=False)
    table = Table(
        Column("format", no_wrap=True, style="bold"),
        Column("bits", justify="right", no_wrap=True),
        Column("+ dq", justify="right", no_wrap=True),
        Column("levels", no_wrap=True),
        Column("source"),
        Column("package"),
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    unusable = dict(formats.problems())
    for name in formats.names():
        try:
            with_dq, plain = (formats.get(name, dq=dq) for dq in (True, False))
        except (TypeError, ValueError) as error:
            unusable[name] = first_line(error)
        else:
            levels = _levels(plain)
            table.add_row(name, _bits(plain), _bits(with_dq), levels, plain.source, formats.find(name).package)
    console.print(table)
    for note in ("", *NOTES):
        console.print(note)
    for reason in unusable.values():
        console.print(f"not usable: {reason}", style="red")
    return 0


def _bits(fmt: Format) -> str:
    return f"{8 * fmt.count_bytes(WEIGHTS) / WEIGHTS:.3f}"


def _levels(fmt: Format) -> str:
    if fmt.bits == 16:
        return ""
    if fmt.own_levels:
        levels = f"{2**fmt.bits}, own"
    else:
        ends = (f"{end:.3g}".replace("-", "−") for end in (min(fmt.levels), max(fmt.levels)))
        levels = f"{len(set(fmt.levels))}, {' … '.join(ends)}"
    return levels + ", z" * fmt.shifted
