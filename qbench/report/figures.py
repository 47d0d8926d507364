"""The colors and the style of all figures: of reports, of plans, of benchmarks."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

# Okabe & Ito, "Color Universal Design" (2008): distinguishable with any color vision
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
    "savefig.bbox": "tight",  # a long name in a title widens the figure
    "axes.titlelocation": "left",
    "text.parse_math": False,  # two dollar signs in a name are no formula
}


@contextmanager
def styled(style: "dict[RcKeyType, Any]" = STYLE) -> Iterator[None]:
    """Apply the style to figures drawn and saved in this context.

    Warnings about characters that the font lacks are hidden: the tables show these characters.
    """
    with plt.rc_context(style), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
