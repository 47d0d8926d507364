"""Puts runs into configurations, configurations into settings, and tests each against 16 bit.

    results ─┬─ same model, data, eval and device: a Setting
             └─┬─ and same format, block, dq and tune: a Configuration
               └─ the runs of a configuration differ in their seed

Each setting gets a 16-bit configuration. If no run is in 16 bit, it is made from the baseline that each run measured.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from qbench.report.defaults import fill_defaults
from qbench.report.wording import UNTUNED, recipe_name
from qbench.results import schema

from .config_keys import SETTING, describe_keys, describe_setting, fingerprint, varying_keys
from .configurations import (
    Configuration,
    Setting,
    compare_at,
    is_comparable,
    look_up,
    merge_fine_tunes,
    pair_with_16_bit,
)
from .differences import LARGEST, correct_p_values

Runs = dict[int, tuple[Path, dict]]  #: file and result of each run of a configuration, by seed


def find_problem(result: dict) -> str | None:
    """Why a finished result cannot be compared; None if it can be."""
    if problem := schema.why_incomparable(result):
        return problem
    needed: list[tuple[str, ...]] = [
        ("quality", stage, key) for stage in ("baseline", "quantized") for key in ("nll", "perplexity")
    ]
    needed += [("bits", "baseline"), ("bits", "per_parameter")]
    for keys in needed:
        if not is_comparable(look_up(result["metrics"], keys)):
            return f"metrics.{'.'.join(keys)} is not finite, or larger than {LARGEST:g}"
    return None


def group_runs(results: dict[Path, dict]) -> list[Setting]:
    """The finished results, by file, as settings; the one with the most configurations comes first."""
    groups = _group_by_setting(results)
    varying = varying_keys([_config_of(runs[0]) for runs in groups], SETTING)
    settings = [_build_setting(runs, varying) for runs in groups]
    return sorted(settings, key=lambda s: -len(s.configurations))


def _group_by_setting(results: dict[Path, dict]) -> list[list[Runs]]:
    """The runs of each configuration of each setting. Of equal runs, the one started last counts."""
    groups: dict[str, dict[str, Runs]] = defaultdict(lambda: defaultdict(dict))
    for file, result in sorted(results.items(), key=lambda item: item[1]["run"]["started"] or ""):
        if result["status"] == "done":
            config = fill_defaults(result["config"])
            scales = () if config["format"]["name"] == "none" else ("block", "dq")  # 16 bit has neither
            setting, configuration = fingerprint(config, *SETTING), fingerprint(config, "format", *scales, "tune")
            groups[setting][configuration][config["seed"]] = file, {**result, "config": config}
    return [list(group.values()) for group in groups.values()]


def _config_of(runs: Runs) -> dict:
    return next(iter(runs.values()))[1]["config"]


def _build_setting(groups: Sequence[Runs], varying: Sequence[str]) -> Setting:
    """A setting from the runs of its configurations. varying: the keys in which settings differ."""
    configs = [_config_of(runs) for runs in groups]
    keys = varying_keys(configs, ("tune",))
    configurations = [
        Configuration(", ".join([recipe_name(config), *describe_keys(config, keys)]), runs)
        for config, runs in zip(configs, groups, strict=True)
    ]
    if not any(c.is_16_bit for c in configurations):
        configurations.append(_baseline_as_configuration(configurations[0]))
    _test_against_16_bit(configurations)
    configurations.sort(key=lambda c: (c.sort_key("quantized"), c.sort_key("tuned")))
    return Setting(describe_setting(configs[0], varying), configurations, keys)


def _test_against_16_bit(configurations: list[Configuration]) -> None:
    """Fill in `differences`. The tests of one stage are a family, for which the p values are corrected."""
    untuned = pair_with_16_bit(merge_fine_tunes(configurations), "quantized")
    family = correct_p_values([compare_at(c, base, "quantized") if base else None for c, base in untuned])
    before = {c.recipe: d for (c, _), d in zip(untuned, family, strict=True)}
    tuned = pair_with_16_bit(configurations, "tuned")
    family = correct_p_values([compare_at(c, base, "tuned") if base else None for c, base in tuned])
    for (c, _), after in zip(tuned, family, strict=True):
        differences = {"quantized": before[c.recipe], "tuned": after}
        c.differences |= {stage: d for stage, d in differences.items() if d}


def _baseline_as_configuration(c: Configuration) -> Configuration:
    """The 16-bit model as a run of `c` measured it before quantizing: it has no scores after a fine-tune."""
    seed, (file, result) = next(iter(c.runs.items()))
    metrics = result["metrics"]
    scores = look_up(metrics, ("quality", "baseline")) or {}
    no_difference = {"delta_nll": 0.0, "stderr": 0.0, "kl_mean": 0.0, "kl_p99": 0.0, "top1_agreement": 1.0}
    bits = metrics["bits"].get("baseline")
    baseline_metrics = {
        "bits": {"per_parameter": bits, "model": bits},
        "memory": {"model_bytes": look_up(metrics, ("memory", "baseline_bytes"))},
        "quality": {"baseline": scores, "quantized": {**scores, "against_baseline": no_difference}},
        "throughput": look_up(metrics, ("throughput", "baseline")) or {},
        "tasks": {"quantized": look_up(metrics, ("tasks", "baseline")) or {}},
    }
    config = {**result["config"], "format": {"name": "none"}, "tune": {"method": UNTUNED}}
    baseline = {**result, "config": config, "metrics": baseline_metrics}
    return Configuration("16 bit, untuned", {seed: (file, baseline)})
