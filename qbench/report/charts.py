"""The figures of a comparison: each is a function of a setting, or None where it has nothing to show."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from .compare import Configuration, Setting, corrected, difference, featured, frontier
from .figures import CYCLE, GREY, MARKERS, STYLE
from .findings import count, effects, when

SIZES = {
    "bits a weight": (("bits", "per_parameter"), 1.0),
    "model, MB": (("memory", "model_bytes"), 1e-6),
}
MOST = 40  #: configurations in the figures that give each a row or a line


@dataclass(frozen=True)
class Chart:
    name: str
    caption: str
    figure: Figure | None = None


@contextmanager
def drawn(setting: Setting) -> Iterator[list[Chart]]:
    """Every figure that the setting has data for; they are closed on leaving."""
    few = featured(setting, MOST)
    cut = (
        ""
        if few is setting
        else f" {MOST} of {len(setting.configurations):,}: the frontiers, and the best of the rest."
    )
    with plt.rc_context(STYLE | {"figure.dpi": 110, "axes.titlesize": 10, "svg.hashsalt": "qbench"}):
        made = [pareto(setting)] if len(setting.configurations) > 2 else []
        for make in (slopes, blocks, ranks, double, pairs, layers, throughput):
            if chart := make(few):
                made.append(replace(chart, caption=chart.caption + cut))
        made = [chart for chart in made if chart]
        try:
            yield made
        finally:
            for chart in made:
                plt.close(chart.figure)


class Look:
    """A colour and a marker for each format, the same in every figure; hollow is with double quantization."""

    def __init__(self, setting: Setting):
        names = sorted({c.format for c in setting.configurations if not c.is_16_bit})
        self.names = names
        self._colour = {name: CYCLE[i % 6] for i, name in enumerate(names)}
        self._marker = {name: MARKERS[i % len(MARKERS)] for i, name in enumerate(names)}

    def line(self, name: str) -> dict:
        return {"color": self._colour.get(name, "black"), "marker": self._marker.get(name, "x"), "ms": 5, "lw": 1.2}

    def point(self, c: Configuration) -> dict:
        line = self.line(c.format)
        return {**line, "ls": "none", "mfc": "white" if c.config["dq"] else line["color"], "mew": 1.1}

    def legend(self, figure: Figure, **more) -> None:
        handles = [plt.Line2D([], [], **self.line(name) | {"lw": 0}, label=name) for name in self.names]
        handles.append(plt.Line2D([], [], color=GREY, marker="o", mfc="white", lw=0, ms=5, label="with dq"))
        handles += [plt.Line2D([], [], **style, label=label) for label, style in more.items()]
        figure.legend(handles=handles, loc="outside right upper", frameon=False)


def _split(values: Sequence[float]) -> list[tuple[float, float]]:
    """The ranges that values fall into where no gap within is wider than a third of what is below it."""
    ranges: list[list[float]] = []
    for value in sorted(values):
        if ranges and value < 1.34 * ranges[-1][1]:
            ranges[-1][1] = value
        else:
            ranges.append([value, value])
    return [(low, high) for low, high in ranges]


def pareto(setting: Setting) -> Chart | None:
    """Perplexity and KL over bits and over memory, the axis of sizes cut where nothing lies."""
    formats = [c for c in setting.configurations if not c.is_16_bit]
    if len(formats) < 2:
        return None
    look = Look(setting)
    measures = [("perplexity", ("quality", "quantized", "perplexity"), "quantized")]
    if any(c.mean("quality", "quantized", "against_baseline", "kl_mean") for c in formats):
        measures.append(("KL from 16 bit, nats", ("quality", "quantized", "against_baseline", "kl_mean"), None))
    if setting.has_tuned:
        measures.append((f"perplexity after {setting.method}", ("quality", "tuned", "perplexity"), "tuned"))
    base = next((c for c in setting.configurations if c.is_16_bit), None)
    columns = [(label, *size, part) for label, size in SIZES.items() for part in _parts(formats, *size)]
    widths = [max(0.35, (high - low) / high * 4) for *_, (low, high) in columns]
    figure, grid = plt.subplots(
        len(measures), len(columns), figsize=(9.4, 2.5 * len(measures)), squeeze=False, sharey="row",
        gridspec_kw={"width_ratios": widths}, layout="constrained",
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
            for members in _alike(formats):
                points = [(c.mean(*size), c.mean(*keys)) for c in members]
                points = np.array([(x * scale, y) for x, y in points if y is not None]).reshape(-1, 2)
                axes.plot(*points.T, **look.point(members[0]), rasterized=len(formats) > 200)
            if stage:
                best = frontier(formats, stage, size)
                axes.plot(
                    [c.mean(*size) * scale for c in best], [c.mean(*keys) for c in best], color=GREY, lw=0.9, zorder=0
                )
            if base and base.mean(*keys) is not None and stage:
                axes.axhline(base.mean(*keys), color="black", lw=1, ls="--")
        grid[i][0].set_ylabel(name)
    look.legend(figure, **{"16 bit": {"color": "black", "ls": "--", "lw": 1}, "frontier": {"color": GREY, "lw": 1}})
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
    return _split([c.mean(*size) * scale for c in formats])


def _plainest(setting: Setting) -> list[Configuration]:
    """One configuration a format: with the block that most have, and without dq where there is one."""
    blocks = [c.config["block"] for c in setting.configurations if not c.is_16_bit]
    usual = 64 if 64 in blocks else max(set(blocks), key=blocks.count, default=64)
    chosen: dict[str, Configuration] = {}
    for c in setting.configurations:
        rank = (c.config["block"] != usual, c.config["dq"])
        other = chosen.get(c.format)
        if other is None or rank < (other.config["block"] != usual, other.config["dq"]):
            chosen[c.format] = c
    return list(chosen.values())


def throughput(setting: Setting) -> Chart | None:
    """Tokens a second over the rows that meet each weight at once."""
    look = Look(setting)
    some = [c for c in _plainest(setting) if _by_rows(c)]
    if not some:
        return None
    figure, axes = plt.subplots(figsize=(7.6, 3.4), layout="constrained")
    for c in sorted(some, key=lambda c: c.title):
        rows, rates = _by_rows(c)
        style = {"color": "black", "ls": "--", "lw": 1.2} if c.is_16_bit else look.line(c.format)
        axes.plot(rows, rates, **style, label=c.title)
    axes.set(xscale="log", yscale="log", xlabel="M, tokens read at once", ylabel="tokens/s, quantized model")
    axes.set_xticks(rows, [f"{m}" for m in rows])
    axes.xaxis.minorticks_off()
    figure.legend(loc="outside right upper", frameon=False)
    device = next(iter(some[0].runs.values()))[1].get("environment") or {}
    where = f" on {device.get('device')}, {count(device.get('threads') or 0, 'thread')}" if device else ""
    return Chart(
        "throughput", f"Forward throughput of the whole model over the number of tokens read at once{where}.", figure
    )


def _by_rows(c: Configuration) -> tuple[list[int], list[float]] | None:
    """Rows, and the median over seeds of the median rate."""
    found = [r["metrics"].get("throughput", {}).get("by_rows") for _, r in c.runs.values()]
    found = [f for f in found if f]
    if not found:
        return None
    return [int(m) for m in found[0]["rows"]], list(np.median([f["median"] for f in found], 0))


def slopes(setting: Setting) -> Chart | None:
    """What the fine-tune wins back: the distance from 16 bit before and after."""
    found = [c for c in setting.configurations if {"quantized", "tuned"} <= c.differences.keys()]
    if not found:
        return None
    look = Look(setting)
    figure, axes = plt.subplots(figsize=(7.6, 4), layout="constrained")
    for i, c in enumerate(found):
        ends = [c.differences["quantized"], c.differences["tuned"]]
        x = np.array([0, 1]) + (i - (len(found) - 1) / 2) * 0.12 / len(found)
        axes.errorbar(
            x, [d.delta for d in ends], yerr=[1.96 * (d.stderr or 0) for d in ends], elinewidth=0.6,
            **look.point(c) | {"ls": "-", "lw": 0.8},
        )  # fmt: skip
    axes.axhline(0, color="black", lw=1, ls="--")
    axes.set_xticks([0, 1], ["quantized, against 16 bit", f"after {setting.method}, against the same on 16 bit"])
    axes.set(xlim=(-0.3, 1.3), ylabel="Δ nll, nats a token")
    look.legend(figure, **{"16 bit": {"color": "black", "ls": "--", "lw": 1}})
    return Chart(
        "slopes",
        "The distance from 16 bit before and after the fine-tune, paired, with 95% intervals; zero is as good as 16 bit.",
        figure,
    )


def blocks(setting: Setting) -> Chart | None:
    """The effect of the block size, on the distance from 16 bit."""
    return _over(
        setting, "block", "block, weights under one scale", "Δ nll against 16 bit, nats a token",
        lambda c, stage: (found := c.differences.get(stage)) and (found.delta, 1.96 * (found.stderr or 0)),
        Chart("blocks", "What a larger block costs, with 95% intervals; dotted is with double quantization."),
    )  # fmt: skip


def ranks(setting: Setting) -> Chart | None:
    """The effect of LoRA's rank, on the perplexity."""
    return _over(
        setting, "rank", "rank of LoRA", "perplexity",
        lambda c, stage: (value := c.mean("quality", stage, "perplexity"))
        and (value, c.interval("quality", stage, "perplexity") or 0),
        Chart("ranks", "Perplexity over the rank, with 95% intervals over seeds; dotted is with double quantization."),
    )  # fmt: skip


