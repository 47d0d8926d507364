"""A table that is shown as HTML, as Markdown and in the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from qbench.report.wording import escape_markdown


@dataclass(frozen=True)
class Column:
    """A column. head: its title, with the unit. about: what the values mean. best: "less", "more" or empty."""

    head: str
    about: str = ""
    best: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell. text: as shown. value: the number by which the column is sorted."""

    text: str = ""
    value: float | None = None


@dataclass(frozen=True)
class Row:
    """A row. cells: one per column. files: the result.json of each run, by seed. is_16_bit: the page shades the row."""

    cells: list[Cell]
    files: Mapping[int, Path] = field(default_factory=dict)
    is_16_bit: bool = False


@dataclass(frozen=True)
class Table:
    """A table. note: how to read it."""

    columns: list[Column]
    rows: list[Row]
    title: str = ""
    note: str = ""

    @classmethod
    def from_texts(cls, heads: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> "Table":
        """A table of plain texts; the first of each row is its name."""
        return cls([Column(head) for head in heads], [Row([Cell(text) for text in row]) for row in rows], note=note)

    @property
    def heads(self) -> list[str]:
        return [column.head for column in self.columns]

    @property
    def texts(self) -> list[list[str]]:
        """The texts of each row."""
        return [[cell.text for cell in row.cells] for row in self.rows]

    def without_empty_columns(self, heads: Sequence[str] | None = None) -> "Table":
        """The columns named by `heads`, or all, except those where every cell is empty or 0."""
        kept = [
            i
            for i, head in enumerate(self.heads)
            if (heads is None or head in heads) and any(row.cells[i].text not in ("", "0") for row in self.rows)
        ]
        rows = [replace(row, cells=[row.cells[i] for i in kept]) for row in self.rows]
        return replace(self, columns=[self.columns[i] for i in kept], rows=rows)

    def to_markdown(self) -> list[str]:
        """The lines of the table in Markdown."""
        head, *rows = (f"| {' | '.join(map(escape_markdown, texts))} |" for texts in (self.heads, *self.texts))
        return [head, "|---" * len(self.columns) + "|", *rows]
