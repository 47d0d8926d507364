"""Configuration: the runs that differ only in their seed. Setting: the configurations that can be compared.

Two stages are compared. At "quantized", before the fine-tune, scores depend on format, block and dq only, so there the
runs of all fine-tunes count as one configuration. At "tuned" each fine-tune is a configuration of its own.
"""

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

from qbench.report.wording import method_name, recipe_name

from .config_keys import AFTERWARDS, fingerprint
from .differences import LARGEST, Difference, Windows, compare_windows

STAGES = ("quantized", "tuned")


@dataclass(eq=False)
class Configuration:
    """Runs that differ only in their seed.

    runs: file and result of each, by seed. differences: from the corresponding 16-bit configuration, by stage.
    """

    title: str
    runs: dict[int, tuple[Path, dict]]
    differences: dict[str, Difference] = field(default_factory=dict)

    @property
    def results(self) -> list[dict]:
        return [result for _, result in self.runs.values()]

    @property
    def config(self) -> dict:
        return self.results[0]["config"]

    @property
    def format(self) -> str:
        return self.config["format"]["name"]

    @property
    def is_16_bit(self) -> bool:
        return self.format == "none"

    @property
    def recipe(self) -> str:
        """A fingerprint of format, block and dq. 16 bit has no block and no dq."""
        return fingerprint(self.config, "format", *(() if self.is_16_bit else ("block", "dq")))

    def fine_tune(self, *without: str) -> str:
        """A fingerprint of the `tune` keys that affect training, except those in `without`."""
        ignored = (*AFTERWARDS, *without)
        return json.dumps({key: v for key, v in self.config["tune"].items() if key not in ignored}, sort_keys=True)

    def values(self, *keys: str) -> list[float]:
        """The metric at `keys` of each run that has it, where it is finite."""
        values = (look_up(result["metrics"], keys) for result in self.results)
        return [value for value in values if is_comparable(value)]

    def mean(self, *keys: str) -> float | None:
        """The mean over seeds of the metric at `keys`; None if no run has it."""
        values = self.values(*keys)
        return float(np.mean(values)) if values else None

    def known_mean(self, *keys: str) -> float:
        """`mean` of a metric that must exist."""
        mean = self.mean(*keys)
        assert mean is not None, f"{self.title} lacks {'.'.join(keys)}"
        return mean

    def half_interval(self, *keys: str) -> float | None:
        """Half the 95% confidence interval of `mean` over seeds (Student's t); None for a single seed."""
        values = self.values(*keys)
        if len(values) < 2:
            return None
        return float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)

    def count_diverged(self, stage: str) -> int:
        """The number of runs whose perplexity at a stage is not finite."""
        scored = [look_up(result["metrics"], ("quality", stage)) for result in self.results]
        return sum(bool(scores) and not is_comparable(scores["perplexity"]) for scores in scored)

    def nll(self, stage: str) -> float | None:
        """The mean nll at a stage; None if the stage was not scored, or if the perplexity is not finite."""
        return None if self.mean("quality", stage, "perplexity") is None else self.mean("quality", stage, "nll")

    def sort_key(self, stage: str) -> float:
        """The nll, or infinity if there is none: sorts configurations from the best to the worst."""
        nll = self.nll(stage)
        return math.inf if nll is None else nll

    def windows(self, *keys: str, each: str = "windows") -> Windows:
        """By seed, the array `each` of the scores at `keys`: the nll of each window, or the score of each document."""
        arrays = {seed: look_up(result["metrics"], (*keys, each)) for seed, (_, result) in self.runs.items()}
        return {
            seed: np.asarray(values, np.float64)  # a value that is None becomes NaN
            for seed, values in arrays.items()
            if values is not None
        }


@dataclass(eq=False)
class Setting:
    """The configurations measured on one model, text and device; the lowest perplexity before the fine-tune comes first.

    varying: the `tune` keys that are not the same in all of them.
    """

    title: str
    configurations: list[Configuration]
    varying: Sequence[str] = ()

    @property
    def has_tuned(self) -> bool:
        return bool(self.scored_at("tuned"))

    @property
    def method_names(self) -> set[str]:
        """The names of the fine-tuning methods, such as `LoRA`."""
        return {method_name(c.config["tune"]) for c in self.scored_at("tuned")}

    @property
    def method(self) -> str:
        """`LoRA`, or `the fine-tune` where there are several methods."""
        return next(iter(self.method_names)) if len(self.method_names) == 1 else "the fine-tune"

    @property
    def stages(self) -> tuple[str, ...]:
        return STAGES if self.has_tuned else STAGES[:1]

    def when(self, stage: str) -> str:
        """`before any fine-tune` or `after LoRA`."""
        return f"after {self.method}" if stage == "tuned" else "before any fine-tune"

    def scored_at(self, stage: str) -> list[Configuration]:
        """The configurations with a score at a stage. Before the fine-tune there is one for each recipe."""
        return self._untuned if stage == "quantized" else [c for c in self.configurations if c.nll(stage) is not None]

    @cached_property
    def _untuned(self) -> list[Configuration]:
        return merge_fine_tunes(self.configurations)

    def best_16_bit(self, stage: str) -> Configuration | None:
        """The 16-bit configuration with the lowest nll; None if 16 bit was not scored."""
        return min((c for c in self.scored_at(stage) if c.is_16_bit), key=lambda c: c.sort_key(stage), default=None)


def merge_fine_tunes(configurations: Sequence[Configuration]) -> list[Configuration]:
    """One configuration for each recipe, with the runs of all its fine-tunes."""
    groups: dict[str, list[Configuration]] = defaultdict(list)
    for c in configurations:
        groups[c.recipe].append(c)
    return [_merge(members) for members in groups.values()]


def _merge(members: Sequence[Configuration]) -> Configuration:
    first, title = members[0], recipe_name(members[0].config)
    if len(members) == 1 and first.title == title:
        return first
    # of equal seeds, the run of the first member counts
    runs = {seed: run for c in reversed(members) for seed, run in c.runs.items()}
    untuned = {stage: d for stage, d in first.differences.items() if stage == "quantized"}
    return Configuration(title, runs, untuned)


def compare_at(ours: Configuration, theirs: Configuration, stage: str) -> Difference | None:
    """ours − theirs at a stage, with its uncorrected p; None if they cannot be paired.

    Before the fine-tune the seed has no effect on the scores, so different seeds can be paired.
    """
    first, second = (c.windows("quality", stage) for c in (ours, theirs))
    return compare_windows(first, second, same_seeds=stage == "tuned")


def pair_with_16_bit(
    configurations: Sequence[Configuration], stage: str
) -> list[tuple[Configuration, Configuration | None]]:
    """Each quantized configuration with its reference: 16 bit, and after the fine-tune 16 bit with the same fine-tune."""
    references = {c.fine_tune(): c for c in configurations if c.is_16_bit}
    first = next(iter(references.values()), None)
    quantized = [c for c in configurations if not c.is_16_bit]
    return [(c, references.get(c.fine_tune()) if stage == "tuned" else first) for c in quantized]


def look_up(tree: Any, keys: Sequence[str]) -> Any:
    """The value at a path of keys in nested dicts; None if it is missing."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def is_comparable(value: Any) -> bool:
    """Whether the value is a finite number that is small enough to be squared."""
    return isinstance(value, int | float) and abs(value) <= LARGEST
