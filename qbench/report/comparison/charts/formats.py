"""Formats compared: quality over size, all pairs, error by layer, throughput."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from qbench.report.comparison.configurations import Configuration, Setting, compare_at
from qbench.report.comparison.differences import correct_p_values
from qbench.report.comparison.selection import frontier, usual_block
from qbench.report.figures import GREY
from qbench.report.wording import count, shorten

from .style import SIXTEEN, Chart, Palette, label_in_digits, legend_label


@dataclass(frozen=True)
class _Quality:
    """A row of the Pareto figure. keys: of the metric. stage: of the configurations. frontier: whether it is drawn."""

    label: str
    keys: tuple[str, ...]
    stage: str = "quantized"
    frontier: bool = True


@dataclass(frozen=True)
class _Size:
    """A column of the Pareto figure: a range of sizes that is drawn without a gap.

    first: whether it is the first column of this kind of size.
    """

    label: str
    keys: tuple[str, ...]
    scale: float
    low: float
    high: float
    first: bool

    def value(self, c: Configuration) -> float:
        return c.known_mean(*self.keys) * self.scale


def draw_pareto(setting: Setting) -> Chart | None:
    """Quality over size: a grid with a row for each kind of quality, and columns for bits per weight and for memory.

                  bits per weight    model, MB
                 ┌──────┬  ┬─────┐  ┌──────┬
    perplexity   │  ●   │  │     │  │ ●    │     The axis of a size is cut where no format lies,
                 ├──────┼  ┼─────┤  ├──────┼     which gives it several columns.
    KL           │      │  │ ●   │  │      │
                 └──────┴  ┴─────┘  └──────┴
    """
    formats = _quantized_at(setting, "quantized")
    if len(formats) < 2:
        return None
    palette, qualities, sizes = Palette.of_formats(setting), _quality_rows(setting, formats), _size_columns(formats)
    widths = [max(0.35, (size.high - size.low) / size.high * 4) for size in sizes]
    figure, grid = plt.subplots(
        len(qualities), len(sizes), figsize=(9.4, 2.5 * len(qualities)), squeeze=False, sharey="row",
        gridspec_kw={"width_ratios": widths},
    )  # fmt: skip
    for row, quality in zip(grid, qualities, strict=True):
        for axes, size in zip(row, sizes, strict=True):
            _set_size_axis(axes, size, labelled=quality is qualities[-1])
            _draw_tradeoff(axes, setting, quality, size, palette)
        row[0].set_ylabel(quality.label)
    palette.legend(figure, **{"16 bit": SIXTEEN, "frontier": {"color": GREY, "lw": 1}})
    cut = " The axes of size are cut where no format lies." if len(sizes) > 2 else ""
    return Chart(
        "pareto",
        f"Quality over bits per weight and over the memory of the model. Lower and further left is better.{cut}",
        figure,
    )


def _quantized_at(setting: Setting, stage: str) -> list[Configuration]:
    return [c for c in setting.scored_at(stage) if not c.is_16_bit]


def _quality_rows(setting: Setting, formats: Sequence[Configuration]) -> list[_Quality]:
    """The rows: perplexity, and if measured KL and the tuned perplexity."""
    kl = ("quality", "quantized", "against_baseline", "kl_mean")
    qualities = [_Quality("perplexity", ("quality", "quantized", "perplexity"))]
    if any(c.mean(*kl) for c in formats):
        qualities.append(_Quality("KL from 16 bit, nats", kl, frontier=False))
    if setting.has_tuned:
        label = f"perplexity after {setting.method}"
        qualities.append(_Quality(label, ("quality", "tuned", "perplexity"), "tuned"))
    return qualities


def _size_columns(formats: Sequence[Configuration]) -> list[_Size]:
    """The columns: the ranges of bits per weight, then those of memory."""
    columns = []
    for label, keys, scale in (
        ("bits per weight", ("bits", "per_parameter"), 1.0),
        ("model, MB", ("memory", "model_bytes"), 1e-6),
    ):
        ranges = _split_at_gaps([c.known_mean(*keys) * scale for c in formats])
        columns += [_Size(label, keys, scale, low, high, i == 0) for i, (low, high) in enumerate(ranges)]
    return columns


def _split_at_gaps(values: Sequence[float]) -> list[tuple[float, float]]:
    """The values as (low, high) ranges, cut where the next value is more than a third larger."""
    ranges: list[list[float]] = []
    for value in sorted(values):
        if ranges and value < 1.34 * ranges[-1][1]:
            ranges[-1][1] = value
        else:
            ranges.append([value, value])
    return [(low, high) for low, high in ranges]


def _set_size_axis(axes: Axes, size: _Size, labelled: bool) -> None:
    """Set the limits, and hide the left border except in the first column of a size."""
    pad = max(0.06 * (size.high - size.low), 0.02 * size.high)
    axes.set_xlim(size.low - pad, size.high + pad)
    if size.high == size.low:
        axes.set_xticks([size.low], [f"{size.low:.4g}"])
    axes.tick_params(left=size.first)
    axes.spines["left"].set_visible(size.first)
    if labelled and size.first:
        axes.set_xlabel(size.label, loc="left")


def _draw_tradeoff(axes: Axes, setting: Setting, quality: _Quality, size: _Size, palette: Palette) -> None:
    """Draw the points of all formats, the frontier, and the line of 16 bit."""
    formats = _quantized_at(setting, quality.stage)
    many = len(_quantized_at(setting, "quantized")) > 200
    for members in _group_by_look(formats):
        points = [(size.value(c), y) for c in members if (y := c.mean(*quality.keys)) is not None]
        axes.plot(*np.array(points).reshape(-1, 2).T, **palette.point(members[0]), rasterized=many)
    if quality.frontier:
        best = frontier(formats, quality.stage, size.keys)
        heights = np.array([c.mean(*quality.keys) for c in best], float)  # None becomes NaN, a gap
        axes.plot([size.value(c) for c in best], heights, color=GREY, lw=0.9, zorder=0)
        base = setting.best_16_bit(quality.stage)
        if base and (height := base.mean(*quality.keys)) is not None:
            axes.axhline(height, **SIXTEEN)


def _group_by_look(formats: Sequence[Configuration]) -> list[list[Configuration]]:
    """The configurations grouped by format and dq, which share a marker."""
    groups: dict[tuple, list[Configuration]] = {}
    for c in formats:
        groups.setdefault((c.format, c.config["dq"]), []).append(c)
    return list(groups.values())


def draw_layers(setting: Setting) -> Chart | None:
    """The output error of each layer as a heat map: a row for each configuration, a column for each layer."""
    rows, names = _layer_errors(setting)
    if len(rows) < 2:
        return None
    kinds = [shorten(name.rpartition(".")[2]) for name in names]
    order = sorted(range(len(names)), key=lambda i: (kinds.index(kinds[i]), i))  # by kind, then by depth
    table = np.array([errors[order] for _, errors in rows])
    figure, axes = plt.subplots(figsize=(9.4, 1.5 + 0.19 * len(rows)))
    axes.grid(False)
    log = bool(table.min() > 0)
    image = axes.pcolormesh(table, cmap="viridis", norm="log" if log else None)
    axes.set_yticks(np.arange(len(rows)) + 0.5, [c.title for c, _ in rows], fontsize=7.5)
    axes.invert_yaxis()
    _label_kinds(axes, [kinds[i] for i in order])
    bar = figure.colorbar(image, ax=axes, label="error of the output, relative", shrink=0.9)
    if log:
        label_in_digits(bar.ax.yaxis)
    return Chart("layers", "Relative error of each layer's output on real text, the largest mean on top.", figure)


def _layer_errors(setting: Setting) -> tuple[list[tuple[Configuration, np.ndarray]], Sequence[str]]:
    """The output error of each layer, by configuration, the largest mean first; and the names of the layers.

    Configurations with other layers than the first are left out.
    """
    tables = []
    for c in _quantized_at(setting, "quantized"):
        layers = c.results[0]["metrics"].get("error", {}).get("layers")
        if isinstance(layers, dict):
            tables.append((c, layers))
    names = tables[0][1]["name"] if tables else ()
    rows = [(c, np.asarray(layers["output_relative"], float)) for c, layers in tables if layers["name"] == names]
    return sorted(rows, key=lambda row: -np.mean(row[1])), names


def _label_kinds(axes: Axes, kinds: Sequence[str]) -> None:
    """Label each run of columns of the same kind in its middle, with a white line before it."""
    starts = [i for i in range(len(kinds)) if i == 0 or kinds[i] != kinds[i - 1]]
    ends = [*starts[1:], len(kinds)]
    middles = [(start + end) / 2 for start, end in zip(starts, ends, strict=True)]
    axes.set_xticks(middles, [kinds[start] for start in starts], rotation=30, ha="right")
    for start in starts[1:]:
        axes.axvline(start, color="white", lw=1.5)
    axes.set_xlabel("layers by kind, each from the first block to the last")


def draw_pairs(setting: Setting) -> Chart | None:
    """The paired difference of every two configurations, as a triangle of colors."""
    stage = setting.stages[-1]
    ranked = sorted(setting.scored_at(stage), key=lambda c: c.sort_key(stage))
    if len(ranked) < 3:
        return None
    pairs = [(i, j) for i in range(len(ranked)) for j in range(i + 1, len(ranked))]
    family = correct_p_values([compare_at(ranked[j], ranked[i], stage) for i, j in pairs])
    table = np.full((len(ranked), len(ranked)), math.nan)
    side = 2.2 + 0.2 * len(ranked)
    indistinct = []
    for (i, j), d in zip(pairs, family, strict=True):
        if d:
            table[j, i] = d.delta
            if not d.distinguishable:
                indistinct.append((j, i))
    if np.isnan(table).all():
        return None
    figure, axes = plt.subplots(figsize=(min(9.4, side + 1.6), side))
    axes.grid(False)
    image = axes.pcolormesh(table, cmap="cividis_r", vmin=0)
    for row, column in indistinct:
        axes.text(column + 0.5, row + 0.5, "≈", ha="center", va="center", fontsize=7, color="black")
    middles = np.arange(len(ranked)) + 0.5
    axes.set_yticks(middles, [c.title for c in ranked], fontsize=7.5)
    axes.set_xticks(middles, [c.title for c in ranked], rotation=90, fontsize=7.5)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    figure.colorbar(image, ax=axes, label="nll of the row minus that of the column, nats", shrink=0.7)
    return Chart(
        "pairs",
        f"Every two configurations compared {setting.when(stage)}, the best first. ≈ marks a difference that is not"
        f" distinguishable from zero (paired, corrected for {len(pairs)} tests).",
        figure,
    )


def draw_throughput(setting: Setting) -> Chart | None:
    """Tokens per second over the number of tokens read at once, a line for each format."""
    palette = Palette.of_formats(setting)
    measured = [(c, by_rows) for c in _one_per_format(setting) if (by_rows := _rates_by_rows(c))]
    if not measured:
        return None
    figure, axes = plt.subplots(figsize=(7.6, 3.4))
    for c, (rows, rates) in sorted(measured, key=lambda pair: pair[0].title):
        style = SIXTEEN | {"lw": 1.2} if c.is_16_bit else palette.line(c.format)
        axes.plot(rows, rates, **style, label=legend_label(c.title))
    axes.set(xscale="log", yscale="log", xlabel="M, tokens read at once", ylabel="tokens/s, quantized model")
    label_in_digits(axes.yaxis)
    axes.set_xticks(rows, [f"{m}" for m in rows])
    axes.xaxis.minorticks_off()
    figure.legend(loc="outside right upper", frameon=False)
    device = measured[0][0].results[0].get("environment") or {}
    where = f" on {device.get('device')}, {count(device.get('threads') or 0, 'thread')}" if device else ""
    return Chart(
        "throughput", f"Forward throughput of the whole model over the number of tokens read at once{where}.", figure
    )


def _rates_by_rows(c: Configuration) -> tuple[list[int], list[float]] | None:
    """The rows (tokens read at once), and the median over seeds of the rate at each.

    Runs that measured other rows than the first run are left out.
    """
    tables = [result["metrics"]["throughput"].get("by_rows") for result in c.results]
    measured = [(list(t["rows"]), np.asarray(t["median"], float)) for t in tables if isinstance(t, dict)]
    if not measured:
        return None
    rows = measured[0][0]
    return [int(m) for m in rows], list(np.median([rates for other, rates in measured if other == rows], 0))


def _one_per_format(setting: Setting) -> list[Configuration]:
    """One configuration for each format: if possible with the usual block, and without dq."""
    configurations = setting.scored_at("quantized")
    usual = usual_block(configurations)

    def rank(c: Configuration) -> tuple[bool, bool]:
        return c.config["block"] != usual, c.config["dq"]

    chosen: dict[str, Configuration] = {}
    for c in configurations:
        if c.format not in chosen or rank(c) < rank(chosen[c.format]):
            chosen[c.format] = c
    return list(chosen.values())