def _over(setting: Setting, key: str, label: str, measured: str, value: Callable, chart: "Chart") -> Chart | None:
    """Lines over a key of the config, those alike in all else together; a panel before the fine-tune and one after."""

    def at(c: Configuration):
        return (c.config | c.config["tune"]).get(key)

    look = Look(setting)
    sizes = sorted({at(c) for c in setting.configurations if at(c) and not (c.is_16_bit and key == "block")})
    stages = [s for s in setting.stages() if any(value(c, s) for c in setting.configurations)]
    stages = [s for s in stages if key == "block" or s == "tuned"]
    if len(sizes) < 2 or not stages:
        return None
    figure, panels = plt.subplots(1, len(stages), figsize=(9.4, 3.2), squeeze=False, layout="constrained")
    for axes, stage in zip(panels[0], stages, strict=True):
        lines: dict[str, list[Configuration]] = {}
        for c in setting.configurations:
            if at(c) in sizes and value(c, stage):
                rest = (c.config | c.config["tune"]) | {key: None, "tune": None}
                lines.setdefault(str([c.format, rest["dq"], rest["block"], rest.get("rank")]), []).append(c)
        for members in lines.values():
            members.sort(key=at)
            heights, errors = zip(*(value(c, stage) for c in members), strict=True)
            style = look.point(members[0]) | {"ls": ":" if members[0].config["dq"] else "-", "lw": 1}
            axes.errorbar([at(c) for c in members], heights, yerr=errors, elinewidth=0.6, **style)
        axes.set(xscale="log", xlabel=label, ylabel=measured)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.xaxis.minorticks_off()
        if key == "block":
            axes.axhline(0, color="black", lw=1, ls="--")
        axes.set_title(when(setting, stage))
    look.legend(figure, **{"16 bit": {"color": "black", "ls": "--", "lw": 1}})
    return replace(chart, figure=figure)


