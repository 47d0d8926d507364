"""What the fine-tune changes: the distance from 16 bit, learning rates, methods, and where LoRA begins."""

import matplotlib.pyplot as plt
import numpy as np

from qbench.report.comparison import low_rank
from qbench.report.comparison import methods as tuned
from qbench.report.comparison.configurations import Setting
from qbench.report.figures import CYCLE
from qbench.report.wording import METHODS, title

from .style import MOST, SIXTEEN, Chart, Look, forest, in_digits, margin

TUNED = ("quality", "tuned", "perplexity")


def slopes(setting: Setting) -> Chart | None:
    """What the fine-tune wins back: the distance from 16 bit before and after."""
    found = [c for c in setting.configurations if {"quantized", "tuned"} <= c.differences.keys()]
    if not found:
        return None
    look = Look.of(setting)
    figure, axes = plt.subplots(figsize=(7.6, 4))
    for i, c in enumerate(found):
        ends = [c.differences["quantized"], c.differences["tuned"]]
        x = np.array([0, 1]) + (i - (len(found) - 1) / 2) * 0.12 / len(found)
        axes.errorbar(
            x, [d.delta for d in ends], yerr=[d.half for d in ends], elinewidth=0.6,
            **look.point(c) | {"ls": "-", "lw": 0.8},
        )  # fmt: skip
    axes.axhline(0, **SIXTEEN)
    axes.set_xticks([0, 1], ["quantized, against 16 bit", f"after {setting.method}, against the same on 16 bit"])
    axes.set(xlim=(-0.3, 1.3), ylabel="Δ nll, nats a token")
    look.legend(figure, **{"16 bit": SIXTEEN})
    return Chart(
        "slopes",
        "The distance from 16 bit before and after the fine-tune, paired, with 95% intervals; zero is as good as 16 bit.",
        figure,
    )


def learning_rates(setting: Setting) -> Chart | None:
    """The tuned perplexity over the learning rate, a panel a format, a line a method."""
    found = [s for s in tuned.series(setting) if len(s.rates) > 1]
    if not found:
        return None
    panels: dict[str, list[tuned.Series]] = {}
    for series in sorted(found, key=lambda s: (not s.best.is_16_bit, title(s.best.config))):
        panels.setdefault(title(series.best.config), []).append(series)
    look = Look(sorted({s.name for s in found}, key=_order), CYCLE)
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(9.4 if columns > 1 else 7.6, 0.6 + 3.2 * rows), squeeze=False, sharex=True, sharey=True,
    )  # fmt: skip
    base = setting.base("quantized")
    assert base is not None  # every comparison has one
    untuned = base.known("quality", "quantized", "perplexity")
    for axes, (name, some) in zip(grid.flat, panels.items(), strict=False):
        for s in some:
            heights = [c.mean(*TUNED) for c in s.configurations]
            errors = [c.interval(*TUNED) or 0 for c in s.configurations]
            axes.errorbar(s.rates, heights, yerr=errors, elinewidth=0.8, **look.line(s.name))
            axes.plot(s.rate, s.best.mean(*TUNED), marker="o", ms=11, mfc="none", mec=look.line(s.name)["color"])
        axes.axhline(untuned, **SIXTEEN)
        axes.set(xscale="log", yscale="log", title=name)
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.5 * untuned))
        in_digits(axes.xaxis)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    figure.supxlabel("learning rate", fontsize=9)
    figure.supylabel("tuned perplexity", fontsize=9)
    look.legend(figure, False, **{"16 bit, untuned": SIXTEEN})
    return Chart(
        "learning_rates",
        "Tuned perplexity over the learning rate, with 95% intervals over seeds; ringed is the best of a method. What"
        " leaves the panel is far above the model before its fine-tune.",
        figure,
    )


def _order(name: str) -> tuple[int, str]:
    method = name.partition(",")[0]
    return [*METHODS.values(), method].index(method), name


def methods(setting: Setting) -> Chart | None:
    """The tuned perplexity of every method on every format, the best first."""
    if not tuned.differ(setting):
        return None
    every = tuned.series(setting)
    found = every[:MOST]
    look = Look.of(setting)
    figure, axes = plt.subplots(figsize=(9.4, 0.9 + 0.24 * len(found)))
    for i, s in enumerate(found):
        style = look.point(s.best)
        axes.errorbar(s.best.known(*TUNED), i, xerr=s.best.interval(*TUNED) or 0, elinewidth=0.8, **style)
    axes.set_yticks(range(len(found)), [f"{s.title}, lr {s.rate:g}" for s in found])
    axes.invert_yaxis()
    axes.margins(y=margin(len(found)))
    axes.set(xlabel="tuned perplexity")
    base = {"16 bit": look.line("none") | {"lw": 0}} if any(s.best.is_16_bit for s in found) else {}
    look.legend(figure, any(s.best.config["dq"] for s in found), **base)
    cut = f" The best {MOST} of {len(every)}." if len(every) > MOST else ""
    return Chart(
        "methods",
        "Tuned perplexity of each method on each format at its best learning rate, the best first, with 95% intervals over"
        f" seeds.{cut}",
        figure,
    )


def initialisation(setting: Setting) -> Chart | None:
    """What another start than B = 0 changes, before the first step and after the last."""
    found = [s for s in low_rank.starts(setting) if s.before or s.after]
    if not found:
        return None
    panels = {
        "before the first step": [(s.configuration.title, s.configuration.format, s.before) for s in found if s.before],
        "after the last": [(s.configuration.title, s.configuration.format, s.after) for s in found if s.after],
    }
    return Chart(
        "initialisation",
        "What it changes to begin elsewhere than at B = 0: against that on the same format, paired, 95% intervals; hollow"
        " is not distinguishable from none.",
        forest(Look.of(setting), panels, "Δ nll, nats a token"),
    )
