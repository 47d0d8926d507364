"""Tab completion of the console script `qbench`, through argcomplete.

The shell starts `qbench` with the line so far in environment variables, and qbench prints the words that may follow.
Nothing slow is imported: the names of formats are read from source, and the keys from `keys`.
"""

import os
from argparse import ArgumentParser
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import argcomplete

from qbench import keys

from . import COMMANDS
from .arguments import BENCHMARKS, bench_parser, report_parser, runs_parser
from .config_files import CONF, EXPERIMENTS
from .format_names import format_names

#: flags of every command that takes key=value; some are Hydra's
FLAGS = ("--help", "--version", "--cfg", "--info", "--config-dir", "--hydra-help")
SWEEP_FLAGS = ("-m", "--multirun", "--formats")  #: flags of `run` alone
TABLES = {"run": keys.RUN, "quantize": keys.QUANTIZE, "plan": keys.PLAN}


def complete() -> None:
    """Print the completions of the line in the environment, and exit."""
    words = os.environ["COMP_LINE"].encode()[: int(os.environ["COMP_POINT"])].decode(errors="ignore").split(" ")
    words = [word for word in words[:-1] if word] + words[-1:]  # the last word is still being typed, and may be empty
    skipped = 0
    name = words[1] if len(words) > 2 and words[1] in COMMANDS else None
    parser: ArgumentParser
    if name is None:
        parser = _overrides_parser("run", commands=len(words) <= 2)
    elif name in TABLES:
        parser, skipped = _overrides_parser(name), 1
    elif name != "bench":
        parser, skipped = (report_parser() if name == "report" else runs_parser()), 1
    elif len(words) > 3 and words[2] in BENCHMARKS:
        parser, skipped = bench_parser(words[2]), 2
    else:
        parser, skipped = bench_parser(), 1
    for action in parser._actions:
        choices = getattr(action.type, "choices", None)
        action.completer = _Names(choices) if choices else getattr(action, "completer", _paths)  # type: ignore[attr-defined]
    os.environ["_ARGCOMPLETE"] = str(1 + skipped)  # index of the word before the parser's arguments
    argcomplete.autocomplete(parser, always_complete_options="long")


class _Names:
    """Completes a word to one of `names`."""

    def __init__(self, names: Iterable[str]):
        self.names = list(names)

    def __call__(self, prefix: str, **_: Any) -> list[str]:
        return [name for name in self.names if name.startswith(prefix)]


def _paths(prefix: str, **_: Any) -> list[str]:
    """Files and folders; a folder ends with a slash."""
    folder, _slash, start = prefix.rpartition("/")
    here = Path(folder + _slash).expanduser()
    try:
        entries = sorted(here.iterdir())
    except OSError:
        return []
    shown = [e for e in entries if e.name.startswith(start) and (start or not e.name.startswith("."))]
    return [f"{folder}{_slash}{entry.name}{'/' * entry.is_dir()}" for entry in shown]


def _overrides_parser(name: str, commands: bool = False) -> ArgumentParser:
    """The parser of a command that takes key=value. commands: whether the word may also be a command."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in (*FLAGS, *(SWEEP_FLAGS if name == "run" else ())):
        parser.add_argument(flag, action="store_true", dest=flag)
    words = list(COMMANDS) if commands else []

    def override(prefix: str, **_: Any) -> list[str]:
        key, equals, value = prefix.partition("=")
        if not equals:
            return [word for word in (*words, *_keys(name)) if word.startswith(prefix)]
        before, comma, last = value.rpartition(",")  # several values are a sweep
        if (choices := _choices(name, key)) is None:
            return [f"{key}={path}" for path in _paths(value)]
        return [f"{key}={before}{comma}{choice}" for choice in choices if choice.startswith(last)]

    parser.add_argument("overrides", nargs="*").completer = override  # type: ignore[attr-defined]
    return parser


def _keys(name: str) -> list[str]:
    """The keys of a command, each with its =."""
    groups = ["+format", "format.target", *{"run": ["+experiments", "tune"], "plan": ["model", "tune"]}.get(name, [])]
    return [f"{key}=" for key in (*groups, *TABLES[name])]


def _choices(name: str, key: str) -> Iterable[str] | None:
    """Returns the values of a key: an empty list for a number, None for a path or another text."""
    if key == "+format":
        return (*format_names(), "custom")
    if name == "run" and key == "+experiments":
        return sorted(file.stem for file in EXPERIMENTS.glob("*.yaml"))
    if name != "quantize" and key == "tune":
        return sorted(file.stem for file in (CONF / "tune").glob("*.yaml"))
    if name == "run" and key == "tune.adapter_format":
        return format_names()
    accepted = TABLES[name].get(key)
    return None if accepted is None or accepted.text else accepted.choices
