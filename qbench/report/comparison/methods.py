"""Methods of fine-tuning beside each other: each on each format, at the learning rate that suited it best.

QLoRA (arXiv 2305.14314) claims that LoRA on 4 bits loses nothing against LoRA, or full fine-tuning, in 16 bit. Each
quantized series is tested against both, on the same windows and seeds, whatever their learning rates.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from qbench.report.wording import title

from .config_keys import AFTERWARDS, told
from .configurations import Configuration, Setting, difference
from .differences import Difference, corrected
from .selection import usual_block

FULL = "full"


@dataclass(eq=False)
class Series:
    """One method on one format. configurations: one a learning rate, ascending."""

    name: str
    configurations: list[Configuration]

    @property
    def rates(self) -> list[float]:
        return [rate(c) for c in self.configurations]

    @cached_property
    def best(self) -> Configuration:
        """The configuration with the learning rate of least nll, over the seeds that all rates have, if there are some."""
        shared = set.intersection(*(set(c.runs) for c in self.configurations))

        def nll(c: Configuration) -> float:
            runs = {seed: run for seed, run in c.runs.items() if seed in shared} or c.runs
            return replace(c, runs=runs).order("tuned")

        return min(self.configurations, key=nll)

    @property
    def rate(self) -> float:
        return rate(self.best)

    @property
    def edge(self) -> str:
        """Where the best of several rates is the last on one side, so that a better one may lie beyond."""
        if len(self.rates) == 1:
            return ""
        at = self.rates.index(self.rate)
        return "lowest" if at == 0 else "highest" if at == len(self.rates) - 1 else ""

    @property
    def is_full(self) -> bool:
        return self.best.config["tune"]["method"] == FULL

    @property
    def where(self) -> str:
        return f"{'of' if self.is_full else 'on'} {title(self.best.config)}"

    @property
    def title(self) -> str:
        return f"{self.name} {self.where}"


@dataclass(frozen=True)
class Claim:
    """That nothing is lost with `ours` against `theirs`, and the difference, corrected, that says otherwise or not."""

    ours: Series
    theirs: Series
    difference: Difference


def rate(c: Configuration) -> float:
    return c.config["tune"].get("lr") or 0.0


@lru_cache
def series(setting: Setting) -> tuple[Series, ...]:
    """Every method on every format, the best tuned perplexity first."""
    groups: dict[tuple[str, str], dict[float, Configuration]] = defaultdict(dict)
    for c in setting.at("tuned"):
        found = groups[c.recipe, c.fine_tune("lr")]
        if rate(c) not in found or len(c.runs) > len(found[rate(c)].runs):
            found[rate(c)] = c
    unnamed = {f"tune.{key}" for key in ("method", "lr", *AFTERWARDS)}
    keys = ["tune.method", *(key for key in setting.varied if key not in unnamed)]
    some = [
        Series(", ".join(told(next(iter(g.values())).config, keys)), sorted(g.values(), key=rate))
        for g in groups.values()
    ]
    return tuple(sorted(some, key=lambda s: s.best.order("tuned")))


def at_best(setting: Setting) -> Setting:
    """Of each method on each format the configuration at its best learning rate alone."""
    best = {s.best for s in series(setting)}
    kept = [c for c in setting.configurations if c in best or c.nll("tuned") is None]
    return setting if len(kept) == len(setting.configurations) else replace(setting, configurations=kept)


def differ(setting: Setting) -> bool:
    """Whether there are fine-tunes of several methods or learning rates."""
    return len({(c.config["tune"]["method"], rate(c)) for c in setting.at("tuned")}) > 1


def claims(setting: Setting) -> dict[str, list[Claim]]:
    """Against the same method in 16 bit, and against full fine-tuning in 16 bit: a family each."""
    found = series(setting)
    base = {s.best.fine_tune("lr"): s for s in found if s.best.is_16_bit}
    whole = next((s for s in found if s.best.is_16_bit and s.is_full), None)
    same = [(s, base.get(s.best.fine_tune("lr"))) for s in found if not s.best.is_16_bit]
    return {"same": _tested(same), "full": _tested((s, whole) for s in found if s is not whole)}


def _tested(pairs: Iterable[tuple[Series, Series | None]]) -> list[Claim]:
    known = [(ours, theirs) for ours, theirs in pairs if theirs]
    family = corrected([difference(ours.best, theirs.best, "tuned") for ours, theirs in known])
    return [Claim(*pair, d) for pair, d in zip(known, family, strict=True) if d]


def plain(found: Sequence[Claim]) -> list[Claim]:
    """One a method, format and dq: with the usual block, where there are several."""
    usual = usual_block(claim.ours.best for claim in found)
    chosen: dict[tuple, Claim] = {}
    for claim in found:
        c = claim.ours.best
        key = (claim.ours.name, c.format, c.config["dq"])
        if key not in chosen or c.config["block"] == usual:
            chosen[key] = claim
    return list(chosen.values())
