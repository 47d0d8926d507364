"""The answers of a comparison in sentences, as sure as the tests behind them."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from qbench.report.wording import SIGNIFICANT, count, listed, number

from . import fine_tune_answers, tasks
from .configurations import Configuration, Setting, difference
from .differences import Difference, corrected, tally
from .methods import at_best
from .selection import frontier, pairs_by


@lru_cache
def answer(setting: Setting) -> tuple[str, ...]:
    """What was found on one model and text, a sentence or two each."""
    stages = setting.stages() if any(not c.is_16_bit for c in setting.configurations) else ()
    best = at_best(setting)
    return (
        *(sentence for stage in stages for sentence in (_frontier(best, stage), _equal(best, stage))),
        *_effect(setting, "dq", "Double quantization"),
        *_effect(setting, "block", "The next larger block"),
        *fine_tune_answers.answer(setting),
        *tasks.answer(setting),
    )


def compared(setting: Setting) -> str:
    """What was compared, and with what."""
    some = setting.configurations
    first = next(iter(some[0].runs.values()))[1]["metrics"]["quality"]["quantized"]
    seeds = {seed for c in some for seed in c.runs}
    base, after = setting.base("quantized"), setting.base("tuned")
    reference = (
        f"16 bit has a perplexity of {_perplexity(base, 'quantized')}" if base else "No 16-bit run is among them"
    )
    if after:
        several = sum(c.is_16_bit for c in setting.at("tuned")) > 1
        how = (
            f"at best {{}} after {after.title.removeprefix('16 bit, ')}" if several else f"{{}} after {setting.method}"
        )
        reference += f", {how.format(_perplexity(after, 'tuned'))}"
    return (
        f"{count(len(some), 'configuration')} on {count(first['tokens'], 'held-out token')},"
        f" {count(len(seeds), 'seed')}, {count(sum(len(c.runs) for c in some), 'run')}. {reference}."
    )


def _perplexity(c: Configuration, stage: str) -> str:
    return number(c.known("quality", stage, "perplexity"), ".2f")


def _frontier(setting: Setting, stage: str) -> str:
    best = [c for c in frontier(setting.at(stage), stage) if not c.is_16_bit]
    if not best:
        return f"{_when(setting, stage)} no format is on the frontier of bits and perplexity."
    told = []
    for c in best:
        found = c.differences.get(stage)
        against = ""
        if found:
            against = f", {found.percent}" if found.distinguishable else ", not distinguishable from 16 bit"
        told.append(
            f"{c.title} ({number(c.known('bits', 'per_parameter'), '.3f')} bits: {_perplexity(c, stage)}{against})"
        )
    if len(best) == 1:
        return f"{_when(setting, stage)} {told[0]} alone is on the frontier of bits and perplexity."
    return f"{_when(setting, stage)} on the frontier of bits and perplexity are {listed(told, '; ')}."


def _when(setting: Setting, stage: str) -> str:
    """At the start of a sentence."""
    said = setting.when(stage)
    return said[0].upper() + said[1:]


def _equal(setting: Setting, stage: str) -> str:
    tested = [c for c in setting.at(stage) if stage in c.differences]
    if not tested:
        lacks = "fine-tune, windows and seed" if stage == "tuned" else "windows and seed"
        return f"{_when(setting, stage)} nothing can be said against 16 bit: no 16-bit run has the same {lacks}."
    same = [c for c in tested if not c.differences[stage].distinguishable]
    better = [c for c in tested if c.differences[stage].distinguishable and c.differences[stage].delta < 0]
    tune = setting.method if len(setting.methods) == 1 else "the same fine-tune"
    reference = f"{tune} on 16 bit" if stage == "tuned" else "16 bit"
    sentence = (
        f"{_when(setting, stage)} {len(same)} of {len(tested)} quantized are not distinguishable from {reference}"
    )
    if same:
        sentence += f": {listed([c.title for c in sorted(same, key=lambda c: c.known('bits', 'per_parameter'))])}"
    if better:
        sentence += f"; distinguishably better: {listed([c.title for c in better])}"
    worst = max(tested, key=lambda c: c.differences[stage].delta)
    if worst not in same and worst.differences[stage].delta > 0:
        sentence += f". The farthest is {worst.title}, {worst.differences[stage].percent}"
    return sentence + "."


def effects(setting: Setting, key: str, stage: str) -> list[tuple[Configuration, Configuration, Difference]]:
    """Of `block` or `dq` at one stage: those that differ in it alone, and the paired difference, corrected."""
    pairs = pairs_by(setting, key, stage)
    found = corrected([difference(*pair, stage) for pair in pairs])
    return [(*pair, d) for pair, d in zip(pairs, found, strict=True) if d]


def _effect(setting: Setting, key: str, name: str) -> list[str]:
    sentences: list[str] = []
    for stage in setting.stages():
        found = effects(setting, key, stage)
        if not found:
            continue
        saved = float(
            np.mean([b.known("bits", "per_parameter") - a.known("bits", "per_parameter") for a, b, _ in found])
        )
        what = f"saves {number(saved, '.3f')} bits a weight on average; " if not sentences else ""
        told = tally([d for *_, d in found], "pair")
        sentences.append(f"{what}{setting.when(stage)} the perplexity is {told}")
    return [f"{name} {'; '.join(sentences)}."] if sentences else []


def note(comparisons: Sequence[Setting]) -> str:
    """How the numbers of the comparison are to be read."""
    tests = sum(stage in c.differences for s in comparisons for stage in s.stages() for c in s.at(stage))
    counted = f" ({tests} against 16 bit in all)" if tests else ""
    return (
        "On the frontier is what nothing smaller equals and nothing of the same size distinguishably beats. ± after a"
        " difference is its standard error over windows and seeds, after a mean half its 95% interval over seeds. ≈ marks"
        f" a difference that is not distinguishable from none: p ≥ {SIGNIFICANT}, corrected for the number of tests at"
        f" one stage after Benjamini and Hochberg{counted}. Differences are paired on the same"
        " windows of text and the same seed. Windows and seeds say how far a number can be trusted on this model and"
        " text, not on others."
    )
