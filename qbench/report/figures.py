"""The figures of a run, drawn from its result."""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from . import wording

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

# Okabe & Ito, "Color Universal Design" (2008): told apart with any colour vision
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#666666",
)
CYCLE = [BLUE, ORANGE, GREEN, RED, PURPLE, SKY, GREY]
MARKERS = "osD^vP*X"
STYLE: "dict[RcKeyType, Any]" = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "figure.dpi": 150,
    "figure.constrained_layout.use": True,
    "savefig.bbox": "tight",  # a long name in a title makes a wider figure
    "axes.titlelocation": "left",
    "text.parse_math": False,  # a name may have two dollar signs
}


@contextmanager
def styled(style: "dict[RcKeyType, Any]" = STYLE) -> Iterator[None]:
    """To draw and save figures in. Matplotlib's warnings of names that a figure cannot show say nothing: tables can."""
    with plt.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def draw(result: dict, folder: Path) -> list[tuple[str, str]]:
    """Write every figure that the result has data for; returns (file name, caption) of each."""
    metrics = result["metrics"]
    drawn = []
    with styled():
        for make in (weights, errors, quality, loss):
            figure, caption = make(result) if make is not loss or "tune" in metrics else (None, "")
            if figure is not None:
                figure.savefig(folder / f"{make.__name__}.png")
                plt.close(figure)
                drawn.append((f"{make.__name__}.png", caption))
    return drawn


def weights(result: dict) -> tuple[Figure, str]:
    """Where the weights lie in their blocks, and where the levels are."""
    found = result["metrics"]["weights"]
    edges, density = np.array(found["edges"]), np.array(found["density"])
    figure, axes = plt.subplots(figsize=(7, 2.9))
    axes.stairs(density, edges, fill=True, color=SKY, alpha=0.6, label="weights")
    top = np.partition(density, -3)[-3] * 1.15  # the two ends hold each block's own absmax
    tables = found["levels"]
    for table in tables:
        crowded = len(table) > 32
        axes.vlines(
            table, 0, top * (0.25 if crowded else 1), color=RED, lw=0.4 if crowded else 1.1 / len(tables) ** 0.5
        )
    if tables:
        axes.plot([], [], color=RED, label="levels" if len(tables) == 1 else f"levels of {len(tables)} layers")
    axes.set(
        xlabel="weight over the scale of its block (w − z) / s", ylabel="density", ylim=(0, top), xlim=edges[[0, -1]]
    )
    levels = f" and the levels of {wording.title(result['config'])}" if tables else f" of {result['config']['block']}"
    axes.set_title(f"Weights within their blocks{levels}")
    axes.legend(framealpha=0.9, edgecolor="none", loc="upper right")
    return figure, "Histogram of all quantized weights, each over the scale of its block, and the levels they round to."


def _kinds(layers: list[dict]) -> dict[str, list[int]]:
    """Layers that play the same part (`q_proj`, `down_proj` …), in order of depth."""
    kinds: dict[str, list[int]] = {}
    for i, layer in enumerate(layers):
        kinds.setdefault(wording.short(layer["name"].rpartition(".")[2]), []).append(i)
    return kinds


def errors(result: dict) -> tuple[Figure | None, str]:
    """Error by layer: of the weights, and of the outputs."""
    layers = result["metrics"]["error"]["layers"]
    panels = [("sqnr_db", "SQNR of the weights, dB"), ("output_relative", "error of the layer's output, relative")]
    if layers[0]["sqnr_db"] is None:
        return None, ""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.2))
    for panel, (key, label) in zip(axes, panels, strict=True):
        for i, (kind, members) in enumerate(_kinds(layers).items()):
            values = [layers[m][key] for m in members]
            panel.plot(range(len(values)), values, color=CYCLE[i % 7], marker=MARKERS[i % 8], ms=4, lw=1, label=kind)
        panel.set(xlabel="layer, by depth", ylabel=label)
        panel.xaxis.get_major_locator().set_params(integer=True)
    axes[1].set_ylim(bottom=0)
    axes[0].set_title(f"Error by layer, {wording.title(result['config'])}")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside right upper")
    caption = "Signal to quantization noise of each layer's weights, and the relative error of its output on real text."
    return figure, caption


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def quality(result: dict) -> tuple[Figure, str]:
    """Perplexity before and after, with its uncertainty."""
    scores = result["metrics"]["quality"]
    names = [name for name in wording.STAGES if name in scores and _finite(scores[name]["nll"])]
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.2))
    for i, name in enumerate(names):
        row, against = scores[name], scores[name].get("against_baseline")
        axes[0].errorbar(
            row["nll"], i, xerr=1.96 * (row["stderr"] or 0), color=CYCLE[i], marker=MARKERS[i], capsize=3, ls="none"
        )
        axes[0].annotate(
            wording.number(row["perplexity"], ".2f"), (row["nll"], i), (0, 6), textcoords="offset points", ha="center"
        )
        if against and _finite(against["delta_nll"]):
            error = 1.96 * (against["stderr"] or 0)
            axes[1].errorbar(
                against["delta_nll"], i, xerr=error, color=CYCLE[i], marker=MARKERS[i], capsize=3, ls="none"
            )
    axes[1].axvline(0, color=GREY, lw=1)
    for panel in axes:
        panel.set_ylim(len(names) - 0.5, -0.7)
        panel.margins(x=0.15)
    axes[0].set_yticks(range(len(names)), names)
    axes[1].set_yticks(range(len(names)), [""] * len(names))
    axes[0].set(xlabel="nll, nats a token (perplexity above)")
    axes[1].set(xlabel="against the baseline, same tokens, nats a token")
    axes[0].set_title("Quality on held-out text, 95% intervals")
    return (
        figure,
        "Negative log-likelihood on held-out text, and its paired difference from the baseline; 95% intervals.",
    )


def loss(result: dict) -> tuple[Figure, str]:
    """The loss curve of the fine-tune."""
    tune, config = result["metrics"]["tune"], result["config"]["tune"]
    steps = np.arange(1, len(tune["loss"]) + 1)
    figure, axes = plt.subplots(figsize=(7, 2.9))
    axes.plot(steps, tune["loss"], color=BLUE, marker=".", lw=1, label="training loss")
    scores = result["metrics"]["quality"]
    for name, color, style in (("quantized", ORANGE, "--"), ("tuned", GREEN, "-.")):
        if _finite(scores[name]["nll"]):
            axes.axhline(scores[name]["nll"], color=color, ls=style, lw=1.2, label=f"held out, {name}")
    axes.set(xlabel="optimizer step", ylabel="loss, nats a token")
    axes.set_title(f"Fine-tuning by {wording.method(config)} on {wording.title(result['config'])}")
    axes.legend(frameon=False)
    return figure, f"Training loss a step, {config['batch']} windows each, and the held-out loss before and after."
