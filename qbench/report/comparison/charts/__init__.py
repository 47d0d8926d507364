"""The figures of a comparison. Each function draws one figure of a setting, or returns None if the data is missing.

fine_tune.py  what the fine-tune changes: learning rates, methods, initializations
formats.py    formats compared: quality over size, pairs, layers, throughput
scales.py     the effect of block, rank and double quantization
style.py      colors and markers, and the drawing of differences
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import matplotlib.pyplot as plt

from qbench.report.comparison.configurations import Setting
from qbench.report.comparison.methods import at_best_learning_rates
from qbench.report.comparison.selection import select_best
from qbench.report.figures import STYLE, styled

from .fine_tune import draw_inits, draw_learning_rates, draw_methods, draw_slopes
from .formats import draw_layers, draw_pairs, draw_pareto, draw_throughput
from .scales import draw_blocks, draw_double_quantization, draw_ranks
from .style import MOST, Chart

COMPLETE = (draw_learning_rates, draw_methods, draw_inits)  #: drawn of all configurations
LIMITED = (
    draw_slopes, draw_blocks, draw_ranks, draw_double_quantization, draw_pairs, draw_layers, draw_throughput,
)  # fmt: skip #: of the best MOST configurations, each at its best learning rate


@contextmanager
def draw_charts(setting: Setting) -> Iterator[list[Chart]]:
    """Every figure that the setting has data for. They are closed on leaving the context."""
    best = at_best_learning_rates(setting)
    few = select_best(best, MOST)
    cut = (
        "" if few is best else f" The best {MOST} of {len(best.configurations):,} are shown, all frontiers among them."
    )
    with styled(STYLE | {"figure.dpi": 110, "axes.titlesize": 10, "svg.hashsalt": "qbench"}):
        charts = [draw_pareto(best)] if len(best.configurations) > 2 else []
        charts += [draw(setting) for draw in COMPLETE]
        for draw in LIMITED:
            if chart := draw(few):
                charts.append(replace(chart, caption=chart.caption + cut))
        drawn = [chart for chart in charts if chart]
        try:
            yield drawn
        finally:
            for chart in drawn:
                plt.close(chart.figure)
