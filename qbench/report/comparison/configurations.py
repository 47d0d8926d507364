"""Many runs as comparisons: runs that differ in their seed alone are one configuration, and differences are paired.

Two configurations meet on the same windows of the same text, and after a fine-tune with the same seed. Before it, the
fine-tune to come has no part in a score: there one configuration stands for all of a format, block and dq.
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

from qbench.report.wording import UNTUNED, method, title
from qbench.results import schema

from .config_keys import AFTERWARDS, WHERE, completed, name, text, told, varied_in
from .differences import LARGEST, Difference, Windows, corrected, paired

STAGES = ("quantized", "tuned")


@dataclass(eq=False)
class Configuration:
    """runs: by seed, its file and its result. differences: from the 16-bit configuration like it, by stage."""

    title: str
    runs: dict[int, tuple[Path, dict]]
    differences: dict[str, Difference] = field(default_factory=dict)

    @property
    def config(self) -> dict:
        return next(iter(self.runs.values()))[1]["config"]

    @property
    def format(self) -> str:
        return self.config["format"]["name"]

    @property
    def is_16_bit(self) -> bool:
        return self.format == "none"

    @property
    def recipe(self) -> str:
        """Format, block and dq, of which 16 bit has only the first."""
        return text(self.config, "format", *(() if self.is_16_bit else ("block", "dq")))

    def fine_tune(self, *without: str) -> str:
        """All that decides the fine-tune, but for the keys named."""
        return json.dumps(
            {key: v for key, v in self.config["tune"].items() if key not in (*AFTERWARDS, *without)}, sort_keys=True
        )

    def values(self, *keys: str) -> list[float]:
        """A number in the metrics of each run that has it, and finite."""
        found = (_at(result["metrics"], keys) for _, result in self.runs.values())
        return [value for value in found if _comparable(value)]

    def diverged(self, stage: str) -> int:
        """How many runs were scored at a stage, but with no finite perplexity."""
        scored = [_at(result["metrics"], ("quality", stage)) for _, result in self.runs.values()]
        return sum(bool(scores) and not _comparable(scores["perplexity"]) for scores in scored)

    def mean(self, *keys: str) -> float | None:
        """The mean over seeds of a number in the runs' metrics; None where they lack it."""
        values = self.values(*keys)
        return float(np.mean(values)) if values else None

    def known(self, *keys: str) -> float:
        """`mean` of what the runs compared all have, or all that are at a stage."""
        found = self.mean(*keys)
        assert found is not None, f"{self.title} lacks {'.'.join(keys)}"
        return found

    def interval(self, *keys: str) -> float | None:
        """Half the 95% confidence interval of `mean` over seeds (Student's t); None of a single one."""
        values = self.values(*keys)
        if len(values) < 2:
            return None
        return float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)

    def nll(self, stage: str) -> float | None:
        """None too where the perplexity is not finite."""
        return None if self.mean("quality", stage, "perplexity") is None else self.mean("quality", stage, "nll")

    def order(self, stage: str) -> float:
        """The nll, and where there is none infinity: what sorts configurations, the best first."""
        found = self.nll(stage)
        return math.inf if found is None else found

    def windows(self, *keys: str, each: str = "windows") -> Windows:
        """The mean nll of each window, or what `each` names, of the runs that have scores at that place in the metrics."""
        found = {seed: _at(result["metrics"], (*keys, each)) for seed, (_, result) in self.runs.items()}
        return {
            seed: np.asarray(values, np.float64) for seed, values in found.items() if values is not None
        }  # None: NaN


@dataclass(eq=False)
class Setting:
    """What was measured on one model and one text: the configurations, the best perplexity before a fine-tune first.

    varied: the keys of the fine-tunes that are not the same in all.
    """

    title: str
    configurations: list[Configuration]
    varied: Sequence[str] = ()

    @property
    def has_tuned(self) -> bool:
        return bool(self.at("tuned"))

    @property
    def methods(self) -> set[str]:
        """What the fine-tunes are called."""
        return {method(c.config["tune"]) for c in self.at("tuned")}

    @property
    def method(self) -> str:
        """`LoRA`, or where there are several methods `the fine-tune`."""
        return next(iter(self.methods)) if len(self.methods) == 1 else "the fine-tune"

    def stages(self) -> tuple[str, ...]:
        return STAGES if self.has_tuned else STAGES[:1]

    def when(self, stage: str) -> str:
        return f"after {self.method}" if stage == "tuned" else "before any fine-tune"

    @cached_property
    def _before(self) -> list[Configuration]:
        return _without_fine_tunes(self.configurations)

    def at(self, stage: str) -> list[Configuration]:
        """Those that a stage tells apart and has a score of."""
        return self._before if stage == "quantized" else [c for c in self.configurations if c.nll(stage) is not None]

    def base(self, stage: str) -> Configuration | None:
        """The best of 16 bit."""
        return min((c for c in self.at(stage) if c.is_16_bit), key=lambda c: c.order(stage), default=None)


