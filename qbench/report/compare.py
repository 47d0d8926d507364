"""Many runs as comparisons: runs that differ in their seed alone are one configuration, and differences are paired.

Two configurations meet on the same windows of the same text, and after a fine-tune with the same seed. The variance of a
difference is that over windows, of the mean over seeds, and that over seeds. The p values of one family of differences,
such as all formats against 16 bit at one stage, are corrected for their number (Benjamini & Hochberg 1995, "Controlling
the false discovery rate").
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from scipy.stats import false_discovery_control, t

from ..measure.statistics import clustered_mean
from .words import SIGNIFICANT, method, plus_minus, title

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

    def values(self, *keys: str) -> list[float]:
        """A number in the metrics of each run that has it."""
        found = (_at(result["metrics"], keys) for _, result in self.runs.values())
        return [value for value in found if value is not None]

    def mean(self, *keys: str) -> float | None:
        """The mean over seeds of a number in the runs' metrics; None where they lack it."""
        values = self.values(*keys)
        return float(np.mean(values)) if values else None

    def interval(self, *keys: str) -> float | None:
        """Half the 95% confidence interval of `mean` over seeds (Student's t); None of a single one."""
        values = self.values(*keys)
        if len(values) < 2:
            return None
        return float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5)

    def nll(self, stage: str) -> float | None:
        return self.mean("quality", stage, "nll")


@dataclass(eq=False)
class Setting:
    """What was measured on one model and one text: the configurations, the best perplexity before a fine-tune first."""

    title: str
    configurations: list[Configuration]

    @property
    def has_tuned(self) -> bool:
        return any(c.nll("tuned") is not None for c in self.configurations)

    @property
    def method(self) -> str:
        """What the fine-tunes are called: `LoRA`, or where there are several methods `the fine-tune`."""
        names = {method(c.config["tune"]) for c in self.configurations if c.nll("tuned") is not None}
        return names.pop() if len(names) == 1 else "the fine-tune"

    def stages(self) -> tuple[str, ...]:
        return STAGES if self.has_tuned else STAGES[:1]


def _at(found, keys: Sequence[str]):
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found


def usable(result: dict) -> bool:
    """Whether a finished result has all that a comparison needs."""
    config, score = result["config"], _at(result["metrics"], ("quality", "quantized", "nll"))
    keys = {"format", "block", "dq", "seed", "model", "data", "tune", "eval"}
    base = _at(result["metrics"], ("quality", "baseline", "nll"))
    numbers = all(isinstance(number, int | float) for number in (score, base))
    return keys <= config.keys() and numbers and bool(_at(result["metrics"], ("bits", "per_parameter")))


def compare(results: dict[Path, dict]) -> list[Setting]:
    """The finished results, by their file, as comparisons; the setting with most configurations first."""
    groups: dict[str, dict[str, dict[int, tuple[Path, dict]]]] = defaultdict(lambda: defaultdict(dict))
    for file, result in sorted(results.items(), key=lambda item: item[1]["run"]["started"] or ""):
        if result["status"] == "done":  # of the same run, the last
            config = result["config"]
            scales = () if config["format"]["name"] == "none" else ("block", "dq")  # 16 bit has none
            what = _text(config, "format", *scales, "tune")
            groups[_text(config, "model", "data", "eval", "device")][what][config["seed"]] = file, result
    together = [[next(iter(runs.values()))[1]["config"] for runs in group.values()] for group in groups.values()]
    varied = _varied([configs[0] for configs in together], ("model", "data", "eval", "device"))
    settings = []
    for group, configs in zip(groups.values(), together, strict=True):
        keys = _varied(configs, ("tune",))
        found = [
            Configuration(", ".join([title(config), *_told(config, keys)]), runs)
            for config, runs in zip(configs, group.values(), strict=True)
        ]
        if not any(c.is_16_bit for c in found):
            found.append(_baseline_of(found[0]))
        _against_16_bit(found)
        found.sort(key=lambda c: c.nll("quantized"))
        settings.append(Setting(_name(configs[0], varied), found))
    return sorted(settings, key=lambda s: -len(s.configurations))


def _text(config: dict, *keys: str) -> str:
    return json.dumps([config.get(key) for key in keys], sort_keys=True)


