"""The figures of a comparison: each is a function of a setting, or None where it has nothing to show."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import matplotlib.pyplot as plt

from qbench.report.comparison.configurations import Setting
from qbench.report.comparison.methods import at_best
from qbench.report.comparison.selection import featured
from qbench.report.figures import STYLE, styled

from .fine_tune import initialisation, learning_rates, methods, slopes
from .formats import layers, pairs, pareto, throughput
from .scales import blocks, double, ranks
from .style import MOST, Chart


@contextmanager
def drawn(setting: Setting) -> Iterator[list[Chart]]:
    """Every figure that the setting has data for; they are closed on leaving."""
    best = at_best(setting)
    few = featured(best, MOST)
    cut = "" if few is best else f" {MOST} of {len(best.configurations):,}: the frontiers, and the best of the rest."
    with styled(STYLE | {"figure.dpi": 110, "axes.titlesize": 10, "svg.hashsalt": "qbench"}):
        whole = [pareto(best)] if len(best.configurations) > 2 else []
        whole += [make(setting) for make in (learning_rates, methods, initialisation)]
        made = [chart for chart in whole if chart]
        for make in (slopes, blocks, ranks, double, pairs, layers, throughput):
            if chart := make(few):
                made.append(replace(chart, caption=chart.caption + cut))
        try:
            yield made
        finally:
            for chart in made:
                plt.close(chart.figure)
