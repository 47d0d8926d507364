"""Arguments `key=value`: parsed with Hydra's grammar, and checked against the table of keys.

Hydra would take the path `2024` for a number and the path `a,b` for two values. Here text stays text, and a mistake
raises an InputError of one line.
"""

import math
import re
import shlex
from collections.abc import Iterable

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, Quote, QuotedString
from hydra.errors import HydraException

from qbench import keys
from qbench.errors import InputError
from qbench.keys import shown

from .commands import GROUP, Command

_parser = OverridesParser.create()


def check_override(command: Command, argument: str) -> Override:
    """Check an argument `key=value`, and return it as Hydra needs it.

    Several values of a key are not checked here: each run checks its own. Raises InputError for an unknown key,
    however it is spelled, and for a value that the key does not accept.
    """
    argument = command.translate(argument)
    before, equals, value = argument.partition("=")
    if (accepted := command.keys.get(before.lstrip("+"))) and accepted.text:
        argument = f"{before}{equals}{_quote_numbers(value)}"
    override = parse(command, argument)
    key = override.key_or_group
    name = f"{key}@{override.package}" if override.package is not None else key
    if re.match(r"hydra\b", key):
        return override
    if key.partition("/")[0] in command.added and name == key:  # named sweeps may be in a subgroup
        if not override.is_add():
            raise InputError(f"{key}: it has no default to override; accepted: +{key}=NAME")
        return override
    if key.startswith(f"{GROUP}."):
        return parse(command, f"++{argument.lstrip('+')}") if not override.is_delete() else override
    if name not in {*command.keys, *command.groups}:
        raise InputError(keys.unknown(name, command.keys))
    if override.is_delete():
        raise InputError(f"~{key}: a key cannot be left out; accepted: {key}=VALUE")
    override = parse(command, argument.lstrip("+"))  # the key exists, so a plus makes no difference
    if key in command.groups:
        return override
    parsed = override.value()
    if not override.is_sweep_override() and not (isinstance(parsed, str) and "${" in parsed):
        command.keys[key].check(key, parsed)
    return override


def parse(command: Command, argument: str) -> Override:
    """Parse an argument with Hydra's grammar. Raises InputError; if quotes are missing, its message shows them."""
    try:
        return _parser.parse_override(argument)
    except Exception as error:  # ANTLR's, and Python's for numbers of 5,000 digits or as many brackets
        key, equals, value = argument.partition("=")
        name = key.lstrip("+~")
        accepted = command.keys.get(name)
        if accepted and not accepted.text:
            accepted.check(name, value)
        if accepted or re.fullmatch(rf"(hydra|{GROUP})\.[\w.]+", name):
            short = len(value) < 1000 and value.isprintable()
            typed = shlex.quote(f"{key}={quoted(value)}") if short else "the same in quotes"
            raise InputError(f"{name}: {shown(value)} needs quotes for Hydra; accepted: {typed}") from error
        if equals and re.fullmatch(r"[\w./@:-]+", name):
            raise InputError(keys.unknown(name, command.keys)) from error
        raise InputError(f"{shown(argument)} is not key=value; accepted: such as +{GROUP}=nf4, block=64") from error


def _quote_numbers(value: str) -> str:
    """Put quotes around each value of a list that Hydra would take for a number."""
    inner = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    if re.search(r"""[\\"'()[\]{}]""", inner):
        return value
    parts = [quoted(part.strip()) if _looks_like_a_number(part) else part for part in inner.split(",")]
    return value.replace(inner, ",".join(parts)) if inner else value


def _looks_like_a_number(part: str) -> bool:
    try:
        return isinstance(_parser.parse_rule(part.strip(), "primitive"), bool | int | float)
    except ValueError:  # an integer of more than 4,300 digits
        return True
    except HydraException:
        return False


def quoted(value: str) -> str:
    """Put a text in quotes, so that Hydra's grammar accepts it."""
    return QuotedString(value, Quote.single if '"' in value else Quote.double).with_quotes()


def unquoted(value: str) -> str:
    """Remove the quotes of a value if it has some."""
    try:
        parsed = _parser.parse_rule(value, "value")
    except (HydraException, ValueError, RecursionError):  # not a text in quotes
        return value
    return parsed.text if isinstance(parsed, QuotedString) else value


def choices_of(override: Override) -> list[str]:
    """The choices of a group that an override names."""
    value = override.value()
    return [str(name) for name in (value.list if isinstance(value, ChoiceSweep) else [value])]


def separate_choices(override: Override) -> list[Override]:
    """One override for each choice of a swept group."""
    prefix = "+" if override.is_add() else ""
    return [_parser.parse_override(f"{prefix}{override.key_or_group}={name}") for name in choices_of(override)]


def count_jobs(overrides: Iterable[Override]) -> int | None:
    """The number of jobs in a sweep. A later override replaces an earlier one of the same key.

    None if it is not known, because a glob stands for files.
    """
    counts: dict[str, int] = {}
    for override in overrides:
        if override.is_sweep_override():
            if not override.is_discrete_sweep() or isinstance(override.value(), Glob):
                return None
            counts[override.get_key_element()] = sum(1 for _ in override.sweep_string_iterator())
        else:
            counts[override.get_key_element()] = 1
    return math.prod(counts.values())


def check_single(command: Command, override: Override) -> None:
    """Raise InputError if an override of a single run has several values."""
    key, (_, _, value) = override.key_or_group, str(override.input_line).partition("=")
    if not override.is_sweep_override() or re.match(r"hydra\b", key):
        return
    message = f"{key}: {shown(value)} is several values"
    if command.no_sweep is None:
        message += ", a sweep; accepted: with -m"
    else:
        message += "; accepted: one"
    if key in command.keys and command.keys[key].text:
        message += f"; as one text: {shlex.quote(f'{key}={quoted(value)}')}"
    raise InputError(message)


def check_no_tune(overrides: Iterable[Override]) -> None:
    """Raise InputError for a key of the fine-tune together with tune=none."""
    chosen = [name for override in overrides if override.key_or_group == "tune" for name in choices_of(override)]
    for override in overrides if "none" in chosen else ():
        if override.key_or_group.startswith("tune."):
            raise InputError(f"{override.key_or_group}: tune=none takes no such key; accepted: with another tune")
