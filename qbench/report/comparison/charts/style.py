"""Parts that the figures of a comparison share: colors and markers of names, axes in digits, and rows of differences."""

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
from qbench.report.wording import shorten

SIXTEEN: dict[str, Any] = {"color": "black", "ls": "--", "lw": 1}  #: the line of 16 bit
MOST = 40  #: configurations in figures with a row or a line for each


@dataclass(frozen=True)
class Chart:
    """A figure and its caption. name: of its file."""

    name: str
    caption: str
    figure: Figure


class Palette:
    """A color and a marker for each name. A hollow marker means double quantization."""

    def __init__(self, names: Sequence[str], colors: Sequence[str] = CYCLE[:6]):
        self.names = names
        self._colors = {name: colors[i % len(colors)] for i, name in enumerate(names)}
        self._markers = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(names)}

    @classmethod
    def of_formats(cls, setting: Setting) -> "Palette":
        """The palette of a setting's formats, the same in each of its figures."""
        return cls(sorted({c.format for c in setting.configurations if not c.is_16_bit}))

    def line(self, name: str) -> dict:
        """Matplotlib's keywords for a line with markers."""
        return {"color": self._colors.get(name, "black"), "marker": self._markers.get(name, "x"), "ms": 5, "lw": 1.2}

    def point(self, c: Configuration) -> dict:
        """Matplotlib's keywords for the marker of a configuration."""
        line = self.line(c.format)
        hollow = c.config["dq"] and not c.is_16_bit
        return {**line, "ls": "none", "mfc": "white" if hollow else line["color"], "mew": 1.1}

    def legend(self, figure: Figure, dq: bool = True, /, **more: dict[str, Any]) -> None:
        """Add the legend. dq: with the hollow marker. more: further labels, and the keywords of their lines."""
        handles = [
            plt.Line2D([], [], **self.line(name) | {"lw": 0}, label=legend_label(shorten(name))) for name in self.names
        ]
        if dq:
            handles.append(plt.Line2D([], [], color=GREY, marker="o", mfc="white", lw=0, ms=5, label="with dq"))
        handles += [plt.Line2D([], [], **style, label=label) for label, style in more.items()]
        figure.legend(handles=handles, loc="outside right upper", frameon=False)


class _Digits(LogFormatter):
    """Labels a logarithmic axis in digits. Matplotlib's powers of ten are formulas, which the style turns off."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def label_in_digits(axis: Axis) -> None:
    """Label a logarithmic axis in digits."""
    axis.set_major_formatter(_Digits())
    axis.set_minor_formatter(_Digits())


def legend_label(name: str) -> str:
    """The name for a legend. Matplotlib leaves out labels that begin with an underscore, so a space goes before it."""
    return f" {name}" if name.startswith("_") else name


def row_margin(rows: int) -> float:
    """The margin of an axis with that many rows: half a row at least."""
    return max(0.05, 0.5 / max(rows - 1, 1))


def draw_differences(
    palette: Palette, panels: Mapping[str, Sequence[tuple[str, str, Difference]]], label: str
) -> Figure:
    """Differences with 95% intervals, a row each; hollow if not distinguishable from zero.

    panels: by title, the row's name, the format and the difference of each. label: of the axis.
    """
    rows = sorted({name for panel in panels.values() for name, *_ in panel})
    figure, grid = plt.subplots(1, len(panels), figsize=(9.4, 0.9 + 0.24 * len(rows)), squeeze=False, sharey=True)
    for axes, (title, panel) in zip(grid[0], panels.items(), strict=True):
        for name, fmt, d in panel:
            style = palette.line(fmt) | {"ls": "none", "mfc": None if d.distinguishable else "white"}
            axes.errorbar(d.delta, rows.index(name), xerr=d.half_interval, elinewidth=0.8, **style)
        axes.axvline(0, **SIXTEEN)
        axes.margins(y=row_margin(len(rows)))
        axes.set(xlabel=label)
        axes.locator_params(axis="x", nbins=4)
        axes.set_title(title)
    grid[0][0].set_yticks(range(len(rows)), rows)
    grid[0][0].invert_yaxis()
    return figure
