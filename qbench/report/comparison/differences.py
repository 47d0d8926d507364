"""How far one model's mean nll is from another's, window by window, and whether that can be told from nothing.

The variance of a difference is that over windows, of the mean over seeds, and that over seeds. The p values of one family
of differences, such as all formats against 16 bit at one stage, are corrected for their number (Benjamini & Hochberg 1995,
"Controlling the false discovery rate").
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import false_discovery_control, t

from qbench.measure.statistics import clustered_mean
from qbench.report.wording import SIGNIFICANT, count, grown, number, plus_minus

LARGEST = 1e100  #: of a number that is compared: sums and squares of such are finite
Windows = Mapping[int, np.ndarray]  #: by seed, the mean nll of each window, or the share of each document in a score


@dataclass(frozen=True)
class Difference:
    """Of the mean nll, nats a token, or of a score on a task. stderr: None of a single window. p: corrected,
    that there is none."""

    delta: float
    stderr: float | None
    p: float

    @property
    def distinguishable(self) -> bool:
        return self.p < SIGNIFICANT

    @property
    def half(self) -> float:
        """Half its 95% interval."""
        return 1.96 * (self.stderr or 0)

    @property
    def percent(self) -> str:
        """The per cent of the perplexity that it is, with its standard error."""
        found = per_cent(self.delta)
        if self.stderr is None:
            return found
        return f"{found} ± {number(100 * (grown(self.delta) + 1) * self.stderr, '.2f')}%"

    def __str__(self) -> str:
        return f"{'' if self.distinguishable else '≈ '}{plus_minus(self.delta, self.stderr, '+.4f')}"


def per_cent(delta: float) -> str:
    """A difference of the nll as that of the perplexity."""
    return f"{'+' if delta >= 0 else '−'}{number(100 * abs(grown(delta)), '.2f')}%"


def paired(ours: Windows, theirs: Windows, seeded: bool = True) -> Difference | None:
    """ours − theirs, p uncorrected; None where there are not the same windows, or one is not finite.

    seeded: only the same seeds meet, of which there may be none. Otherwise a seed has no part in it, and any run will do.
    """
    spare = None if seeded else next(iter(theirs.values()), None)
    meeting = [(a, theirs.get(seed, spare)) for seed, a in ours.items()]
    rows = [a - b for a, b in meeting if b is not None and len(a) == len(b) > 0]
    if len({len(row) for row in rows}) != 1 or not np.isfinite(rows).all() or np.abs(rows).max() > LARGEST:
        return None
    delta, over_windows = clustered_mean(np.mean(rows, 0)[:, None])
    over_seeds = np.var(np.mean(rows, 1), ddof=1) / len(rows) if len(rows) > 1 else 0.0
    if not np.isfinite(over_windows):
        return Difference(delta, None, 1.0)
    stderr = float(np.hypot(over_windows, over_seeds**0.5))
    p = 2 * t.sf(abs(delta) / stderr, len(rows[0]) - 1) if stderr else 1.0 - bool(delta)
    return Difference(delta, stderr, float(p))


def corrected(family: Sequence[Difference | None]) -> list[Difference | None]:
    """The differences with p values corrected for their number."""
    found = [d for d in family if d is not None]
    p = iter(false_discovery_control([d.p for d in found]) if found else ())
    return [d and replace(d, p=float(next(p))) for d in family]


def tally(family: Sequence[Difference], noun: str) -> str:
    """How the tests of a family came out: `worse in 3, better in 0, not distinguishable in 1 of 4 pairs (+0.31% on
    average)`."""
    sure = [d for d in family if d.distinguishable]
    worse = sum(d.delta > 0 for d in sure)
    counts = f"worse in {worse}, better in {len(sure) - worse}, not distinguishable in {len(family) - len(sure)}"
    mean = per_cent(float(np.mean([d.delta for d in family])))
    return f"{counts} of {count(len(family), noun)} ({mean} on average)"
