"""Selects configurations: the frontier, the best ones, pairs that differ in one key."""

from collections import defaultdict
from collections.abc import Iterable

from .config_keys import fingerprint
from .configurations import Configuration, Setting, compare_at


def frontier(
    configurations: Iterable[Configuration], stage: str, size: tuple[str, ...] = ("bits", "per_parameter")
) -> list[Configuration]:
    """The configurations with the best trade-off of size and nll, by size. size: the metric of the size.

    nll
     │  ●             ● on the frontier: lower than everything smaller, and of its own size
     │  ◐  ○            the lowest, or not distinguishable from the lowest (◐)
     │     ●   ○      ○ not on it
     │         ●
     └──────────── size
    """
    by_size: dict[float, list[tuple[float, Configuration]]] = defaultdict(list)
    for c in configurations:
        if (nll := c.nll(stage)) is not None:
            by_size[c.known_mean(*size)].append((nll, c))
    kept: list[Configuration] = []
    lowest: float | None = None  # nll of everything smaller
    for amount in sorted(by_size):
        ranked = sorted(by_size[amount], key=lambda pair: pair[0])
        least, best = ranked[0]
        for nll, c in ranked:
            if lowest is not None and nll >= lowest:
                break
            against = None if c is best else compare_at(c, best, stage)
            if not (against and against.distinguishable):
                kept.append(c)
        lowest = least if lowest is None else min(least, lowest)
    return kept


def select_best(setting: Setting, most: int) -> Setting:
    """The setting with at most `most` configurations: 16 bit, the frontiers, then the lowest nll after the fine-tune."""
    if len(setting.configurations) <= most:
        return setting
    last = setting.stages[-1]
    ranked = sorted(setting.configurations, key=lambda c: c.sort_key(last))
    quantized = [c for c in ranked if not c.is_16_bit]
    frontiers = [c for stage in setting.stages for c in frontier(quantized, stage)]
    base = setting.best_16_bit(last) or setting.best_16_bit("quantized")  # 16 bit may never have been fine-tuned
    kept = list(dict.fromkeys([*([base] if base else []), *frontiers, *quantized, *ranked]))[:most]
    return Setting(setting.title, sorted(kept, key=lambda c: c.sort_key("quantized")), setting.varying)


def pairs_differing_in(setting: Setting, key: str, stage: str) -> list[tuple[Configuration, Configuration]]:
    """Pairs of configurations equal except in `key`, "block" or "dq": (larger block, next smaller), (with dq, without)."""
    groups: dict[str, list[Configuration]] = defaultdict(list)
    others = [k for k in ("format", "block", "dq", *(("tune",) if stage == "tuned" else ())) if k != key]
    for c in setting.scored_at(stage):
        if not c.is_16_bit:
            groups[fingerprint(c.config, *others)].append(c)
    pairs = []
    for members in groups.values():
        members.sort(key=lambda c: c.config[key])
        pairs += list(zip(members[1:], members, strict=False))
    return pairs


def usual_block(configurations: Iterable[Configuration]) -> int:
    """64 if it occurs, else the most frequent block."""
    blocks = [c.config["block"] for c in configurations if not c.is_16_bit]
    return 64 if 64 in blocks else max(set(blocks), key=blocks.count, default=64)
