"""The paired difference between two configurations, and whether it is distinguishable from zero.

The p values of one family of tests, such as all formats against 16 bit at one stage, are corrected for their number.
Source: Benjamini & Hochberg 1995, "Controlling the false discovery rate".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import false_discovery_control

from qbench.measure.statistics import paired_difference
from qbench.report.wording import SIGNIFICANT, count, format_number, plus_minus, relative_change

LARGEST = 1e100  #: numbers up to this are compared: their sums and squares stay finite
Windows = Mapping[int, np.ndarray]  #: by seed, the mean nll of each window, or the score of each document


@dataclass(frozen=True)
class Difference:
    """A difference of the mean nll in nats per token, or of a score on a task.

    stderr: None for a single window. p: of the test that the difference is zero; corrected by
    `correct_p_values`.
    """

    delta: float
    stderr: float | None
    p: float

    @property
    def distinguishable(self) -> bool:
        return self.p < SIGNIFICANT

    @property
    def half_interval(self) -> float:
        """Half the 95% interval."""
        return 1.96 * (self.stderr or 0)

    @property
    def percent(self) -> str:
        """The difference as per cent of the perplexity: `+0.74% ± 0.21%`."""
        change = as_percent(self.delta)
        if self.stderr is None:
            return change
        return f"{change} ± {format_number(100 * (relative_change(self.delta) + 1) * self.stderr, '.2f')}%"

    def __str__(self) -> str:
        return f"{'' if self.distinguishable else '≈ '}{plus_minus(self.delta, self.stderr, '+.4f')}"


def as_percent(delta: float) -> str:
    """A difference of the nll as per cent of the perplexity: `+0.74%`."""
    return f"{'+' if delta >= 0 else '−'}{format_number(100 * abs(relative_change(delta)), '.2f')}%"


def compare_windows(ours: Windows, theirs: Windows, same_seeds: bool = True) -> Difference | None:
    """ours − theirs with its uncorrected p; None if windows do not match or are not finite.

    same_seeds: pair equal seeds only; None if no seed is common. Otherwise the seed has no effect on `theirs`, and a
    seed that `theirs` lacks is paired with its first run.
    """
    spare = None if same_seeds else next(iter(theirs.values()), None)
    pairs = [(a, theirs.get(seed, spare)) for seed, a in ours.items()]
    pairs = [(a, b) for a, b in pairs if b is not None and len(a) == len(b) > 0]
    if len({len(a) for a, _ in pairs}) != 1:
        return None
    ours_rows, theirs_rows = (np.array(rows) for rows in zip(*pairs, strict=True))
    differences = ours_rows - theirs_rows
    if not np.isfinite(differences).all() or np.abs(differences).max() > LARGEST:
        return None
    delta, stderr, p = paired_difference(ours_rows, theirs_rows)
    return Difference(delta, stderr, p) if np.isfinite(stderr) else Difference(delta, None, 1.0)


def correct_p_values(family: Sequence[Difference | None]) -> list[Difference | None]:
    """The differences with p values corrected for the number of tests. None means no test, and stays None."""
    tested = [d for d in family if d is not None]
    p = iter(false_discovery_control([d.p for d in tested]) if tested else ())
    return [d and replace(d, p=float(next(p))) for d in family]


def count_outcomes(family: Sequence[Difference], noun: str) -> str:
    """`worse in 3, better in 0 and not distinguishable in 1 of 4 pairs (+0.31% on average)`. noun: what is counted."""
    distinct = [d for d in family if d.distinguishable]
    worse = sum(d.delta > 0 for d in distinct)
    counts = (
        f"worse in {worse}, better in {len(distinct) - worse} and not distinguishable in {len(family) - len(distinct)}"
    )
    mean = as_percent(float(np.mean([d.delta for d in family])))
    return f"{counts} of {count(len(family), noun)} ({mean} on average)"