def double(setting: Setting) -> Chart | None:
    """The effect of double quantization: each pair's difference, with its interval."""
    found = {stage: effects(setting, "dq", stage) for stage in setting.stages()}
    if not any(found.values()):
        return None
    look = Look(setting)
    rows = sorted({with_dq for pairs in found.values() for with_dq, *_ in pairs}, key=lambda c: c.title)
    figure, panels = plt.subplots(
        1, len(found), figsize=(9.4, 0.9 + 0.24 * len(rows)), squeeze=False, sharey=True, layout="constrained"
    )
    for axes, (stage, pairs) in zip(panels[0], found.items(), strict=True):
        for with_dq, _, d in pairs:
            if with_dq in rows:
                style = look.line(with_dq.format) | {"ls": "none", "mfc": None if d.distinguishable else "white"}
                axes.errorbar(d.delta, rows.index(with_dq), xerr=1.96 * (d.stderr or 0), elinewidth=0.8, **style)
        axes.axvline(0, color="black", lw=1, ls="--")
        axes.set(xlabel="Δ nll of dq, nats a token")
        axes.locator_params(axis="x", nbins=4)
        axes.set_title(when(setting, stage))
    panels[0][0].set_yticks(range(len(rows)), [c.title.replace(" + dq", "") for c in rows])
    panels[0][0].invert_yaxis()
    return Chart(
        "double_quantization",
        "What double quantization costs: with it less without it, paired, 95% intervals; hollow is not distinguishable"
        " from none.",
        figure,
    )


def layers(setting: Setting) -> Chart | None:
    """Error by layer as a heat map, a row a configuration."""
    some = [
        (c, next(iter(c.runs.values()))[1]["metrics"].get("error", {}).get("layers")) for c in setting.configurations
    ]
    some = [(c, found) for c, found in some if isinstance(found, dict) and not c.is_16_bit]
    names = some[0][1]["name"] if some else ()
    some = sorted([(c, f) for c, f in some if f["name"] == names], key=lambda s: -np.mean(s[1]["output_relative"]))
    if len(some) < 2:
        return None
    kinds = [name.rpartition(".")[2] for name in names]
    order = sorted(range(len(names)), key=lambda i: (kinds.index(kinds[i]), i))
    table = np.array([np.asarray(found["output_relative"], float)[order] for _, found in some])
    figure, axes = plt.subplots(figsize=(9.4, 1.5 + 0.19 * len(some)), layout="constrained")
    axes.grid(False)
    image = axes.pcolormesh(table, cmap="viridis", norm="log" if table.min() > 0 else None)
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
    figure.colorbar(image, ax=axes, label="error of the output, relative", shrink=0.9)
    return Chart("layers", "Relative error of each layer's output on real text, the largest mean on top.", figure)


def pairs(setting: Setting) -> Chart | None:
    """Every two configurations against each other, on the same windows and seeds."""
    stage = setting.stages()[-1]
    some = sorted([c for c in setting.configurations if c.nll(stage) is not None], key=lambda c: c.nll(stage))
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
    figure, axes = plt.subplots(figsize=(min(9.4, side + 1.6), side), layout="constrained")
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
        f"Every two against each other {when(setting, stage)}, the best first; ≈: not distinguishable (paired, corrected"
        f" for {len(upper)} tests).",
        figure,
    )
