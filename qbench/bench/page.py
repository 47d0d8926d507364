"""The results of `products` for a reader: summary sentences, tables of ratios, and a figure of speed over M."""

from collections.abc import Iterable
from itertools import product
from pathlib import Path
from statistics import geometric_mean, median

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from qbench.report.figures import BLUE, GREY, ORANGE, STYLE

from .products import OPS, median_times

BANDS = {"M ≤ 16": range(1, 17), "M = 32–128": range(32, 129), "M ≥ 1024": range(1024, 1 << 20)}
TITLES = {"linear": "forward, y = x·Wᵀ", "linear_dx": "backward, dx = g·W"}


def write(result: dict, folder: Path) -> None:
    """Write products.md and products.png into `folder`."""
    name, dq = main_format(result)
    with plt.rc_context(STYLE):
        figure = speed_over_rows(result, name, dq)
        figure.savefig(folder / "products.png")
        plt.close(figure)
    (folder / "products.md").write_text("\n".join(page_lines(result, name, dq)) + "\n", "utf-8")


def main_format(result: dict) -> tuple[str, bool]:
    """The format that sentences and figure show: nf4 with double quantization if measured, else the first."""
    ours = list(product(result["plan"]["formats"], result["plan"]["dq"]))
    return ("nf4", True) if ("nf4", True) in ours else ours[0]


def format_title(name: str, dq: bool) -> str:
    return f"{name}{' + dq' * dq}"


def speedups(result: dict, name: str, dq: bool, peer: str) -> dict[tuple, float]:
    """The time of a peer divided by that of the format, by (model, layer, op, M)."""
    ours = median_times(result, format=name, dq=dq)
    theirs = median_times(result, format=peer) if peer == "bf16" else median_times(result, format=peer, dq=dq)
    return {key: theirs[key] / seconds for key, seconds in ours.items() if key in theirs}


def ceiling_fractions(result: dict, name: str, dq: bool) -> dict[tuple, float]:
    """The fraction of a ceiling that was reached, by (model, layer, op, M).

    For M ≤ 16 the ceiling is the copy's bytes a second, against the bytes of the packed weight. For dequantize it is the
    same, against the bytes read and written. For larger M it is the large product's operations a second.
    """
    copy, flops = result["ceilings"]["copy_bytes_s"], result["ceilings"]["matmul_flop_s"]
    fractions = {}
    for case in result["cases"]:
        if (case["format"], case["dq"]) == (name, dq):
            n, k = case["shape"]
            seconds, rows = median(case["samples"]), case["rows"]
            moved = case["nbytes"] + (2 * n * k if case["op"] == "dequantize" else 0)
            share = moved / seconds / copy if rows <= 16 else 2 * rows * n * k / seconds / flops
            fractions[case["model"], case["layer"], case["op"], rows] = share
    return fractions


def format_range(values: Iterable[float], form: str = ".2f") -> str:
    """'1.20' or '1.20 to 3.40'."""
    ordered = sorted(values)
    low, high = f"{ordered[0]:{form}}", f"{ordered[-1]:{form}}"
    return low if low == high else f"{low} to {high}"


def summarize(result: dict) -> list[str]:
    """The results as Markdown list items."""
    name, dq = main_format(result)
    against, share = speedups(result, name, dq, "bf16"), ceiling_fractions(result, name, dq)
    peer = speedups(result, name, dq, f"bitsandbytes {name}")
    page = []
    for band, rows in BANDS.items():
        for op in OPS:
            mine = [v for (_, _, o, m), v in against.items() if o == op and m in rows]
            other = [v for (_, _, o, m), v in peer.items() if o == op and m in rows]
            if mine:
                of_ceiling = format_range([v for (_, _, o, m), v in share.items() if o == op and m in rows], ".0%")
                beside = f", {format_range(other)} times that of bitsandbytes" if other else ""
                page.append(
                    f"- {format_title(name, dq)}, {TITLES[op].partition(',')[0]}, {band}: {format_range(mine)} times the"
                    f" speed of bf16 weights{beside}; {of_ceiling} of the ceiling."
                )
    decode = [v for (_, _, op, _), v in share.items() if op == "dequantize"]
    page.append(
        f"- {format_title(name, dq)}, dequantize to bf16: {format_range(decode, '.0%')} of the speed of a copy."
    )
    return page


