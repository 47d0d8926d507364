"""The findings about fine-tunes in sentences: learning rates, methods, QLoRA's claim, initializations, merged adapters."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from qbench.report.wording import format_number, init_name, join_names, plus_minus, recipe_name

from . import adapters, methods
from .adapters import Init, MergedAdapters
from .configurations import Configuration, Setting
from .differences import Difference, count_outcomes
from .methods import Claim, Series

T = TypeVar("T")
FAILS, HOLDS, EXCEEDED = "fails for", "holds, as far as the test can tell, for", "is exceeded by"


def describe_fine_tunes(setting: Setting) -> list[str]:
    """The findings that the setting has data for."""
    return [
        *_describe_rates(setting),
        *_describe_methods(setting),
        *_describe_claims(setting),
        *_describe_inits(setting),
        *_describe_merged(setting),
    ]


def _group_by(items: Iterable[T], key: Callable[[T], str]) -> dict[str, list[T]]:
    groups: dict[str, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return groups


def _perplexity(c: Configuration) -> str:
    """The perplexity after the fine-tune, with half its 95% interval over seeds."""
    keys = ("quality", "tuned", "perplexity")
    return plus_minus(c.known_mean(*keys), c.half_interval(*keys), ".2f")


def _describe_rates(setting: Setting) -> list[str]:
    """The best learning rate of each method."""

    def describe(s: Series) -> str:
        low, *_, high = s.rates
        tried = f"of {len(s.rates)} tried from {low:g} to {high:g}"
        which = f"the {s.edge} {tried}: a better one may lie beyond" if s.edge else tried
        return f"{s.where} is {s.rate:g} (perplexity {_perplexity(s.best)}), {which}"

    groups = _group_by((s for s in methods.find_series(setting) if len(s.rates) > 1), lambda s: s.name)
    return [
        f"The best learning rate of {name} {join_names([describe(s) for s in series], '; ')}."
        for name, series in groups.items()
    ]


def _describe_methods(setting: Setting) -> list[str]:
    """All methods from best to worst, if there are several."""
    series = methods.find_series(setting)
    if not methods.has_several_fine_tunes(setting) or len(series) < 2:
        return []
    rates = ", each at its best learning rate" if any(len(s.rates) > 1 for s in series) else ""
    names = join_names([f"{s.title} ({_perplexity(s.best)})" for s in series])
    return [f"The perplexity after the fine-tune{rates}, from best to worst: {names}."]


def _describe_claims(setting: Setting) -> list[str]:
    """For which formats QLoRA's claim holds, a sentence for each reference in 16 bit."""
    sentences = []
    for family in methods.qlora_claims(setting).values():
        for reference, claims in _group_by(methods.at_usual_block(family), lambda claim: claim.theirs.title).items():
            groups = _group_by(sorted(claims, key=lambda claim: claim.difference.delta), _verdict)
            verdicts = [
                f"{verdict} {join_names([_describe_claim(claim) for claim in groups[verdict]])}"
                for verdict in (FAILS, HOLDS, EXCEEDED)
                if verdict in groups
            ]
            against = f"Against {reference} ({_describe_reference(claims)})"
            sentences.append(f"{against}, the claim that nothing is lost {'; it '.join(verdicts)}.")
    return sentences


def _describe_reference(claims: Sequence[Claim]) -> str:
    """The perplexity of the reference, and whether another learning rate might improve it."""
    theirs, text = claims[0].theirs, f"perplexity {_perplexity(claims[0].theirs.best)}"
    if len(theirs.rates) == 1 and any(len(claim.ours.rates) > 1 for claim in claims):
        return f"{text}, at the only learning rate tried"
    return f"{text}, at the {theirs.edge} learning rate tried" if theirs.edge else text


def _verdict(claim: Claim) -> str:
    if not claim.difference.distinguishable:
        return HOLDS
    return FAILS if claim.difference.delta > 0 else EXCEEDED


def _describe_claim(claim: Claim) -> str:
    d, ours = claim.difference, claim.ours
    name = recipe_name(ours.best.config) if ours.name == claim.theirs.name else ours.title
    return f"{name} ({_perplexity(ours.best)}, {plus_minus(d.delta, d.stderr, '+.4f')} nats)"