def _at(found: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _comparable(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= LARGEST


def lacking(result: dict) -> str | None:
    """What a finished result lacks of all that a comparison needs; None if it has it."""
    if found := schema.lacking(result):
        return found
    places: list[tuple[str, ...]] = [
        ("quality", stage, key) for stage in ("baseline", "quantized") for key in ("nll", "perplexity")
    ]
    places += [("bits", "baseline"), ("bits", "per_parameter")]
    odd = [".".join(place) for place in places if not _comparable(_at(result["metrics"], place))]
    return f"metrics.{odd[0]} is not finite, or larger than {LARGEST:g}" if odd else None


def compare(results: dict[Path, dict]) -> list[Setting]:
    """The finished results, by their file, as comparisons; the setting with most configurations first."""
    groups: dict[str, dict[str, dict[int, tuple[Path, dict]]]] = defaultdict(lambda: defaultdict(dict))
    for file, result in sorted(results.items(), key=lambda item: item[1]["run"]["started"] or ""):
        if result["status"] == "done":  # of the same run, the last
            config = completed(result["config"])
            scales = () if config["format"]["name"] == "none" else ("block", "dq")  # 16 bit has none
            where, what = text(config, *WHERE), text(config, "format", *scales, "tune")
            groups[where][what][config["seed"]] = file, {**result, "config": config}
    together = [[next(iter(runs.values()))[1]["config"] for runs in group.values()] for group in groups.values()]
    varied = varied_in([configs[0] for configs in together], WHERE)
    settings = []
    for group, configs in zip(groups.values(), together, strict=True):
        keys = varied_in(configs, ("tune",))
        found = [
            Configuration(", ".join([title(config), *told(config, keys)]), runs)
            for config, runs in zip(configs, group.values(), strict=True)
        ]
        if not any(c.is_16_bit for c in found):
            found.append(_baseline_of(found[0]))
        _against_16_bit(found)
        found.sort(key=lambda c: (c.order("quantized"), c.order("tuned")))
        settings.append(Setting(name(configs[0], varied), found, keys))
    return sorted(settings, key=lambda s: -len(s.configurations))


def _without_fine_tunes(configurations: Sequence[Configuration]) -> list[Configuration]:
    """One a format, block and dq, with the runs of all."""
    groups: dict[str, list[Configuration]] = defaultdict(list)
    for c in configurations:
        groups[c.recipe].append(c)
    return [_one(members) for members in groups.values()]


def _one(members: Sequence[Configuration]) -> Configuration:
    first, name = members[0], title(members[0].config)
    if len(members) == 1 and first.title == name:
        return first
    runs = {seed: run for c in reversed(members) for seed, run in c.runs.items()}
    known = {stage: d for stage, d in first.differences.items() if stage == "quantized"}
    return Configuration(name, runs, known)


def difference(ours: Configuration, theirs: Configuration, stage: str) -> Difference | None:
    """ours − theirs at one stage, p uncorrected; None where there are not the same windows, or, tuned, no common seed."""
    return paired(ours.windows("quality", stage), theirs.windows("quality", stage), seeded=stage == "tuned")


def references(some: Sequence[Configuration], stage: str) -> list[tuple[Configuration, Configuration | None]]:
    """Of those that a stage tells apart, each but 16 bit, and the one of 16 bit that it is compared with there."""
    bases = {c.fine_tune(): c for c in some if c.is_16_bit}
    first = next(iter(bases.values()), None)
    return [(c, bases.get(c.fine_tune()) if stage == "tuned" else first) for c in some if not c.is_16_bit]


def _against_16_bit(configurations: list[Configuration]) -> None:
    pairs = references(_without_fine_tunes(configurations), "quantized")
    family = corrected([difference(c, base, "quantized") if base else None for c, base in pairs])
    before = {c.recipe: d for (c, _), d in zip(pairs, family, strict=True)}
    pairs = references(configurations, "tuned")
    family = corrected([difference(c, base, "tuned") if base else None for c, base in pairs])
    for (c, _), after in zip(pairs, family, strict=True):
        found = {"quantized": before[c.recipe], "tuned": after}
        c.differences |= {stage: d for stage, d in found.items() if d}


def _baseline_of(c: Configuration) -> Configuration:
    """The 16-bit model as the runs of a configuration saw it before they quantized: never fine-tuned."""
    seed, (file, result) = next(iter(c.runs.items()))
    metrics = result["metrics"]
    scores = _at(metrics, ("quality", "baseline")) or {}
    same = {"delta_nll": 0.0, "stderr": 0.0, "kl_mean": 0.0, "kl_p99": 0.0, "top1_agreement": 1.0}
    bits = metrics["bits"].get("baseline")
    derived = {
        "bits": {"per_parameter": bits, "model": bits},
        "memory": {"model_bytes": _at(metrics, ("memory", "baseline_bytes"))},
        "quality": {"baseline": scores, "quantized": {**scores, "against_baseline": same}},
        "throughput": _at(metrics, ("throughput", "baseline")) or {},
        "tasks": {"quantized": _at(metrics, ("tasks", "baseline")) or {}},
    }
    config = {**result["config"], "format": {"name": "none"}, "tune": {"method": UNTUNED}}
    return Configuration("16 bit, untuned", {seed: (file, {**result, "config": config, "metrics": derived})})
