"""What one key of the configuration changes: block size, rank, double quantization."""

from collections.abc import Callable
from typing import Any

import matplotlib.pyplot as plt

from qbench.report.comparison.config_keys import text
from qbench.report.comparison.configurations import Configuration, Setting
from qbench.report.comparison.findings import effects

from .style import SIXTEEN, Chart, Look, forest


def blocks(setting: Setting) -> Chart | None:
    """The effect of the block size, on the distance from 16 bit."""
    return _over(
        setting, "block", "block, weights under one scale", "Δ nll against 16 bit, nats a token",
        lambda c, stage: (found := c.differences.get(stage)) and (found.delta, found.half),
        "blocks", "What a larger block costs, with 95% intervals; dotted is with double quantization.",
    )  # fmt: skip


def ranks(setting: Setting) -> Chart | None:
    """The effect of LoRA's rank, on the perplexity."""
    return _over(
        setting, "rank", "rank of LoRA", "perplexity",
        lambda c, stage: (value := c.mean("quality", stage, "perplexity"))
        and (value, c.interval("quality", stage, "perplexity") or 0),
        "ranks", "Perplexity over the rank, with 95% intervals over seeds; dotted is with double quantization.",
    )  # fmt: skip


def _over(
    setting: Setting, key: str, label: str, measured: str, value: Callable, name: str, caption: str
) -> Chart | None:
    """Lines over a key of the config, those alike in all else together; a panel before the fine-tune and one after."""

    def at(c: Configuration) -> Any:
        return c.config["block"] if key == "block" else c.config["tune"].get(key)

    look = Look.of(setting)
    sizes = sorted({at(c) for c in setting.configurations if at(c) and not (c.is_16_bit and key == "block")})
    stages = [s for s in setting.stages() if any(value(c, s) for c in setting.configurations)]
    stages = [s for s in stages if key == "block" or s == "tuned"]
    if len(sizes) < 2 or not stages:
        return None
    figure, panels = plt.subplots(1, len(stages), figsize=(9.4, 3.2), squeeze=False)
    for axes, stage in zip(panels[0], stages, strict=True):
        lines: dict[str, list[Configuration]] = {}
        for c in setting.configurations:
            if at(c) in sizes and value(c, stage):
                rest = [k for k in ("dq", "block") if k != key]
                lines.setdefault(c.format + text(c.config, *rest) + c.fine_tune(key), []).append(c)
        for members in lines.values():
            members.sort(key=at)
            heights, errors = zip(*(value(c, stage) for c in members), strict=True)
            style = look.point(members[0]) | {"ls": ":" if members[0].config["dq"] else "-", "lw": 1}
            axes.errorbar([at(c) for c in members], heights, yerr=errors, elinewidth=0.6, **style)
        axes.set(xscale="log", xlabel=label, ylabel=measured)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.xaxis.minorticks_off()
        if key == "block":
            axes.axhline(0, **SIXTEEN)
        axes.set_title(setting.when(stage))
    look.legend(figure, **{"16 bit": SIXTEEN})
    return Chart(name, caption, figure)


def double(setting: Setting) -> Chart | None:
    """The effect of double quantization: each pair's difference, with its interval."""
    found = {stage: effects(setting, "dq", stage) for stage in setting.stages()}
    if not any(found.values()):
        return None
    panels = {
        setting.when(stage): [(c.title.replace(" + dq", ""), c.format, d) for c, _, d in pairs]
        for stage, pairs in found.items()
    }
    return Chart(
        "double_quantization",
        "What double quantization costs: with it less without it, paired, 95% intervals; hollow is not distinguishable"
        " from none.",
        forest(Look.of(setting), panels, "Δ nll of dq, nats a token"),
    )
