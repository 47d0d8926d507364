"""Fine-tuning methods compared: each on each format, at its best learning rate.

QLoRA (arXiv 2305.14314) claims that LoRA on 4 bits loses nothing against LoRA, or full fine-tuning, in 16 bit. Each
quantized series is tested against both, on the same windows and seeds, whatever their learning rates.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from qbench.report.wording import recipe_name

from .config_keys import AFTERWARDS, describe_keys
from .configurations import Configuration, Setting, compare_at
from .differences import Difference, correct_p_values
from .selection import usual_block


@dataclass(eq=False)
class Series:
    """One method on one format. configurations: one for each learning rate, ascending."""

    name: str
    configurations: list[Configuration]

    @property
    def rates(self) -> list[float]:
        return [learning_rate(c) for c in self.configurations]

    @cached_property
    def best(self) -> Configuration:
        """The configuration with the lowest nll, on the seeds that all learning rates share, if there are any."""
        shared = set.intersection(*(set(c.runs) for c in self.configurations))

        def nll(c: Configuration) -> float:
            runs = {seed: run for seed, run in c.runs.items() if seed in shared} or c.runs
            return replace(c, runs=runs).sort_key("tuned")

        return min(self.configurations, key=nll)

    @property
    def rate(self) -> float:
        """The best learning rate."""
        return learning_rate(self.best)

    @property
    def edge(self) -> str:
        """`lowest` or `highest` if the best of several rates is at that end: a better one may lie beyond."""
        if len(self.rates) == 1:
            return ""
        i = self.rates.index(self.rate)
        return "lowest" if i == 0 else "highest" if i == len(self.rates) - 1 else ""

    @property
    def is_full(self) -> bool:
        return self.best.config["tune"]["method"] == "full"

    @property
    def where(self) -> str:
        """`on nf4, block 64`, or `of 16 bit` for full fine-tuning."""
        return f"{'of' if self.is_full else 'on'} {recipe_name(self.best.config)}"

    @property
    def title(self) -> str:
        return f"{self.name} {self.where}"


@dataclass(frozen=True)
class Claim:
    """The claim that `ours` loses nothing against `theirs`. difference: of the two, with corrected p."""

    ours: Series
    theirs: Series
    difference: Difference


def learning_rate(c: Configuration) -> float:
    return c.config["tune"].get("lr") or 0.0


@lru_cache
def find_series(setting: Setting) -> tuple[Series, ...]:
    """Every method on every format; the lowest tuned perplexity comes first.

    Configurations that differ only in what happens after training are the same series; the one with most seeds counts.
    """
    groups: dict[tuple[str, str], dict[float, Configuration]] = defaultdict(dict)
    for c in setting.scored_at("tuned"):
        by_rate = groups[c.recipe, c.fine_tune("lr")]
        other = by_rate.get(learning_rate(c))
        if other is None or len(c.runs) > len(other.runs):
            by_rate[learning_rate(c)] = c
    unnamed = {f"tune.{key}" for key in ("method", "lr", *AFTERWARDS)}
    keys = ["tune.method", *(key for key in setting.varying if key not in unnamed)]
    series = []
    for by_rate in groups.values():
        name = ", ".join(describe_keys(next(iter(by_rate.values())).config, keys))
        series.append(Series(name, sorted(by_rate.values(), key=learning_rate)))
    return tuple(sorted(series, key=lambda s: s.best.sort_key("tuned")))


def at_best_learning_rates(setting: Setting) -> Setting:
    """The setting without the configurations that have a better learning rate."""
    best = {s.best for s in find_series(setting)}
    kept = [c for c in setting.configurations if c in best or c.nll("tuned") is None]
    return setting if len(kept) == len(setting.configurations) else replace(setting, configurations=kept)


def has_several_fine_tunes(setting: Setting) -> bool:
    """Whether several methods or learning rates were tried."""
    return len({(c.config["tune"]["method"], learning_rate(c)) for c in setting.scored_at("tuned")}) > 1


def qlora_claims(setting: Setting) -> dict[str, list[Claim]]:
    """QLoRA's claim against the same method in 16 bit ("same"), and against full fine-tuning in 16 bit ("full").

    Each of the two is a family of tests, for which the p values are corrected.
    """
    series = find_series(setting)
    in_16_bit = {s.best.fine_tune("lr"): s for s in series if s.best.is_16_bit}
    full = next((s for s in series if s.best.is_16_bit and s.is_full), None)
    same_method = [(s, in_16_bit.get(s.best.fine_tune("lr"))) for s in series if not s.best.is_16_bit]
    return {"same": _test_claims(same_method), "full": _test_claims((s, full) for s in series if s is not full)}


def _test_claims(pairs: Iterable[tuple[Series, Series | None]]) -> list[Claim]:
    complete = [(ours, theirs) for ours, theirs in pairs if theirs]
    family = correct_p_values([compare_at(ours.best, theirs.best, "tuned") for ours, theirs in complete])
    return [Claim(*pair, d) for pair, d in zip(complete, family, strict=True) if d]


def at_usual_block(claims: Sequence[Claim]) -> list[Claim]:
    """One claim for each method, format and dq; of several, the one with the usual block."""
    usual = usual_block(claim.ours.best for claim in claims)
    chosen: dict[tuple, Claim] = {}
    for claim in claims:
        c = claim.ours.best
        key = (claim.ours.name, c.format, c.config["dq"])
        if key not in chosen or c.config["block"] == usual:
            chosen[key] = claim
    return list(chosen.values())
