"""A figure of plans: the lines of each as one stacked bar."""

from pathlib import Path
from textwrap import fill

from qbench.errors import InputError
from qbench.report.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, STYLE, plt

from .count import Plan
from .wording import format_names, format_title, group_by_size, method_title

#: the parts of a bar: name, colour, hatch, and the lines that it adds up
PARTS = (
    ("weights of linear layers", BLUE, "", ("weights",)),
    ("their scales and tables", SKY, "", ("scales",)),
    ("kept in 16 bits", GREY, "", ("embeddings", "head", "norms", "others")),
    ("adapters", PURPLE, "", ("adapters",)),
    ("gradients", ORANGE, "", ("gradients",)),
    ("optimizer", RED, "", ("states", "copies")),
    ("activations, logits, decoded layer", GREEN, "", ("activations", "logits", "decoded")),
    ("context, fragmentation", "#d9d9d9", "////", ("context", "fragmentation")),
)


def draw_plans(plans: list[Plan], file: Path) -> None:
    """Draw one plan at each moment, or several plans at their peaks, with the GPU's memory. Raises InputError."""
    first, method = plans[0], method_title(plans[0].settings)
    if len(plans) == 1:
        bars = list(first.moments.items())
        title = f"{first.shape.name}, {format_title(first.settings)}, {method}, by moment of a step"
    elif len({plan.shape for plan in plans}) > 1:
        bars = [(plan.shape.name, plan.moments[plan.peak]) for plan in plans]
        title = f"{format_title(first.settings)}, {method}, at the peak of a step"
    else:
        bars = [(_bar_label(alike), alike[0].moments[alike[0].peak]) for alike in group_by_size(plans)]
        title = f"{first.shape.name} {method}, at the peak of a step"
    draw_bars(bars, title, first.settings.gpu, file)


def _bar_label(alike: list[Plan]) -> str:
    """Names, dq and block of formats, in lines short enough to leave room for the bars."""
    fmt = alike[0].settings.format
    details = "" if fmt.name == "none" else f"{' + dq' if fmt.dq else ''}, block {fmt.block}"
    return fill(format_names(alike) + details, 34)


def draw_bars(bars: list[tuple[str, dict[str, int]]], title: str, gpu: int | None, file: Path) -> None:
    """Write a figure. bars: names, and the bytes of each line. gpu: bytes, a dashed line. Raises InputError."""
    largest = max(sum(lines.values()) for _, lines in bars)
    divisor, unit = (1e9, "GB") if largest >= 2e9 else (1e6, "MB")
    with plt.rc_context({**STYLE, "hatch.linewidth": 0.5}):
        figure, axes = plt.subplots(figsize=(8, 1.4 + (0.36 if len(bars) > 4 else 0.3) * len(bars)))
        starts = [0.0] * len(bars)
        for name, color, hatch, parts in PARTS:
            widths = [sum(lines.get(part, 0) for part in parts) / divisor for _, lines in bars]
            if any(widths):
                axes.barh(
                    range(len(bars)), widths, left=starts, color=color, hatch=hatch, edgecolor="white", label=name
                )
                starts = [start + width for start, width in zip(starts, widths, strict=True)]
        for i, end in enumerate(starts):
            axes.annotate(f"{end:,.1f}", (end, i), (4, 0), textcoords="offset points", va="center", fontsize=8)
        if gpu is not None:
            axes.axvline(gpu / divisor, color="black", lw=1.2, ls="--", label=f"GPU, {gpu / divisor:,.2f} {unit}")
        axes.set_yticks(range(len(bars)), [name for name, _ in bars], fontsize=8)
        axes.set_ylim(len(bars) - 0.4, -0.6)
        axes.margins(x=0.1)
        axes.grid(axis="y", visible=False)
        axes.set(xlabel=f"memory, {unit}")
        axes.set_title(title)
        figure.legend(frameon=False, loc="outside lower center", ncols=3, fontsize=8)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(file)
        except (OSError, ValueError) as error:
            raise InputError(f"figure: {str(file)!r} cannot be written: {error}") from error
        finally:
            plt.close(figure)
