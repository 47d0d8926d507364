"""Formats beside each other: quality over size, every two against each other, error by layer, throughput."""

import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np

from qbench.report.comparison.configurations import Configuration, Setting, difference
from qbench.report.comparison.differences import corrected
from qbench.report.comparison.selection import frontier, usual_block
from qbench.report.figures import GREY
from qbench.report.wording import count, short

from .style import SIXTEEN, Chart, Look, in_digits, labelled

SIZES = {
    "bits a weight": (("bits", "per_parameter"), 1.0),
    "model, MB": (("memory", "model_bytes"), 1e-6),
}


def pareto(setting: Setting) -> Chart | None:
    """Perplexity and KL over bits and over memory, the axis of sizes cut where nothing lies."""
    at = {stage: [c for c in setting.at(stage) if not c.is_16_bit] for stage in setting.stages()}
    formats = at["quantized"]
    if len(formats) < 2:
        return None
    look = Look.of(setting)
    measures: list[tuple[str, tuple[str, ...], str | None]] = [
        ("perplexity", ("quality", "quantized", "perplexity"), "quantized")
    ]
    if any(c.mean("quality", "quantized", "against_baseline", "kl_mean") for c in formats):
        measures.append(("KL from 16 bit, nats", ("quality", "quantized", "against_baseline", "kl_mean"), None))
    if setting.has_tuned:
        measures.append((f"perplexity after {setting.method}", ("quality", "tuned", "perplexity"), "tuned"))
    columns = [(label, *size, part) for label, size in SIZES.items() for part in _parts(formats, *size)]
    widths = [max(0.35, (high - low) / high * 4) for *_, (low, high) in columns]
    figure, grid = plt.subplots(
        len(measures), len(columns), figsize=(9.4, 2.5 * len(measures)), squeeze=False, sharey="row",
        gridspec_kw={"width_ratios": widths},
    )  # fmt: skip
    for i, (name, keys, stage) in enumerate(measures):
        for j, (label, size, scale, (low, high)) in enumerate(columns):
            axes = grid[i][j]
            pad = max(0.06 * (high - low), 0.02 * high)
            axes.set_xlim(low - pad, high + pad)
            if high == low:
                axes.set_xticks([low], [f"{low:.4g}"])
            first = j == 0 or columns[j - 1][0] != label
            axes.tick_params(left=first)
            axes.spines["left"].set_visible(first)
            if i == len(measures) - 1 and first:
                axes.set_xlabel(label, loc="left")
            for members in _alike(at[stage or "quantized"]):
                found = [(c.known(*size) * scale, y) for c in members if (y := c.mean(*keys)) is not None]
                points = np.array(found).reshape(-1, 2)
                axes.plot(*points.T, **look.point(members[0]), rasterized=len(formats) > 200)
            if stage:
                best = frontier(at[stage], stage, size)
                axes.plot(
                    [c.known(*size) * scale for c in best], [c.mean(*keys) for c in best], color=GREY, lw=0.9, zorder=0
                )
            if stage and (base := setting.base(stage)):
                axes.axhline(base.mean(*keys), **SIXTEEN)
        grid[i][0].set_ylabel(name)
    look.legend(figure, **{"16 bit": SIXTEEN, "frontier": {"color": GREY, "lw": 1}})
    cut = " The axes of size are cut where no format lies." if len(columns) > 2 else ""
    return Chart(
        "pareto",
        f"Quality over bits a weight and over the memory that the model holds; lower and further left is better.{cut}",
        figure,
    )


def _alike(formats: Sequence[Configuration]) -> list[list[Configuration]]:
    """Those that look the same, together."""
    groups: dict[tuple, list[Configuration]] = {}
    for c in formats:
        groups.setdefault((c.format, c.config["dq"]), []).append(c)
    return list(groups.values())


def _parts(formats: Sequence[Configuration], size: tuple[str, ...], scale: float) -> list[tuple[float, float]]:
    return _split([c.known(*size) * scale for c in formats])


def _split(values: Sequence[float]) -> list[tuple[float, float]]:
    """The ranges that values fall into where no gap within is wider than a third of what is below it."""
    ranges: list[list[float]] = []
    for value in sorted(values):
        if ranges and value < 1.34 * ranges[-1][1]:
            ranges[-1][1] = value
        else:
            ranges.append([value, value])
    return [(low, high) for low, high in ranges]


