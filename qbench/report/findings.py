"""The answers of a comparison in sentences, as sure as the tests behind them."""

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from .compare import Configuration, Difference, Setting, corrected, difference, frontier, pairs_by
from .words import SIGNIFICANT

MOST = 6  #: names in a list before it is cut


@lru_cache
def answer(setting: Setting) -> tuple[str, ...]:
    """What was found on one model and text, a sentence or two each."""
    return (
        *(sentence for stage in setting.stages() for sentence in (_frontier(setting, stage), _equal(setting, stage))),
        *_effect(setting, "dq", "Double quantization"),
        *_effect(setting, "block", "The next larger block"),
    )


def compared(setting: Setting) -> str:
    """What was compared, and with what."""
    some = setting.configurations
    first = next(iter(some[0].runs.values()))[1]["metrics"]["quality"]["quantized"]
    seeds = {seed for c in some for seed in c.runs}
    base = next((c for c in some if c.is_16_bit), None)
    reference = (
        f"16 bit has a perplexity of {_perplexity(base, 'quantized')}" if base else "No 16-bit run is among them"
    )
    if base and base.nll("tuned") is not None:
        reference += f", {_perplexity(base, 'tuned')} after {setting.method}"
    return (
        f"{count(len(some), 'configuration')} on {count(first['tokens'], 'held-out token')},"
        f" {count(len(seeds), 'seed')}, {count(sum(len(c.runs) for c in some), 'run')}. {reference}."
    )


def count(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _perplexity(c: Configuration, stage: str) -> str:
    return f"{c.mean('quality', stage, 'perplexity'):.2f}"


def change(found: Difference) -> str:
    """A difference of log-likelihoods as the per cent of the perplexity that it is, with its standard error."""
    text = f"{'+' if found.delta >= 0 else '−'}{100 * abs(math.expm1(found.delta)):.2f}%"
    return text if found.stderr is None else f"{text} ± {100 * math.exp(found.delta) * found.stderr:.2f}%"


def _frontier(setting: Setting, stage: str) -> str:
    best = [c for c in frontier(setting.configurations, stage) if not c.is_16_bit]
    if not best:
        return f"{_when(setting, stage)} no format is on the frontier of bits and perplexity."
    told = []
    for c in best[:MOST]:
        found = c.differences.get(stage)
        against = ""
        if found:
            against = f", {change(found)}" if found.distinguishable else ", not distinguishable from 16 bit"
        told.append(f"{c.title} ({c.mean('bits', 'per_parameter'):.3f} bits: {_perplexity(c, stage)}{against})")
    more = f"; and {len(best) - MOST} more" if len(best) > MOST else ""
    if len(best) == 1:
        return f"{_when(setting, stage)} {told[0]} alone is on the frontier of bits and perplexity."
    return f"{_when(setting, stage)} on the frontier of bits and perplexity are {'; '.join(told)}{more}."


def when(setting: Setting, stage: str) -> str:
    return f"after {setting.method}" if stage == "tuned" else "before any fine-tune"


def _when(setting: Setting, stage: str) -> str:
    """At the start of a sentence."""
    said = when(setting, stage)
    return said[0].upper() + said[1:]


def _equal(setting: Setting, stage: str) -> str:
    tested = [c for c in setting.configurations if stage in c.differences]
    if not tested:
        return (
            f"{_when(setting, stage)} nothing can be said against 16 bit: no 16-bit run has the same windows and seed."
        )
    same = [c for c in tested if not c.differences[stage].distinguishable]
    better = [c for c in tested if c.differences[stage].distinguishable and c.differences[stage].delta < 0]
    reference = f"{setting.method} on 16 bit" if stage == "tuned" else "16 bit"
    listed = ", ".join(c.title for c in sorted(same, key=lambda c: c.mean("bits", "per_parameter"))[:MOST])
    more = f" and {len(same) - MOST} more" if len(same) > MOST else ""
    sentence = (
        f"{_when(setting, stage)} {len(same)} of {len(tested)} quantized are not distinguishable from {reference}"
    )
    sentence += f": {listed}{more}" if same else ""
    if better:
        sentence += f"; distinguishably better: {', '.join(c.title for c in better[:MOST])}"
    worst = max(tested, key=lambda c: c.differences[stage].delta)
    if worst not in same and worst.differences[stage].delta > 0:
        sentence += f". The farthest is {worst.title}, {change(worst.differences[stage])}"
    return sentence + "."


def effects(setting: Setting, key: str, stage: str) -> list[tuple[Configuration, Configuration, Difference]]:
    """Of `block` or `dq` at one stage: those that differ in it alone, and the paired difference, corrected."""
    pairs = pairs_by(setting.configurations, key)
    found = corrected([difference(*pair, stage) for pair in pairs])
    return [(*pair, d) for pair, d in zip(pairs, found, strict=True) if d]


def _effect(setting: Setting, key: str, name: str) -> list[str]:
    sentences = []
    for stage in setting.stages():
        found = effects(setting, key, stage)
        if not found:
            continue
        saved = np.mean([b.mean("bits", "per_parameter") - a.mean("bits", "per_parameter") for a, b, _ in found])
        sure = [d for *_, d in found if d.distinguishable]
        worse = sum(d.delta > 0 for d in sure)
        counts = f"worse in {worse}, better in {len(sure) - worse}, not distinguishable in {len(found) - len(sure)}"
        mean = float(np.mean([d.delta for *_, d in found]))
        what = f"saves {saved:.3f} bits a weight on average; " if not sentences else ""
        sentences.append(
            f"{what}{when(setting, stage)} the perplexity is {counts} of {count(len(found), 'pair')}"
            f" ({'+' if mean >= 0 else '−'}{100 * abs(math.expm1(mean)):.2f}% on average)"
        )
    return [f"{name} {'; '.join(sentences)}."] if sentences else []


def note(comparisons: Sequence[Setting]) -> str:
    """How the numbers of the comparison are to be read."""
    tests = sum(len(c.differences) for s in comparisons for c in s.configurations)
    return (
        "On the frontier is what nothing smaller equals and nothing of the same size distinguishably beats. ± after a"
        " difference is its standard error over windows and seeds, after a mean half its 95% interval over seeds. ≈ marks"
        f" a difference that is not distinguishable from none: p ≥ {SIGNIFICANT}, corrected for the number of tests at"
        f" one stage after Benjamini and Hochberg ({tests} against 16 bit in all). Differences are paired on the same"
        " windows of text and the same seed. Windows and seeds say how far a number can be trusted on this model and"
        " text, not on others."
    )