def _describe_inits(setting: Setting) -> list[str]:
    """Whether an initialization other than B = 0 pays, a finding for each."""
    findings = []
    inits = [init for init in adapters.compare_inits(setting) if init.name != adapters.PLAIN]
    rates = ", each at its best learning rate" if any(len(s.rates) > 1 for s in methods.find_series(setting)) else ""
    for name, members in _group_by(inits, lambda init: init.name).items():
        sentences = []
        gains = [q_ba - q for q, q_ba in (init.sqnr_db for init in members) if q is not None and q_ba is not None]
        if gains:
            sentences.append(f"The SQNR of Q + B·A is {_format_range(gains, '.2f')} dB above that of Q alone.")
        stages = {
            "Before the first step": [init.before for init in members if init.before],
            "After the last step": [init.after for init in members if init.after],
        }
        for when, differences in stages.items():
            if differences:
                sentences.append(f"{when}, the perplexity is {count_outcomes(differences, 'pair')}.")
        if not any(stages.values()):
            sentences.append("No run with B = 0 is otherwise the same.")
        findings.append(
            " ".join([f"{init_name(name)} is compared with B = 0{rates}.", *sentences, *_describe_gain(members)])
        )
    return findings


def _describe_gain(inits: Sequence[Init]) -> list[str]:
    """On which formats an initialization helps after the fine-tune, and on which it hurts."""
    after = [(recipe_name(init.configuration.config), init.after) for init in inits if init.after]
    parts = []
    for verb, sign in (("helps", -1), ("hurts", 1)):
        names = [f"{name} ({d.percent})" for name, d in after if d.distinguishable and d.delta * sign > 0]
        if names:
            parts.append(f"{verb} on {join_names(names)}")
    same = [name for name, d in after if not d.distinguishable]
    if same:
        parts.append(f"makes no distinguishable difference on {join_names(same, '; ')}")
    return [f"After the fine-tune, it {'. It '.join(parts)}."] if parts else []


def _describe_merged(setting: Setting) -> list[str]:
    """What packing and merging the adapters costs. 16 bit counts only where nothing is quantized."""
    rows = adapters.compare_merged(setting)
    rows = [row for row in rows if not row.configuration.is_16_bit] or rows
    separate = {row.configuration: row for row in rows if row.is_separate}
    findings = []
    for name, members in _group_by((row for row in rows if row.against), lambda row: row.name).items():
        ours = _format_range([row.bits for row in members], ".3f")
        theirs = _format_range([separate[row.configuration].bits for row in members], ".3f")
        differences = [(row, row.against) for row in members if row.against]
        outcomes = count_outcomes([d for _, d in differences], "configuration")
        findings.append(
            f"{_merged_subject(name)}, the model takes {ours} bits per parameter, against {theirs} with separate adapters."
            f" The perplexity is {outcomes}.{_describe_largest_loss(differences)}"
        )
    return findings


def _merged_subject(name: str) -> str:
    return {"merged": "Merged into 16 bit", "requantized": "Merged and quantized again"}.get(name, f"With {name}")


def _describe_largest_loss(differences: Sequence[tuple[MergedAdapters, Difference]]) -> str:
    """The configuration that loses most, and the share of the gain of the fine-tune that it loses."""
    losses = [(row.configuration, d) for row, d in differences if d.distinguishable and d.delta > 0]
    if not losses:
        return ""
    c, largest = max(losses, key=lambda loss: loss[1].delta)
    won = c.known_mean("quality", "quantized", "nll") - c.known_mean("quality", "tuned", "nll")
    share = f" ({format_number(largest.delta / won, '.0%')} of what the fine-tune won)" if won > 0 else ""
    return f" The largest loss is on {c.title}: {largest.percent}{share}."


def _format_range(values: Iterable[float | None], form: str) -> str:
    """`1.67 to 1.80`, from the smallest to the largest; None is ignored."""
    known = [value for value in values if value is not None]
    if not known:
        return "?"
    low, high = (format_number(value, form) for value in (min(known), max(known)))
    return low if low == high else f"{low} to {high}"
