"""What the figures of a comparison have in common: a look for each format and each method, and rows of differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from qbench.report.comparison.configurations import Configuration, Setting
from qbench.report.comparison.differences import Difference
from qbench.report.figures import CYCLE, GREY, MARKERS
from qbench.report.wording import short

SIXTEEN: dict[str, Any] = {"color": "black", "ls": "--", "lw": 1}  #: a line at 16 bit
MOST = 40  #: configurations in the figures that give each a row or a line


@dataclass(frozen=True)
class Chart:
    name: str
    caption: str
    figure: Figure


class Look:
    """A colour and a marker for each name: of a format the same in every figure; hollow is with double quantization."""

    def __init__(self, names: Sequence[str], colours: Sequence[str] = CYCLE[:6]):
        self.names = names
        self._colour = {name: colours[i % len(colours)] for i, name in enumerate(names)}
        self._marker = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(names)}

    @classmethod
    def of(cls, setting: Setting) -> "Look":
        return cls(sorted({c.format for c in setting.configurations if not c.is_16_bit}))

    def line(self, name: str) -> dict:
        return {"color": self._colour.get(name, "black"), "marker": self._marker.get(name, "x"), "ms": 5, "lw": 1.2}

    def point(self, c: Configuration) -> dict:
        line = self.line(c.format)
        hollow = c.config["dq"] and not c.is_16_bit
        return {**line, "ls": "none", "mfc": "white" if hollow else line["color"], "mew": 1.1}

    def legend(self, figure: Figure, dq: bool = True, /, **more: dict[str, Any]) -> None:
        handles = [
            plt.Line2D([], [], **self.line(name) | {"lw": 0}, label=labelled(short(name))) for name in self.names
        ]
        if dq:
            handles.append(plt.Line2D([], [], color=GREY, marker="o", mfc="white", lw=0, ms=5, label="with dq"))
        handles += [plt.Line2D([], [], **style, label=label) for label, style in more.items()]
        figure.legend(handles=handles, loc="outside right upper", frameon=False)


class _Digits(LogFormatter):
    """As Matplotlib labels a logarithmic axis, but in digits: its powers of ten are formulas, and no text is one here."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def in_digits(axis: Axis) -> None:
    """Have the labels of a logarithmic axis in digits."""
    axis.set_major_formatter(_Digits())
    axis.set_minor_formatter(_Digits())


def labelled(name: str) -> str:
    """As a legend shows it: one with an underscore before it would be left out."""
    return f" {name}" if name.startswith("_") else name


def margin(rows: int) -> float:
    """Of an axis with a row at each number: half a row at least."""
    return max(0.05, 0.5 / max(rows - 1, 1))


def forest(look: Look, panels: Mapping[str, Sequence[tuple[str, str, Difference]]], label: str) -> Figure:
    """Differences with their 95% intervals, hollow where not distinguishable from none. panels: by title, of each
    difference the name of its row, its format, and itself."""
    rows = sorted({name for panel in panels.values() for name, *_ in panel})
    figure, grid = plt.subplots(1, len(panels), figsize=(9.4, 0.9 + 0.24 * len(rows)), squeeze=False, sharey=True)
    for axes, (title, panel) in zip(grid[0], panels.items(), strict=True):
        for name, kind, d in panel:
            style = look.line(kind) | {"ls": "none", "mfc": None if d.distinguishable else "white"}
            axes.errorbar(d.delta, rows.index(name), xerr=d.half, elinewidth=0.8, **style)
        axes.axvline(0, **SIXTEEN)
        axes.margins(y=margin(len(rows)))
        axes.set(xlabel=label)
        axes.locator_params(axis="x", nbins=4)
        axes.set_title(title)
    grid[0][0].set_yticks(range(len(rows)), rows)
    grid[0][0].invert_yaxis()
    return figure