def layers(setting: Setting) -> Chart | None:
    """Error by layer as a heat map, a row a configuration."""
    some = [
        (c, next(iter(c.runs.values()))[1]["metrics"].get("error", {}).get("layers")) for c in setting.at("quantized")
    ]
    some = [(c, found) for c, found in some if isinstance(found, dict) and not c.is_16_bit]
    names = some[0][1]["name"] if some else ()
    some = sorted([(c, f) for c, f in some if f["name"] == names], key=lambda s: -np.mean(s[1]["output_relative"]))
    if len(some) < 2:
        return None
    kinds = [short(name.rpartition(".")[2]) for name in names]
    order = sorted(range(len(names)), key=lambda i: (kinds.index(kinds[i]), i))
    table = np.array([np.asarray(found["output_relative"], float)[order] for _, found in some])
    figure, axes = plt.subplots(figsize=(9.4, 1.5 + 0.19 * len(some)))
    axes.grid(False)
    log = bool(table.min() > 0)
    image = axes.pcolormesh(table, cmap="viridis", norm="log" if log else None)
    axes.set_yticks(np.arange(len(some)) + 0.5, [c.title for c, _ in some], fontsize=7.5)
    axes.invert_yaxis()
    starts = [i for i in range(len(order)) if i == 0 or kinds[order[i]] != kinds[order[i - 1]]]
    ends = [*starts[1:], len(order)]
    axes.set_xticks(
        [(a + b) / 2 for a, b in zip(starts, ends, strict=True)],
        [kinds[order[a]] for a in starts],
        rotation=30,
        ha="right",
    )
    for start in starts[1:]:
        axes.axvline(start, color="white", lw=1.5)
    axes.set_xlabel("layers by kind, each from the first block to the last")
    bar = figure.colorbar(image, ax=axes, label="error of the output, relative", shrink=0.9)
    if log:
        in_digits(bar.ax.yaxis)
    return Chart("layers", "Relative error of each layer's output on real text, the largest mean on top.", figure)


def pairs(setting: Setting) -> Chart | None:
    """Every two configurations against each other, on the same windows and seeds."""
    stage = setting.stages()[-1]
    some = sorted(setting.at(stage), key=lambda c: c.order(stage))
    if len(some) < 3:
        return None
    upper = [(i, j) for i in range(len(some)) for j in range(i + 1, len(some))]
    found = corrected([difference(some[j], some[i], stage) for i, j in upper])
    table = np.full((len(some), len(some)), math.nan)
    blurred = []
    for (i, j), d in zip(upper, found, strict=True):
        if d:
            table[j, i] = d.delta
            blurred += [] if d.distinguishable else [(j, i)]
    if np.isnan(table).all():
        return None
    side = 2.2 + 0.2 * len(some)
    figure, axes = plt.subplots(figsize=(min(9.4, side + 1.6), side))
    axes.grid(False)
    image = axes.pcolormesh(table, cmap="cividis_r", vmin=0)
    for j, i in blurred:
        axes.text(i + 0.5, j + 0.5, "≈", ha="center", va="center", fontsize=7, color="black")
    middle = np.arange(len(some)) + 0.5
    axes.set_yticks(middle, [c.title for c in some], fontsize=7.5)
    axes.set_xticks(middle, [c.title for c in some], rotation=90, fontsize=7.5)
    axes.set_aspect("equal")
    axes.invert_yaxis()
    figure.colorbar(image, ax=axes, label="nll of the row less that of the column, nats", shrink=0.7)
    return Chart(
        "pairs",
        f"Every two against each other {setting.when(stage)}, the best first; ≈: not distinguishable (paired, corrected"
        f" for {len(upper)} tests).",
        figure,
    )


def throughput(setting: Setting) -> Chart | None:
    """Tokens a second over the rows that meet each weight at once."""
    look = Look.of(setting)
    some = [(c, found) for c in _plainest(setting) if (found := _by_rows(c))]
    if not some:
        return None
    figure, axes = plt.subplots(figsize=(7.6, 3.4))
    for c, (rows, rates) in sorted(some, key=lambda one: one[0].title):
        style = SIXTEEN | {"lw": 1.2} if c.is_16_bit else look.line(c.format)
        axes.plot(rows, rates, **style, label=labelled(c.title))
    axes.set(xscale="log", yscale="log", xlabel="M, tokens read at once", ylabel="tokens/s, quantized model")
    in_digits(axes.yaxis)
    axes.set_xticks(rows, [f"{m}" for m in rows])
    axes.xaxis.minorticks_off()
    figure.legend(loc="outside right upper", frameon=False)
    device = next(iter(some[0][0].runs.values()))[1].get("environment") or {}
    where = f" on {device.get('device')}, {count(device.get('threads') or 0, 'thread')}" if device else ""
    return Chart(
        "throughput", f"Forward throughput of the whole model over the number of tokens read at once{where}.", figure
    )


def _by_rows(c: Configuration) -> tuple[list[int], list[float]] | None:
    """Rows, and the median over seeds of the median rate, of those that have the rows of the first."""
    found = [r["metrics"]["throughput"].get("by_rows") for _, r in c.runs.values()]
    found = [(list(f["rows"]), np.asarray(f["median"], float)) for f in found if isinstance(f, dict)]
    if not found:
        return None
    rows = found[0][0]
    return [int(m) for m in rows], list(np.median([rates for others, rates in found if others == rows], 0))


def _plainest(setting: Setting) -> list[Configuration]:
    """One configuration a format: with the block that most have, and without dq where there is one."""
    some = setting.at("quantized")
    usual = usual_block(some)
    chosen: dict[str, Configuration] = {}
    for c in some:
        rank = (c.config["block"] != usual, c.config["dq"])
        other = chosen.get(c.format)
        if other is None or rank < (other.config["block"] != usual, other.config["dq"]):
            chosen[c.format] = c
    return list(chosen.values())
