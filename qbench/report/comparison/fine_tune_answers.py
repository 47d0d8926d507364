"""What was found about the fine-tunes, in sentences: learning rates, methods, where LoRA began, what became of it."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from qbench.report.wording import listed, number, plus_minus, start, title

from . import low_rank, methods
from .configurations import Configuration, Setting
from .differences import Difference, tally
from .low_rank import Afterwards, Start
from .methods import Claim, Series

T = TypeVar("T")
VERDICTS = ("not confirmed", "confirmed, as far as can be told apart,", "confirmed, and better,")


def answer(setting: Setting) -> list[str]:
    """Nothing of what the setting has no data for."""
    return [*_rates(setting), *_methods(setting), *_claims(setting), *_starts(setting), *_afterwards(setting)]


def _together(items: Iterable[T], key: Callable[[T], str]) -> dict[str, list[T]]:
    groups: dict[str, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def perplexity(c: Configuration) -> str:
    """After the fine-tune, with half its 95% interval over seeds."""
    keys = ("quality", "tuned", "perplexity")
    return plus_minus(c.known(*keys), c.interval(*keys), ".2f")


def _rates(setting: Setting) -> list[str]:
    """The best learning rate of each method."""

    def told(s: Series) -> str:
        low, *_, high = s.rates
        edge = f", the {s.edge} tried: not bracketed" if s.edge else ""
        among = f"of {len(s.rates)} from {low:g} to {high:g}"
        return f"{s.where} is {s.rate:g}{edge} ({among}; perplexity {perplexity(s.best)})"

    groups = _together((s for s in methods.series(setting) if len(s.rates) > 1), lambda s: s.name)
    return [
        f"The best learning rate of {name} {listed([told(s) for s in some], '; ')}." for name, some in groups.items()
    ]


def _methods(setting: Setting) -> list[str]:
    """All in order, where there are several."""
    if not methods.differ(setting) or len(found := methods.series(setting)) < 2:
        return []
    rates = ", each at its best learning rate" if any(len(s.rates) > 1 for s in found) else ""
    return [
        f"After the fine-tune{rates}, the best first: {listed([f'{s.title} ({perplexity(s.best)})' for s in found])}."
    ]


def _claims(setting: Setting) -> list[str]:
    """QLoRA's, a sentence for each reference in 16 bit."""
    sentences = []
    for family in methods.claims(setting).values():
        for reference, some in _together(methods.plain(family), lambda claim: claim.theirs.title).items():
            groups = _together(sorted(some, key=lambda claim: claim.difference.delta), _verdict)
            told = [
                f"{verdict} for {listed([_claim(c) for c in groups[verdict]])}"
                for verdict in VERDICTS
                if verdict in groups
            ]
            sentences.append(
                f"Against {reference} ({_reference(some)}) the claim that nothing is lost is here {'; '.join(told)}."
            )
    return sentences


def _reference(some: Sequence[Claim]) -> str:
    """What 16 bit makes of it, and whether it might do better at another learning rate."""
    theirs = some[0].theirs
    alone = len(theirs.rates) == 1 and any(len(claim.ours.rates) > 1 for claim in some)
    caveat = "at the only learning rate tried" if alone else "learning rate not bracketed" if theirs.edge else ""
    return ", ".join(filter(None, [perplexity(theirs.best), caveat]))


def _verdict(claim: Claim) -> str:
    lost, same, won = VERDICTS
    if not claim.difference.distinguishable:
        return same
    return lost if claim.difference.delta > 0 else won


def _claim(claim: Claim) -> str:
    found, ours = claim.difference, claim.ours
    name = title(ours.best.config) if ours.name == claim.theirs.name else ours.title
    return f"{name} ({perplexity(ours.best)}: {plus_minus(found.delta, found.stderr, '+.4f')} nats)"


def _starts(setting: Setting) -> list[str]:
    """Whether it pays to begin elsewhere than at B = 0, a sentence each."""
    sentences = []
    begun = [s for s in low_rank.starts(setting) if s.init != low_rank.PLAIN]
    rates = ", each at its best learning rate" if any(len(s.rates) > 1 for s in methods.series(setting)) else ""
    for init, some in _together(begun, lambda s: s.init).items():
        gains = [b - a for s in some for a, b in [s.sqnr_db] if a is not None and b is not None]
        noise = f"Q + B·A is {_range(gains, '.2f')} dB nearer to the weights than Q alone; " if gains else ""
        told = [
            f"{when} the perplexity is {tally(found, 'pair')}"
            for when, found in (
                ("before the first step", [s.before for s in some if s.before]),
                ("after the last", [s.after for s in some if s.after]),
            )
            if found
        ]
        against = "; ".join(told) or "no run that began at B = 0 is like it"
        sentences.append(f"{start(init)} against B = 0{rates}: {noise}{against}. {_pays(some)}".strip())
    return sentences


def _range(values: Iterable[float | None], form: str) -> str:
    """From the least to the greatest of those that there are."""
    found = [value for value in values if value is not None]
    if not found:
        return "?"
    low, high = (number(value, form) for value in (min(found), max(found)))
    return low if low == high else f"{low} to {high}"


def _pays(some: Sequence[Start]) -> str:
    """Whether anything of it is left after the fine-tune."""
    found = [(title(s.configuration.config), s.after) for s in some if s.after]
    if not found:
        return ""
    parts = []
    for verb, sign in (("pays", -1), ("costs", 1)):
        names = [f"{name} ({d.percent})" for name, d in found if d.distinguishable and d.delta * sign > 0]
        parts += [f"{verb} on {listed(names)}"] if names else []
    same = [name for name, d in found if not d.distinguishable]
    parts += [f"is not distinguishable on {listed(same)}"] if same else []
    return f"After the fine-tune it {'; it '.join(parts)}."


def _afterwards(setting: Setting) -> list[str]:
    """What the adapters lose when they are packed, or merged: of quantized models, where there are some."""
    rows = low_rank.afterwards(setting)
    rows = [row for row in rows if not row.configuration.is_16_bit] or rows
    apart = {row.configuration: row for row in rows if row.apart}
    sentences = []
    against = [(row, row.against) for row in rows if row.against]
    for name, some in _together(against, lambda pair: pair[0].name).items():
        ours = _range([row.bits for row, _ in some], ".3f")
        theirs = _range([apart[row.configuration].bits for row, _ in some], ".3f")
        sentences.append(
            f"{_told(name)}, at {ours} bits a parameter of the whole model, against {theirs} with the adapters kept apart,"
            f" the perplexity is {tally([d for _, d in some], 'configuration')}{_worst(some)}."
        )
    return sentences


def _told(name: str) -> str:
    return {"merged": "Merged into 16 bits", "requantized": "Merged and in the format again"}.get(name, f"With {name}")


def _worst(some: Sequence[tuple[Afterwards, Difference]]) -> str:
    """Where the most is lost, and how much that is of what the fine-tune had won."""
    sure = [(row.configuration, d) for row, d in some if d.distinguishable and d.delta > 0]
    if not sure:
        return ""
    c, worst = max(sure, key=lambda pair: pair[1].delta)
    won = c.known("quality", "quantized", "nll") - c.known("quality", "tuned", "nll")
    share = f", {number(worst.delta / won, '.0%')} of what the fine-tune won" if won > 0 else ""
    return f"; the most is lost on {c.title}, {worst.percent}{share}"
