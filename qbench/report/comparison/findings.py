"""The findings of a comparison in sentences. Every claim rests on a test whose p value is corrected."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from qbench.report.wording import SIGNIFICANT, count, format_number, join_names

from . import fine_tune_findings, tasks
from .configurations import Configuration, Setting, compare_at
from .differences import Difference, correct_p_values, count_outcomes
from .methods import at_best_learning_rates
from .selection import frontier, pairs_differing_in


@lru_cache
def describe_findings(setting: Setting) -> tuple[str, ...]:
    """The findings of a setting, a few sentences each."""
    stages = setting.stages if any(not c.is_16_bit for c in setting.configurations) else ()
    best = at_best_learning_rates(setting)
    return (
        *(finding for stage in stages for finding in (_describe_frontier(best, stage), _describe_equals(best, stage))),
        *_describe_effect(setting, "dq", "Double quantization"),
        *_describe_effect(setting, "block", "The next larger block"),
        *fine_tune_findings.describe_fine_tunes(setting),
        *tasks.describe_tasks(setting),
    )


def describe_setup(setting: Setting) -> str:
    """What was compared, and the perplexity of 16 bit."""
    configurations = setting.configurations
    tokens = configurations[0].results[0]["metrics"]["quality"]["quantized"]["tokens"]
    seeds = {seed for c in configurations for seed in c.runs}
    runs = sum(len(c.runs) for c in configurations)
    base, tuned = setting.best_16_bit("quantized"), setting.best_16_bit("tuned")
    reference = f"The perplexity of 16 bit is {_perplexity(base, 'quantized')}" if base else "No run is in 16 bit"
    if tuned:
        several = sum(c.is_16_bit for c in setting.scored_at("tuned")) > 1
        how = f" at best, after {tuned.title.removeprefix('16 bit, ')}" if several else f" after {setting.method}"
        reference += f", and {_perplexity(tuned, 'tuned')}{how}"
    return (
        f"{count(len(configurations), 'configuration')}, {count(len(seeds), 'seed')} and {count(runs, 'run')}, scored on"
        f" {count(tokens, 'held-out token')}. {reference}."
    )


def reading_note(settings: Sequence[Setting]) -> str:
    """How to read the numbers of the page."""
    tests = sum(stage in c.differences for s in settings for stage in s.stages for c in s.scored_at(stage))
    counted = f" ({tests} against 16 bit in all)" if tests else ""
    return (
        "A configuration is on the frontier if nothing smaller is as good and nothing of the same size is distinguishably"
        " better. After a difference, ± is its standard error over windows and seeds; after a mean, it is half the 95%"
        f" interval over seeds. ≈ marks a difference that is not distinguishable from zero: p ≥ {SIGNIFICANT}, corrected"
        f" for the number of tests at one stage by the method of Benjamini and Hochberg{counted}. Differences are paired"
        " on the same windows of text and the same seed. The errors cover windows and seeds: they say how far a number can"
        " be trusted on this model and text, not on others."
    )


def paired_effects(setting: Setting, key: str, stage: str) -> list[tuple[Configuration, Configuration, Difference]]:
    """Pairs that differ only in `key`, "block" or "dq", and the difference of each with corrected p."""
    pairs = pairs_differing_in(setting, key, stage)
    family = correct_p_values([compare_at(*pair, stage) for pair in pairs])
    return [(*pair, d) for pair, d in zip(pairs, family, strict=True) if d]


def _describe_frontier(setting: Setting, stage: str) -> str:
    best = [c for c in frontier(setting.scored_at(stage), stage) if not c.is_16_bit]
    when = _capitalized_when(setting, stage)
    if not best:
        return f"{when}, no format is on the frontier of bits and perplexity."
    descriptions = []
    for c in best:
        bits, d = format_number(c.known_mean("bits", "per_parameter"), ".3f"), c.differences.get(stage)
        against = "" if not d else f", {d.percent}" if d.distinguishable else ", not distinguishable from 16 bit"
        descriptions.append(f"{c.title} ({bits} bits, perplexity {_perplexity(c, stage)}{against})")
    if len(best) == 1:
        return f"{when}, only {descriptions[0]} is on the frontier of bits and perplexity."
    return f"{when}, these are on the frontier of bits and perplexity: {join_names(descriptions, '; ')}."


def _describe_equals(setting: Setting, stage: str) -> str:
    """Which configurations are not distinguishable from 16 bit, which are better, and which is the worst."""
    tested = [c for c in setting.scored_at(stage) if stage in c.differences]
    when = _capitalized_when(setting, stage)
    if not tested:
        needed = "fine-tune, windows and seed" if stage == "tuned" else "windows and seed"
        return f"{when}, nothing can be compared with 16 bit: no 16-bit run has the same {needed}."
    same = [c for c in tested if not c.differences[stage].distinguishable]
    better = [c for c in tested if c.differences[stage].distinguishable and c.differences[stage].delta < 0]
    tune = setting.method if len(setting.method_names) == 1 else "the same fine-tune"
    reference = f"{tune} on 16 bit" if stage == "tuned" else "16 bit"
    sentence = f"{when}, {len(same)} of {len(tested)} quantized configurations are not distinguishable from {reference}"
    if same:
        by_size = sorted(same, key=lambda c: c.known_mean("bits", "per_parameter"))
        sentence += f": {join_names([c.title for c in by_size], '; ')}"
    sentences = [sentence]
    if better:
        sentences.append(f"Distinguishably better: {join_names([c.title for c in better], '; ')}")
    worst = max(tested, key=lambda c: c.differences[stage].delta)
    if worst not in same and worst.differences[stage].delta > 0:
        sentences.append(f"The worst is {worst.title}, with {worst.differences[stage].percent}")
    return f"{'. '.join(sentences)}."


def _describe_effect(setting: Setting, key: str, name: str) -> list[str]:
    """What the larger block or double quantization saves, and how the perplexity changes at each stage."""
    sentences: list[str] = []
    for stage in setting.stages:
        effects = paired_effects(setting, key, stage)
        if not effects:
            continue
        if not sentences:
            savings = [
                b.known_mean("bits", "per_parameter") - a.known_mean("bits", "per_parameter") for a, b, _ in effects
            ]
            sentences.append(
                f"{name} saves {format_number(float(np.mean(savings)), '.3f')} bits per weight on average."
            )
        outcomes = count_outcomes([d for *_, d in effects], "pair")
        sentences.append(f"{_capitalized_when(setting, stage)}, the perplexity is {outcomes}.")
    return [" ".join(sentences)] if sentences else []


def _perplexity(c: Configuration, stage: str) -> str:
    return format_number(c.known_mean("quality", stage, "perplexity"), ".2f")


def _capitalized_when(setting: Setting, stage: str) -> str:
    """`Before any fine-tune`, for the start of a sentence."""
    when = setting.when(stage)
    return when[0].upper() + when[1:]
