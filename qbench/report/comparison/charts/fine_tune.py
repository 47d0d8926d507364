"""What the fine-tune changes: the distance from 16 bit, learning rates, methods, initializations of LoRA."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from qbench.report.comparison.adapters import compare_inits
from qbench.report.comparison.configurations import Setting
from qbench.report.comparison.methods import Series, find_series, has_several_fine_tunes
from qbench.report.figures import CYCLE
from qbench.report.wording import METHODS, recipe_name

from .style import MOST, SIXTEEN, Chart, Palette, draw_differences, label_in_digits, row_margin

TUNED = ("quality", "tuned", "perplexity")


def draw_slopes(setting: Setting) -> Chart | None:
    """The distance from 16 bit before and after the fine-tune, a line for each configuration."""
    configurations = [c for c in setting.configurations if {"quantized", "tuned"} <= c.differences.keys()]
    if not configurations:
        return None
    palette = Palette.of_formats(setting)
    figure, axes = plt.subplots(figsize=(7.6, 4))
    for i, c in enumerate(configurations):
        ends = [c.differences["quantized"], c.differences["tuned"]]
        x = np.array([0, 1]) + (i - (len(configurations) - 1) / 2) * 0.12 / len(configurations)
        axes.errorbar(
            x, [d.delta for d in ends], yerr=[d.half_interval for d in ends], elinewidth=0.6,
            **palette.point(c) | {"ls": "-", "lw": 0.8},
        )  # fmt: skip
    axes.axhline(0, **SIXTEEN)
    axes.set_xticks([0, 1], ["quantized, from 16 bit", f"after {setting.method}, from the same on 16 bit"])
    axes.set(xlim=(-0.3, 1.3), ylabel="Δ nll, nats per token")
    palette.legend(figure, **{"16 bit": SIXTEEN})
    return Chart(
        "slopes",
        "The distance from 16 bit before and after the fine-tune, paired, with 95% intervals. Zero is as good as 16 bit.",
        figure,
    )


def draw_learning_rates(setting: Setting) -> Chart | None:
    """The tuned perplexity over the learning rate: a panel for each format, a line for each method."""
    swept = [s for s in find_series(setting) if len(s.rates) > 1]
    if not swept:
        return None
    panels: dict[str, list[Series]] = {}
    for s in sorted(swept, key=lambda s: (not s.best.is_16_bit, recipe_name(s.best.config))):
        panels.setdefault(recipe_name(s.best.config), []).append(s)
    palette = Palette(sorted({s.name for s in swept}, key=_method_order), CYCLE)
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)  # rounded up
    figure, grid = plt.subplots(
        rows, columns, figsize=(9.4 if columns > 1 else 7.6, 0.6 + 3.2 * rows), squeeze=False, sharex=True, sharey=True,
    )  # fmt: skip
    base = setting.best_16_bit("quantized")
    assert base is not None  # every setting has one
    untuned = base.known_mean("quality", "quantized", "perplexity")
    for axes, (name, series) in zip(grid.flat, panels.items(), strict=False):
        _draw_rates(axes, series, palette)
        axes.axhline(untuned, **SIXTEEN)
        axes.set(xscale="log", yscale="log", title=name)
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.5 * untuned))
        label_in_digits(axes.xaxis)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    figure.supxlabel("learning rate", fontsize=9)
    figure.supylabel("tuned perplexity", fontsize=9)
    palette.legend(figure, False, **{"16 bit, untuned": SIXTEEN})
    return Chart(
        "learning_rates",
        "Tuned perplexity over the learning rate, with 95% intervals over seeds. A ring marks the best rate of a method."
        " Points above the panel are far worse than the model before its fine-tune.",
        figure,
    )


def _draw_rates(axes: Axes, series: Sequence[Series], palette: Palette) -> None:
    for s in series:
        heights = np.array([c.mean(*TUNED) for c in s.configurations], float)  # None becomes NaN, a gap
        errors = [c.half_interval(*TUNED) or 0 for c in s.configurations]
        line = palette.line(s.name)
        axes.errorbar(s.rates, heights, yerr=errors, elinewidth=0.8, **line)
        axes.plot([s.rate], np.array([s.best.mean(*TUNED)], float), marker="o", ms=11, mfc="none", mec=line["color"])


def _method_order(name: str) -> tuple[int, str]:
    """Sorts names of series by method, in the order of METHODS."""
    method = name.partition(",")[0]
    return [*METHODS.values(), method].index(method), name


def draw_methods(setting: Setting) -> Chart | None:
    """The tuned perplexity of every method on every format, the best first."""
    if not has_several_fine_tunes(setting):
        return None
    every = find_series(setting)
    best = every[:MOST]
    palette = Palette.of_formats(setting)
    figure, axes = plt.subplots(figsize=(9.4, 0.9 + 0.24 * len(best)))
    for i, s in enumerate(best):
        style = palette.point(s.best)
        axes.errorbar(s.best.known_mean(*TUNED), i, xerr=s.best.half_interval(*TUNED) or 0, elinewidth=0.8, **style)
    axes.set_yticks(range(len(best)), [f"{s.title}, lr {s.rate:g}" for s in best])
    axes.invert_yaxis()
    axes.margins(y=row_margin(len(best)))
    axes.set(xlabel="tuned perplexity")
    base = {"16 bit": palette.line("none") | {"lw": 0}} if any(s.best.is_16_bit for s in best) else {}
    palette.legend(figure, any(s.best.config["dq"] for s in best), **base)
    cut = f" The best {MOST} of {len(every)} are shown." if len(every) > MOST else ""
    return Chart(
        "methods",
        "Tuned perplexity of each method on each format at its best learning rate, the best first, with 95% intervals over"
        f" seeds.{cut}",
        figure,
    )


def draw_inits(setting: Setting) -> Chart | None:
    """The difference of each initialization from B = 0, before the first step and after the last."""
    inits = [init for init in compare_inits(setting) if init.before or init.after]
    if not inits:
        return None
    named = [(init.configuration.title, init.configuration.format, init) for init in inits]
    panels = {
        "before the first step": [(title, fmt, init.before) for title, fmt, init in named if init.before],
        "after the last step": [(title, fmt, init.after) for title, fmt, init in named if init.after],
    }
    return Chart(
        "initialisation",
        "The difference of each initialization from B = 0 on the same format, paired, with 95% intervals. A hollow marker"
        " is not distinguishable from zero.",
        draw_differences(Palette.of_formats(setting), panels, "Δ nll, nats per token"),
    )
