"""Which of many configurations are to be seen, or seen together: the frontier, the best, pairs that differ in a key."""

from collections import defaultdict
from collections.abc import Iterable

from .config_keys import text
from .configurations import Configuration, Setting, difference


def frontier(
    configurations: Iterable[Configuration], stage: str, size: tuple[str, ...] = ("bits", "per_parameter")
) -> list[Configuration]:
    """Those that nothing beats, by size ascending: none smaller is as good, and none as small distinguishably better."""
    left = [(c.known(*size), nll, c) for c in configurations if (nll := c.nll(stage)) is not None]
    kept: list[Configuration] = []
    best: float | None = None  # nll of all that are smaller
    for bits in sorted({bits for bits, _, _ in left}):
        alike = sorted((nll, i) for i, (b, nll, _) in enumerate(left) if b == bits)
        least, at = alike[0]
        first = left[at][2]
        for nll, i in alike:
            c = left[i][2]
            against = None if c is first else difference(c, first, stage)
            if (best is None or nll < best) and not (against and against.distinguishable):
                kept.append(c)
        best = least if best is None or least < best else best
    return kept


def featured(setting: Setting, most: int) -> Setting:
    """The setting, or where it has more than `most` configurations: 16 bit, the frontiers, and the best of the rest."""
    if len(setting.configurations) <= most:
        return setting
    last = setting.stages()[-1]
    ranked = sorted(setting.configurations, key=lambda c: c.order(last))
    formats = [c for c in ranked if not c.is_16_bit]
    best = [c for stage in setting.stages() for c in frontier(formats, stage)]
    base = setting.base(last) or setting.base("quantized")  # where that was never fine-tuned
    kept = list(dict.fromkeys([*([base] if base else []), *best, *formats, *ranked]))[:most]
    return Setting(setting.title, sorted(kept, key=lambda c: c.order("quantized")), setting.varied)


def pairs_by(setting: Setting, key: str, stage: str) -> list[tuple[Configuration, Configuration]]:
    """Those that differ in `block` or `dq` alone, each with the next smaller block, or the one without dq."""
    alike: dict[str, list[Configuration]] = defaultdict(list)
    others = [k for k in ("format", "block", "dq", *(("tune",) if stage == "tuned" else ())) if k != key]
    for c in setting.at(stage):
        if not c.is_16_bit:
            alike[text(c.config, *others)].append(c)
    pairs = []
    for members in alike.values():
        members.sort(key=lambda c: c.config[key])
        pairs += list(zip(members[1:], members, strict=False))
    return pairs


def usual_block(configurations: Iterable[Configuration]) -> int:
    """64 where there is one, else the block that most have."""
    blocks = [c.config["block"] for c in configurations if not c.is_16_bit]
    return 64 if 64 in blocks else max(set(blocks), key=blocks.count, default=64)