def _flat(config: dict, parts: Iterable[str]) -> dict[str, object]:
    flat = {}
    for part in parts:
        value = config.get(part)
        flat |= {f"{part}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {part: value}
    return flat


def _varied(configs: Sequence[dict], parts: Iterable[str]) -> list[str]:
    """The keys in those parts of the configs that are not the same in all."""
    values: dict[str, set[str]] = defaultdict(set)
    flats = [_flat(config, parts) for config in configs]
    for key in {key for flat in flats for key in flat}:
        values[key] = {json.dumps(flat.get(key)) for flat in flats}
    return sorted(key for key, found in values.items() if len(found) > 1)


def _told(config: dict, keys: Iterable[str]) -> list[str]:
    flat = _flat(config, ("model", "data", "eval", "device", "tune"))
    values = {key: f"{flat[key]:g}" if isinstance(flat[key], float) else flat[key] for key in keys if key in flat}
    told = {"tune.method": method(config["tune"]), "eval.tasks": f"tasks {', '.join(config['eval'].get('tasks', []))}"}
    return [told.get(key, f"{key.removeprefix('tune.')} {value}") for key, value in values.items()]


def _name(config: dict, varied: Iterable[str]) -> str:
    """A setting's: the model and the text, and what else tells it from the others."""
    names = f"{Path(config['model'].get('path') or 'the bundled model').name} on {Path(config['data']['path']).name}"
    return ", ".join([names, *_told(config, [key for key in varied if not key.endswith(".path")])])


def difference(ours: Configuration, theirs: Configuration, keys: str | Sequence[str]) -> Difference | None:
    """ours − theirs, p uncorrected: of the nll over windows at the stage `keys`, or of the numbers at those keys of the
    metrics. None where there are not the same windows, or, tuned, no common seed."""
    keys = ("quality", keys, "windows") if isinstance(keys, str) else keys
    stage, rows = keys[1], []
    for seed, (_, result) in ours.runs.items():
        other = theirs.runs.get(seed) or (None if stage == "tuned" else next(iter(theirs.runs.values())))
        ends = (r and _at(r[1]["metrics"], keys) for r in ((_, result), other))
        a, b = (None if end is None else np.asarray(end, np.float64) for end in ends)
        if a is not None and b is not None and len(a) == len(b) > 0:
            rows.append(a - b)
    if not rows:
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


def references(configurations: list[Configuration], stage: str) -> list[tuple[Configuration, Configuration | None]]:
    """Each configuration but those of 16 bit, and the one of those that it is compared with at a stage."""
    bases = [c for c in configurations if c.is_16_bit]
    alike = {_text(c.config, "tune"): c for c in bases}
    pairs = [(c, alike.get(_text(c.config, "tune"))) for c in configurations if not c.is_16_bit]
    if stage == "quantized":  # which no fine-tune has a part in
        pairs = [(c, base or bases[0]) for c, base in pairs]
    return pairs


def _against_16_bit(configurations: list[Configuration]) -> None:
    for stage in STAGES:
        pairs = references(configurations, stage)
        family = corrected([base and difference(c, base, stage) for c, base in pairs])
        for (c, _), found in zip(pairs, family, strict=True):
            if found:
                c.differences[stage] = found


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
    config = {**result["config"], "format": {"name": "none"}, "tune": {"method": "none"}}
    return Configuration("16 bit, untuned", {seed: (file, {**result, "config": config, "metrics": derived})})


def frontier(
    configurations: Iterable[Configuration], stage: str, size=("bits", "per_parameter")
) -> list[Configuration]:
    """Those that nothing beats, by size ascending: none smaller is as good, and none as small distinguishably better."""
    left = [(c.mean(*size), c.nll(stage), c) for c in configurations if c.nll(stage) is not None]
    kept: list[Configuration] = []
    best: Configuration | None = None  # of all that are smaller
    for bits in sorted({bits for bits, _, _ in left}):
        alike = sorted((nll, i) for i, (b, nll, _) in enumerate(left) if b == bits)
        first = left[alike[0][1]][2]
        for nll, i in alike:
            c = left[i][2]
            against = None if c is first else difference(c, first, stage)
            if (best is None or nll < best.nll(stage)) and not (against and against.distinguishable):
                kept.append(c)
        if best is None or first.nll(stage) < best.nll(stage):
            best = first
    return kept


def featured(setting: Setting, most: int) -> Setting:
    """The setting, or where it has more than `most` configurations: 16 bit, the frontiers, and the best of the rest."""
    if len(setting.configurations) <= most:
        return setting
    last = setting.stages()[-1]
    ranked = sorted(setting.configurations, key=lambda c: (c.nll(last) is None, c.nll(last)))
    base = next(c for c in ranked if c.is_16_bit)
    formats = [c for c in ranked if not c.is_16_bit]
    best = [c for stage in setting.stages() for c in frontier(formats, stage)]
    kept = list(dict.fromkeys([base, *best, *formats]))[:most]
    return Setting(setting.title, sorted(kept, key=lambda c: c.nll("quantized")))


def pairs_by(configurations: Iterable[Configuration], key: str) -> list[tuple[Configuration, Configuration]]:
    """Those that differ in `block` or `dq` alone, each with the next smaller block, or the one without dq."""
    alike: dict[str, list[Configuration]] = defaultdict(list)
    others = [k for k in ("format", "block", "dq", "tune") if k != key]
    for c in configurations:
        if not c.is_16_bit:
            alike[_text(c.config, *others)].append(c)
    pairs = []
    for members in alike.values():
        members.sort(key=lambda c: c.config[key])
        pairs += list(zip(members[1:], members, strict=False))
    return pairs
