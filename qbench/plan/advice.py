"""What would make a step fit, and which formats do."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

import formats
from formats import Format
from qbench.errors import InputError, integer

from .count import Plan, count
from .settings import PlanSettings
from .shapes import Shape


@dataclass(frozen=True)
class Change:
    """words: the keys as a command line takes them. plan: what comes of it."""

    words: str
    plan: Plan


#: what a key can be changed to, the smallest change first; each as what of the settings it changes
Ladder = list[dict]


def changes(plan: Plan) -> list[Change]:
    """The changes of one key, or of the format, that make a plan fit that does not. Where no single one does: those that
    save, one after the other until they are enough, as one change; nothing where all of them are not.

    In the order of what they cost: first nothing but time, then precision, then what is trained.
    """
    fitting = []
    for ladder in ladders(plan.settings):
        if changed(plan, ladder[-1]).fits:  # what saves most is asked first: most often it is not enough
            tried = (changed(plan, rung) for rung in ladder)
            fitting.append(next(other for other in tried if other.fits))
    return [Change(_words(plan.settings, other.settings), other) for other in fitting or _together(plan)]


def changed(plan: Plan, change: dict) -> Plan:
    if "batch" in change:  # into parts that it can be taken in
        change = change | {"accumulate": gcd(plan.settings.accumulate, change["batch"])}
    return count(plan.shape, plan.settings.but(**change))


def _together(plan: Plan) -> list[Plan]:
    for ladder in ladders(plan.settings):
        found = changed(plan, ladder[-1])
        plan = found if found.needed < plan.needed else plan
        if plan.fits:
            return [plan]
    return []


def _words(before: PlanSettings, after: PlanSettings) -> str:
    """What changes from one to the other, as a command line takes it."""
    said = []
    for key in ("method", "checkpointing", "accumulate", "optimizer", "batch", "rank", "seq"):
        if getattr(after, key) != getattr(before, key):
            said.append(f"{key}={str(getattr(after, key)).lower()}")
    if after.format is not before.format:
        other = after.format.name != before.format.name
        said.append(f"+format={after.format.name} " * other + f"dq={str(after.format.dq).lower()}")
    if after.dtype.adapters != before.dtype.adapters:
        said.append(f"dtype.adapters={after.dtype.adapters}")
    return " ".join(said)


def ladders(settings: PlanSettings) -> Iterator[Ladder]:
    """What there is to change, a ladder a key."""
    if settings.trains and not settings.checkpointing:
        yield [{"checkpointing": True}]
    if settings.trains and settings.accumulate < settings.batch:
        yield [{"accumulate": settings.batch}]
    if settings.trains and settings.optimizer in ("adamw", "adam"):
        yield [{"optimizer": "paged_adamw"}]
        yield [{"optimizer": "adamw_8bit"}]
    if settings.method != "full":
        yield from ([{"format": smaller}] for smaller in _smaller(settings.format))
    if settings.method == "lora" and settings.dtype.adapters == "float32":
        yield [{"dtype": replace(settings.dtype, adapters="bfloat16")}]
    if settings.method == "full":
        yield [{"method": "lora", "format": formats.get("nf4", dq=True)}]
    for key, least in (("batch", 1), ("rank", 8), ("seq", 128)):
        if getattr(settings, key) > least and (key != "rank" or settings.method == "lora"):
            yield [{key: value} for value in _halves(getattr(settings, key), least)]


def _halves(value: int, least: int) -> list[int]:
    found = []
    while value > least:
        value = max(value // 2, least)
        found.append(value)
    return found


def _smaller(fmt: Format) -> list[Format]:
    """The same format with double quantization, and NF4 with it, where they take fewer bytes."""
    same = {**(fmt.arguments or {"name": fmt.name, "block": fmt.block}), "dq": True}
    others = [formats.get(**same), *([formats.get("nf4", block=fmt.block, dq=True)] if fmt.name != "nf4" else [])]
    return [other for other in others if other.count_bytes(2**20) < fmt.count_bytes(2**20)]


def sweep(shape: Shape, settings: PlanSettings, blocks: tuple[int, ...]) -> list[Plan]:
    """The plan under every registered format, with and without double quantization, at each block; the smallest first.

    A format that knows neither is one plan, one of another package that refuses a block or cannot be used is left out.
    Raises InputError for a block that is no positive integer.
    """
    if settings.method == "full":
        raise InputError(
            "sweep: method=full trains 16-bit weights, there are no formats to compare; accepted: lora, none"
        )
    for block in blocks:
        integer("blocks", block)
    plans, seen = [], set()
    for name in formats.names():
        for block in blocks:
            for dq in (False, True):
                try:
                    fmt = formats.get(name, block=block, dq=dq)
                except ValueError:
                    continue
                plan = count(shape, settings.but(format=fmt))
                key = name, plan.needed
                if key not in seen:
                    seen.add(key)
                    plans.append(plan)
    return sorted(plans, key=lambda plan: (plan.needed, plan.settings.format.name))