def page_lines(result: dict, name: str, dq: bool) -> list[str]:
    """The lines of products.md."""
    environment, plan = result["environment"], result["plan"]
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items() if v)
    against, share = speedups(result, name, dq, "bf16"), ceiling_fractions(result, name, dq)
    peer = speedups(result, name, dq, f"bitsandbytes {name}")
    page = [f"# Products with a packed weight on {environment['device']}", "", *summarize(result), ""]
    copy, flops = (result["ceilings"][name] / 1e12 for name in ("copy_bytes_s", "matmul_flop_s"))
    page += [
        f"Ceilings, measured in the same run: a copy {copy:.3g} TB/s, a large bf16 product {flops:.3g} Tflop/s. The"
        " ceiling is the copy of the packed weight's bytes up to M = 16, and the product beyond. Medians of"
        f" {plan['repeats']} samples; inputs take turns, so that no weight is left in the last cache. {versions}.",
        "",
        "![Speed over M](products.png)",
        "",
    ]
    for op in OPS:
        page += [
            f"## {format_title(name, dq)}, {TITLES[op]}: speed relative to bf16 weights (bitsandbytes) [ceiling]",
            "",
        ]
        page += layer_table(op, against, peer, share)
    page += ["## Every format: speed relative to bf16 weights, geometric mean over the layers", ""]
    page += format_table(result)
    worst = max((case["error"] for case in result["cases"] if case["error"] is not None), default=0)
    return [*page, f"Largest relative error against float64 among all of these: {worst:.2e}."]


def layer_table(op: str, against: dict, peer: dict, share: dict) -> list[str]:
    """A table of layers × M: speed against bf16 weights, (against bitsandbytes), [fraction of the ceiling]."""
    rows = sorted({m for _, _, o, m in against if o == op})
    table = [["layer", *(f"M = {m}" for m in rows)]]
    for model, layer in dict.fromkeys((model, layer) for model, layer, *_ in against):
        cells = []
        for m in rows:
            key = model, layer, op, m
            cells.append(
                f"{against[key]:.2f}" + (f" ({peer[key]:.2f})" if key in peer else "") + f" [{share[key]:.0%}]"
            )
        table.append([f"{model} {layer}", *cells])
    return markdown_table(table)


def format_table(result: dict) -> list[str]:
    """A table of formats × op and M: speed against bf16 weights."""
    rows = result["plan"]["rows"]
    table = [["format", *(f"{op.replace('linear_dx', 'dx').replace('linear', 'y')}, {m}" for op in OPS for m in rows)]]
    for name, dq in dict.fromkeys((case["format"], case["dq"]) for case in result["cases"]):
        if name != "bf16":
            by_case = speedups(result, name, dq, "bf16")
            cells = [
                f"{geometric_mean([v for (_, _, o, k), v in by_case.items() if (o, k) == (op, m)]):.2f}"
                for op in OPS
                for m in rows
            ]
            table.append([format_title(name, dq), *cells])
    return markdown_table(table)


def markdown_table(table: list[list[str]]) -> list[str]:
    """The lines of a Markdown table whose first row is the header."""
    head, *body = ["| " + " | ".join(row) + " |" for row in table]
    return [head, "|---" * len(table[0]) + "|", *body, ""]


def speed_over_rows(result: dict, name: str, dq: bool) -> Figure:
    """Speed against bf16 weights over M: one panel for each layer, forward above backward."""
    layers = list(dict.fromkeys((case["model"], case["layer"]) for case in result["cases"]))
    curves = [(format_title(name, dq), speedups(result, name, dq, "bf16"), BLUE, "o")]
    theirs = median_times(result, format=f"bitsandbytes {name}", dq=dq)
    bf16 = median_times(result, format="bf16")
    if theirs:
        speeds = {key: bf16[key] / seconds for key, seconds in theirs.items() if key in bf16}
        curves.append((f"bitsandbytes {format_title(name, dq)}", speeds, ORANGE, "s"))
    figure, panels = plt.subplots(
        len(OPS), len(layers), figsize=(2.1 * len(layers) + 1, 4.8), sharex=True, sharey=True, squeeze=False
    )
    for row, op in zip(panels, OPS, strict=True):
        for axes, place in zip(row, layers, strict=True):
            for label, by_case, color, marker in curves:
                points = sorted((m, v) for (*where, o, m), v in by_case.items() if (*where,) == place and o == op)
                style = {"color": color, "marker": marker, "markersize": 3.5, "linewidth": 1.4, "label": label}
                axes.plot(*zip(*points, strict=True), **style)
            axes.axhline(1, color=GREY, linewidth=1, label="bf16 weights")
            axes.set_xscale("log", base=2)
            axes.set_xticks([1, 16, 256, 4096], ["1", "16", "256", "4096"])
            axes.minorticks_off()
            if op == OPS[0]:
                shape = next(c["shape"] for c in result["cases"] if (c["model"], c["layer"]) == place)
                axes.set_title(f"{' '.join(place)}\n{shape[0]} × {shape[1]}", fontsize=8)
            else:
                axes.set_xlabel("rows of x, M")
        row[0].set_ylabel(f"{TITLES[op]}\ntimes the speed of bf16")
    panels[0][0].set_ylim(0, 1.08 * max(1, *(v for _, by_case, *_ in curves for v in by_case.values())))
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"Products with a packed weight, {result['environment']['device']}", x=0.01, ha="left")
    return figure
