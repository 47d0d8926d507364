"""The figures of one run."""

import math
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qbench.report.figures import BLUE, CYCLE, GREEN, GREY, MARKERS, ORANGE, RED, SKY, styled
from qbench.report.wording import STAGES, format_number, method_name, recipe_name, shorten

Drawing = tuple[Figure, str]  #: a figure and its caption


def draw(result: dict, folder: Path) -> list[tuple[str, str]]:
    """Write each figure that the result has data for into `folder`; returns the file name and caption of each."""
    functions: dict[str, Callable[[dict], Drawing | None]] = {
        "weights": draw_weights, "errors": draw_errors, "quality": draw_quality, "loss": draw_loss,
    }  # fmt: skip
    files = []
    with styled():
        for name, function in functions.items():
            if drawing := function(result):
                figure, caption = drawing
                figure.savefig(folder / f"{name}.png")
                plt.close(figure)
                files.append((f"{name}.png", caption))
    return files


def draw_weights(result: dict) -> Drawing:
    """The distribution of the weights within their blocks, and the levels."""
    weights = result["metrics"]["weights"]
    edges, density, tables = np.array(weights["edges"]), np.array(weights["density"]), weights["levels"]
    figure, axes = plt.subplots(figsize=(7, 2.9))
    axes.stairs(density, edges, fill=True, color=SKY, alpha=0.6, label="weights")
    top = np.partition(density, -3)[-3] * 1.15  # without the two end bins, which count the absmax of every block
    for table in tables:
        many = len(table) > 32
        width = 0.4 if many else 1.1 / len(tables) ** 0.5
        axes.vlines(table, 0, top * (0.25 if many else 1), color=RED, lw=width)
    if tables:
        axes.plot([], [], color=RED, label="levels" if len(tables) == 1 else f"levels of {len(tables)} layers")
    axes.set(
        xlabel="weight over the scale of its block (w − z) / s", ylabel="density", ylim=(0, top), xlim=edges[[0, -1]]
    )
    config = result["config"]
    levels = f" and the levels of {recipe_name(config)}" if tables else f" of {config['block']}"
    axes.set_title(f"Weights within their blocks{levels}")
    axes.legend(framealpha=0.9, edgecolor="none", loc="upper right")
    return (
        figure,
        "Histogram of all quantized weights, divided by the scale of their block, and the levels they round to.",
    )


def draw_errors(result: dict) -> Drawing | None:
    """The error of each layer: of its weights, and of its output. None if there is no error."""
    layers = result["metrics"]["error"]["layers"]
    panels = [("sqnr_db", "SQNR of the weights, dB"), ("output_relative", "error of the layer's output, relative")]
    if layers[0]["sqnr_db"] is None:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.2))
    for panel, (key, label) in zip(axes, panels, strict=True):
        for i, (kind, members) in enumerate(_group_by_kind(layers).items()):
            values = [layer[key] for layer in members]
            panel.plot(range(len(values)), values, color=CYCLE[i % 7], marker=MARKERS[i % 8], ms=4, lw=1, label=kind)
        panel.set(xlabel="layer, by depth", ylabel=label)
        panel.xaxis.get_major_locator().set_params(integer=True)
    axes[1].set_ylim(bottom=0)
    axes[0].set_title(f"Error by layer, {recipe_name(result['config'])}")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside right upper")
    return (
        figure,
        "Signal to quantization noise of each layer's weights, and relative error of its output on real text.",
    )


def _group_by_kind(layers: list[dict]) -> dict[str, list[dict]]:
    """The layers by the last part of their name (`q_proj`, `down_proj`), by depth."""
    kinds: dict[str, list[dict]] = {}
    for layer in layers:
        kinds.setdefault(shorten(layer["name"].rpartition(".")[2]), []).append(layer)
    return kinds


def draw_quality(result: dict) -> Drawing:
    """The nll of each stage, and its difference from the baseline."""
    scores = result["metrics"]["quality"]
    names = [name for name in STAGES if name in scores and _is_finite(scores[name]["nll"])]
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.2))
    for i, name in enumerate(names):
        row, against = scores[name], scores[name].get("against_baseline")
        _draw_interval(left, row["nll"], row["stderr"], i)
        left.annotate(
            format_number(row["perplexity"], ".2f"), (row["nll"], i), (0, 6), textcoords="offset points", ha="center"
        )
        if against and _is_finite(against["delta_nll"]):
            _draw_interval(right, against["delta_nll"], against["stderr"], i)
    right.axvline(0, color=GREY, lw=1)
    for panel in (left, right):
        panel.set_ylim(len(names) - 0.5, -0.7)
        panel.margins(x=0.15)
    left.set_yticks(range(len(names)), names)
    right.set_yticks(range(len(names)), [""] * len(names))
    left.set(xlabel="nll, nats per token (perplexity above)")
    right.set(xlabel="difference from the baseline, nats per token")
    left.set_title("Quality on held-out text, 95% intervals")
    return (
        figure,
        "Negative log-likelihood on held-out text, and its paired difference from the baseline, with 95% intervals.",
    )


def _draw_interval(axes: Axes, value: float, stderr: float | None, row: int) -> None:
    """A point with its 95% interval, in the color of the row."""
    axes.errorbar(value, row, xerr=1.96 * (stderr or 0), color=CYCLE[row], marker=MARKERS[row], capsize=3, ls="none")


def draw_loss(result: dict) -> Drawing | None:
    """The loss curve of the fine-tune. None if there was none."""
    if "tune" not in result["metrics"]:
        return None
    tune, config = result["metrics"]["tune"], result["config"]["tune"]
    steps = np.arange(1, len(tune["loss"]) + 1)
    figure, axes = plt.subplots(figsize=(7, 2.9))
    axes.plot(steps, tune["loss"], color=BLUE, marker=".", lw=1, label="training loss")
    scores = result["metrics"]["quality"]
    for name, color, style in (("quantized", ORANGE, "--"), ("tuned", GREEN, "-.")):
        if _is_finite(scores[name]["nll"]):
            axes.axhline(scores[name]["nll"], color=color, ls=style, lw=1.2, label=f"held out, {name}")
    axes.set(xlabel="optimizer step", ylabel="loss, nats per token")
    axes.set_title(f"Fine-tuning by {method_name(config)} on {recipe_name(result['config'])}")
    axes.legend(frameon=False)
    return figure, f"Training loss of each step, over {config['batch']} windows, and held-out loss before and after."


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
