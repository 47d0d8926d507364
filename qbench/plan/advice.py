"""Finds changes that make a step fit, and the formats that fit."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

import formats
from formats import Format
from qbench.errors import InputError, integer
from qbench.settings import FULL

from .count import Plan, count_memory
from .settings import PlanSettings, key_of
from .shapes import Shape


@dataclass(frozen=True)
class Remedy:
    """A change that makes a step fit. arguments: for the command line. plan: the plan after the change."""

    arguments: str
    plan: Plan


#: the changes of one key, each as fields of PlanSettings, from the smallest to the largest
Ladder = list[dict]


def find_remedies(plan: Plan) -> list[Remedy]:
    """The changes of one key, or of the format, that make a plan fit.

    If no single change is enough, those that save memory are combined until the plan fits, as one remedy. The list is
    empty if all of them together are not enough. Cheap changes come first: those that cost only time, then those that cost
    precision, then those that change what is trained.
    """
    fitting = []
    for ladder in ladders(plan.settings):
        if apply_change(plan, ladder[-1]).fits:  # the largest change first: most often it is not enough
            plans = (apply_change(plan, rung) for rung in ladder)
            fitting.append(next(other for other in plans if other.fits))
    return [
        Remedy(_changed_arguments(plan.settings, other.settings), other) for other in fitting or _combine_changes(plan)
    ]


def apply_change(plan: Plan, change: dict) -> Plan:
    """The plan with some settings changed; `accumulate` is lowered until it divides a new batch."""
    if "batch" in change:
        change = change | {"accumulate": gcd(plan.settings.accumulate, change["batch"])}
    return count_memory(plan.shape, plan.settings.replace(**change))


def _combine_changes(plan: Plan) -> list[Plan]:
    """The plan after enough changes to fit, in a list; an empty list if all changes are not enough."""
    for ladder in ladders(plan.settings):
        changed = apply_change(plan, ladder[-1])
        if changed.needed < plan.needed:
            plan = changed
        if plan.fits:
            return [plan]
    return []


def _changed_arguments(before: PlanSettings, after: PlanSettings) -> str:
    """The difference of two settings, as arguments of a command line."""
    arguments = []
    if after.method != before.method:
        arguments.append(f"tune={after.method}")
    for name in ("checkpointing", "accumulate", "optimizer", "batch", "rank", "seq"):
        if getattr(after, name) != getattr(before, name):
            arguments.append(f"{key_of(name)}={str(getattr(after, name)).lower()}")
    if after.format is not before.format:
        if after.format.name != before.format.name:
            arguments.append(f"+format={after.format.name}")
        arguments.append(f"dq={str(after.format.dq).lower()}")
    for name in ("adapters", "compute"):
        if getattr(after.dtype, name) != getattr(before.dtype, name):
            arguments.append(f"dtype.{name}={getattr(after.dtype, name)}")
    return " ".join(arguments)


def ladders(settings: PlanSettings) -> Iterator[Ladder]:
    """The changes that can be tried, a ladder for each key."""
    if settings.trains and not settings.checkpointing:
        yield [{"checkpointing": True}]
    if settings.trains and settings.accumulate < settings.batch:
        yield [{"accumulate": settings.batch}]
    if settings.trains and settings.optimizer in ("adamw", "adam"):
        yield [{"optimizer": "paged_adamw"}]
        yield [{"optimizer": "adamw_8bit"}]
    if settings.method != FULL:
        yield from ([{"format": smaller}] for smaller in _smaller_formats(settings.format))
    if settings.low_rank and settings.dtype.adapters == "float32":
        yield [{"dtype": replace(settings.dtype, adapters="bfloat16")}]
    if settings.method == FULL:
        dtype = replace(settings.dtype, compute="bfloat16")
        yield [{"method": "lora", "format": formats.get("nf4", dq=True), "dtype": dtype}]
    for name, least, has_it in (("batch", 1, settings.trains), ("rank", 8, settings.low_rank), ("seq", 128, True)):
        if has_it and getattr(settings, name) > least:
            yield [{name: value} for value in _halve_down_to(getattr(settings, name), least)]


def _halve_down_to(value: int, least: int) -> list[int]:
    """Half of a value, half of that, and so on down to `least`."""
    halves = []
    while value > least:
        value = max(value // 2, least)
        halves.append(value)
    return halves


def _smaller_formats(fmt: Format) -> list[Format]:
    """The format with double quantization, and NF4 with it, each where it takes fewer bytes."""
    same = {**(fmt.arguments or {"name": fmt.name, "block": fmt.block}), "dq": True}
    others = [formats.get(**same), *([formats.get("nf4", block=fmt.block, dq=True)] if fmt.name != "nf4" else [])]
    return [other for other in others if other.count_bytes(2**20) < fmt.count_bytes(2**20)]


def compare_formats(shape: Shape, settings: PlanSettings, blocks: tuple[int, ...]) -> list[Plan]:
    """A plan of every registered format, with and without double quantization, at each block. The smallest comes first.

    A format that ignores both has one plan. A format of another package is skipped if it refuses a block or cannot be
    used. Raises InputError for tune=full, and for a block that is no positive integer.
    """
    if settings.method == FULL:
        raise InputError(
            "sweep: tune=full trains 16-bit weights, so no formats compare; accepted: lora, dora, rslora, none"
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
                plan = count_memory(shape, settings.replace(format=fmt))
                key = name, plan.needed
                if key not in seen:
                    seen.add(key)
                    plans.append(plan)
    return sorted(plans, key=lambda plan: (plan.needed, plan.settings.format.name))
