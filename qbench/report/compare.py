"""Many runs as one comparison: runs that differ in their seed alone are one, and differences are paired.

Two formats meet on the same windows of the same text, and after a fine-tune with the same seed. The variance of a
difference is that over windows, of the mean over seeds, and that over seeds; the p values of one stage are corrected for
their number (Benjamini & Hochberg 1995, "Controlling the false discovery rate").
"""

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import false_discovery_control, t

from ..measure.statistics import clustered_mean
from .words import SIGNIFICANT, plus_minus, title

STAGES = ("quantized", "tuned")


@dataclass(frozen=True)
class Difference:
    """Of the mean nll, nats a token. stderr: None of a single window. p: corrected, that there is none."""

    delta: float
    stderr: float | None
    p: float

    @property
    def distinguishable(self) -> bool:
        return self.p < SIGNIFICANT

    def __str__(self) -> str:
        return f"{'' if self.distinguishable else '≈ '}{plus_minus(self.delta, self.stderr, '+.4f')}"


@dataclass(frozen=True)
class Comparison:
    """runs: the results of one configuration, a seed each. differences: from the 16-bit runs like it, by stage."""

    title: str
    runs: list[dict]
    differences: dict[str, Difference]

    def mean(self, *keys: str) -> float | None:
        """The mean over seeds of a number in the runs' metrics; None where they lack it."""
        values = [_at(run["metrics"], keys) for run in self.runs]
        return None if None in values else float(np.mean(values))

    def stderr(self, *keys: str) -> float | None:
        """The standard error of `mean` over seeds; None of a single one."""
        values = [_at(run["metrics"], keys) for run in self.runs]
        return None if None in values or len(values) < 2 else float(np.std(values, ddof=1) / len(values) ** 0.5)


def _at(found, keys):
    for key in keys:
        found = found.get(key) if found is not None else None
    return found


def compare(results: list[dict]) -> list[Comparison]:
    """The finished runs among `results`, the best perplexity before the fine-tune first."""
    groups: dict[str, dict[int, dict]] = defaultdict(dict)
    for result in sorted(results, key=lambda r: r["run"]["started"] or ""):  # of the same run, the last
        if result["status"] == "done":
            more = ["block", "dq"] if result["config"]["format"]["name"] != "none" else []  # of which 16 bit has none
            groups[_key(result, "format", *more)][result["config"]["seed"]] = result
    references = {
        _key(run): runs
        for runs in groups.values()
        for run in runs.values()
        if run["config"]["format"]["name"] == "none"
    }
    comparisons = []
    for runs in groups.values():
        first = next(iter(runs.values()))
        reference = references.get(_key(first), {})
        found = {stage: _difference(runs, reference, stage) for stage in STAGES if reference is not runs}
        differences = {stage: difference for stage, difference in found.items() if difference}
        comparisons.append(Comparison(title(first["config"]), list(runs.values()), differences))
    return sorted(_corrected(comparisons), key=lambda c: c.mean("quality", "quantized", "nll"))


def _key(result: dict, *more: str) -> str:
    """What two runs must share to be comparable: all but the format and the seed, and `more`."""
    return str([result["config"][key] for key in ("model", "data", "eval", "tune", *more)])


def _difference(runs: dict[int, dict], reference: dict[int, dict], stage: str) -> Difference | None:
    """Between runs by seed, of one stage; None where no seed has both, or not the same windows."""
    rows = []
    for seed in runs.keys() & reference.keys():
        ours, theirs = (_at(r[seed]["metrics"], ("quality", stage, "windows")) for r in (runs, reference))
        if ours and theirs and len(ours) == len(theirs):
            rows.append(np.subtract(ours, theirs))
    if not rows:
        return None
    delta, over_windows = clustered_mean(np.mean(rows, 0)[:, None])
    over_seeds = np.var(np.mean(rows, 1), ddof=1) / len(rows) if len(rows) > 1 else 0.0
    if not np.isfinite(over_windows):
        return Difference(delta, None, 1.0)
    stderr = float(np.hypot(over_windows, over_seeds**0.5))
    p = 2 * t.sf(abs(delta) / stderr, len(rows[0]) - 1) if stderr else 1.0 - bool(delta)
    return Difference(delta, stderr, float(p))


def _corrected(comparisons: list[Comparison]) -> list[Comparison]:
    corrected: list[dict[str, Difference]] = [{} for _ in comparisons]
    for stage in STAGES:
        having = [i for i, c in enumerate(comparisons) if stage in c.differences]
        found = [comparisons[i].differences[stage] for i in having]
        for i, difference, p in zip(having, found, false_discovery_control([d.p for d in found]), strict=True):
            corrected[i][stage] = replace(difference, p=float(p))
    return [replace(c, differences=d) for c, d in zip(comparisons, corrected, strict=True)]
