"""The effect of a single config key: block, rank, double quantization."""

from collections.abc import Callable, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from qbench.report.comparison.config_keys import fingerprint
from qbench.report.comparison.configurations import Configuration, Setting
from qbench.report.comparison.findings import paired_effects

from .style import SIXTEEN, Chart, Palette, draw_differences

Measure = Callable[[Configuration, str], tuple[float, float] | None]  #: at a stage: a value and half its 95% interval


def draw_blocks(setting: Setting) -> Chart | None:
    """The difference from 16 bit over the block size, before and after the fine-tune."""

    def measure(c: Configuration, stage: str) -> tuple[float, float] | None:
        d = c.differences.get(stage)
        return (d.delta, d.half_interval) if d else None

    labels = "block, weights that share a scale", "Δ nll from 16 bit, nats per token"
    figure = _draw_over_key(setting, "block", setting.stages, measure, labels)
    caption = "The loss against 16 bit over the block size, with 95% intervals. Dotted: with double quantization."
    return Chart("blocks", caption, figure) if figure else None


def draw_ranks(setting: Setting) -> Chart | None:
    """The tuned perplexity over the rank of LoRA."""

    def measure(c: Configuration, stage: str) -> tuple[float, float] | None:
        value = c.mean("quality", stage, "perplexity")
        return (value, c.half_interval("quality", stage, "perplexity") or 0) if value else None

    stages = [stage for stage in setting.stages if stage == "tuned"]
    figure = _draw_over_key(setting, "rank", stages, measure, ("rank of LoRA", "perplexity"))
    caption = "Perplexity over the rank, with 95% intervals over seeds. Dotted: with double quantization."
    return Chart("ranks", caption, figure) if figure else None


def _key_value(c: Configuration, key: str) -> int | None:
    return c.config["block"] if key == "block" else c.config["tune"].get(key)


def _draw_over_key(
    setting: Setting, key: str, stages: Sequence[str], measure: Measure, labels: tuple[str, str]
) -> Figure | None:
    """A panel for each stage, in which a line joins the configurations that differ only in `key`, "block" or "rank".

    labels: of the axes. None if fewer than two values of the key were measured.
    """
    values = {_key_value(c, key) for c in setting.configurations if not (c.is_16_bit and key == "block")}
    ticks = sorted(value for value in values if value)
    stages = [stage for stage in stages if any(measure(c, stage) for c in setting.configurations)]
    if len(ticks) < 2 or not stages:
        return None
    palette = Palette.of_formats(setting)
    figure, panels = plt.subplots(1, len(stages), figsize=(9.4, 3.2), squeeze=False)
    for axes, stage in zip(panels[0], stages, strict=True):
        for members in _group_lines(key, [c for c in setting.configurations if measure(c, stage)]):
            points = [point for c in members if (point := measure(c, stage))]
            heights, errors = zip(*points, strict=True)
            style = palette.point(members[0]) | {"ls": ":" if members[0].config["dq"] else "-", "lw": 1}
            axes.errorbar([_key_value(c, key) for c in members], heights, yerr=errors, elinewidth=0.6, **style)
        axes.set(xscale="log", xlabel=labels[0], ylabel=labels[1])
        axes.set_xticks(ticks, [str(value) for value in ticks])
        axes.xaxis.minorticks_off()
        if key == "block":
            axes.axhline(0, **SIXTEEN)
        axes.set_title(setting.when(stage))
    palette.legend(figure, **{"16 bit": SIXTEEN})
    return figure


def _group_lines(key: str, configurations: Sequence[Configuration]) -> list[list[Configuration]]:
    """The configurations, grouped by everything but `key`; each group is sorted by it."""
    lines: dict[str, list[Configuration]] = {}
    others = [k for k in ("dq", "block") if k != key]
    for c in configurations:
        if _key_value(c, key) and not (c.is_16_bit and key == "block"):
            lines.setdefault(c.format + fingerprint(c.config, *others) + c.fine_tune(key), []).append(c)
    return [sorted(members, key=lambda c: _key_value(c, key) or 0) for members in lines.values()]


def draw_double_quantization(setting: Setting) -> Chart | None:
    """The difference that double quantization makes, for each pair with and without it."""
    effects = {stage: paired_effects(setting, "dq", stage) for stage in setting.stages}
    if not any(effects.values()):
        return None
    panels = {
        setting.when(stage): [(c.title.replace(" + dq", ""), c.format, d) for c, _, d in pairs]
        for stage, pairs in effects.items()
    }
    return Chart(
        "double_quantization",
        "The cost of double quantization: with it minus without it, paired, with 95% intervals. A hollow marker is not"
        " distinguishable from zero.",
        draw_differences(Palette.of_formats(setting), panels, "Δ nll of dq, nats per token"),
    )
