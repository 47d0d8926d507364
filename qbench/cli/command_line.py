"""A command line before Hydra has it: a mistake is one line, told before PyTorch and all that takes time is imported.

`python -m qbench`, `qbench.quantize` and `qbench.plan` begin here. Keys and values are held to `keys`, what is text stays
text, and Hydra is left to compose, to sweep, and to answer for its own keys.
"""

import os
import re
import shlex
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, Quote, QuotedString
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from qbench import __version__, keys
from qbench.errors import InputError
from qbench.keys import shown
from qbench.system.extras import install
from qbench.system.interrupts import interruptible

from . import help_page

HERE = Path(__file__).parents[1]
CONF = HERE / "conf" if (HERE / "conf").is_dir() else HERE.parent / "conf"
EXPERIMENTS = HERE / "experiments" if (HERE / "experiments").is_dir() else HERE.parent / "experiments"
GROUP = "format"  #: the config group whose choices are not files
INTERRUPTED = 130
#: launchers that Hydra knows once an extra is installed
LAUNCHERS = {"joblib": "joblib", "submitit_local": "slurm", "submitit_slurm": "slurm", "ray": "ray"}
NO_FORMAT = (
    f"{GROUP}: none is given; accepted: +{GROUP}=NAME, such as +{GROUP}=nf4; python -m qbench --formats lists the names"
)
Job = Callable[[DictConfig], object]
Check = Callable[[dict], object]  #: of a resolved config; raises InputError
stderr = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
_parser = OverridesParser.create()


@dataclass(frozen=True)
class Command:
    """module: as `python -m` has it. folder, config: where Hydra finds its configuration. groups: those in files of their
    own, with the file that explains the keys. added: groups that are named with a plus. no_sweep: why it takes no -m.
    check: of a composed configuration without its format, before PyTorch is imported.
    """

    module: str
    folder: Path
    config: str
    keys: Mapping[str, keys.Accepted]
    groups: Mapping[str, Path] = field(default_factory=dict)
    added: tuple[str, ...] = (GROUP,)
    no_sweep: str | None = None
    check: Check = lambda config: None

    def searched(self, *folders: str) -> list[str]:
        """What tells Hydra where else, beside `folders`, there are configurations."""
        places = [*folders, *([str(EXPERIMENTS.parent)] if "experiments" in self.added else [])]
        return [f"hydra.searchpath=[{','.join(quoted(f'file://{place}') for place in places)}]"] if places else []


@dataclass(frozen=True)
class Line:
    """A command line that holds so far. asked: its flags. overrides: as Hydra is to have them. params: those of a named
    sweep, which Hydra finds itself.
    """

    asked: Namespace
    flags: list[str]
    overrides: list[Override]
    params: list[Override]
    sweeps: bool

    @property
    def runs(self) -> bool:
        """Whether it asks for more than to be shown something."""
        return not (self.asked.cfg or self.asked.info or self.asked.hydra_help or self.asked.shell_completion)


def start(command: Command, load: Callable[[], tuple[Job, Check]], told: Sequence[str] = ()) -> int:
    """Have Hydra run what sys.argv says. load: gives the job, and what holds a whole configuration to account, once there
    is something to run. told: what Hydra is told before the command line.

    Returns 0 when Hydra is through, whatever came of its jobs; 1 where a folder cannot be written; 2 for bad input.
    Raises KeyboardInterrupt.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing several lines of its own
    try:
        line = read(command, sys.argv[1:])
        if line is None:
            return 0
        with interruptible():
            job, check = load()
        if line.runs and not line.sweeps:
            check(plain(_composed(command, line.asked, line.overrides)))
        _check_choices(command, line, [GROUP])
        # flags last: --info would take an override for what it is to tell
        sys.argv[1:] = [*command.searched(), *told, *(str(o.input_line) for o in line.overrides), *line.flags]
        hydra.main(version_base="1.3", config_path=str(command.folder), config_name=command.config)(job)()
    except InputError as error:
        stderr.print(f"qbench: {error}")
        return 2
    except (HydraException, OmegaConfBaseException) as error:
        stderr.print(f"qbench: {one_line(error)}")
        return 2
    except OSError as error:  # of the folder that Hydra makes for a run
        stderr.print(f"qbench: {error.filename}: {error.strerror}" if error.filename else f"qbench: {error}")
        return 1
    return 0


def read(command: Command, arguments: Sequence[str]) -> Line | None:
    """Check a command line as far as that goes without PyTorch; None where it asked for a text, which is printed.

    Raises InputError, and Hydra's exceptions for what only it can tell.
    """
    if "--version" in arguments:
        print(f"{command.module} {__version__}")
        return None
    asked = _flags(list(arguments))
    if asked.help:
        show_help(command)
        return None
    if asked.experimental_rerun is not None:
        raise InputError("--experimental-rerun is not accepted; the same command line again is")
    flags = list(arguments)
    for argument in asked.overrides:
        flags.remove(argument)
    if asked.shell_completion:
        return Line(asked, [*flags, *asked.overrides], [], [], False)
    overrides = [_checked(command, argument) for argument in asked.overrides]
    _check_no_tune(overrides)
    config = _composed(command, asked, [o for o in overrides if not o.is_sweep_override() and not _of_format(o)])
    sweeps = asked.multirun or config.hydra.mode == RunMode.MULTIRUN
    if sweeps and command.no_sweep:
        raise InputError(command.no_sweep)
    named = (config.hydra.sweeper.get("params") or {}) if sweeps else {}
    params = [_checked(command, f"{key}={value}") for key, value in named.items()]
    line = Line(asked, flags, overrides, params, sweeps)
    settled = plain(config)
    for key in keys.leaves({name: value for name, value in settled.items() if name != GROUP}):
        if key not in command.keys:
            raise InputError(keys.unknown(key, command.keys))
    _check_no_tune([*overrides, *params])
    if sweeps:
        _check_choices(command, line, command.groups)
    else:
        for override in overrides:
            _check_single(command, override)
    if line.runs and not any(o.key_or_group == GROUP for o in [*overrides, *params]) and GROUP not in settled:
        _check_format_is_needed(settled)
    if not sweeps:
        command.check(settled)
    return line


def _check_format_is_needed(config: dict) -> None:
    """Raises InputError where no format is chosen, unless it is a plan of all of them."""
    if config.get("sweep") is not True and config.get("paper") is not True:
        raise InputError(NO_FORMAT)


def _flags(arguments: list[str]) -> Namespace:
    """Hydra's own flags, in any order with what is overridden. Raises InputError."""
    parser: ArgumentParser = get_args_parser()
    known = [flag for action in parser._actions for flag in action.option_strings]

    def refuse(message: str) -> None:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        near = get_close_matches(unknown[1], [*known, "--formats"], 1) if unknown else []
        told = f"{unknown[1]} is unknown" if unknown else message
        raise InputError(f"{told}; did you mean {near[0]}?" if near else f"{told}; accepted: {', '.join(known)}")

    parser.error = refuse  # type: ignore[assignment,method-assign]
    return parser.parse_intermixed_args(arguments)


def _checked(command: Command, argument: str) -> Override:
    """An argument `key=value` as Hydra is to have it. Raises InputError for a key that is unknown, however it is spelled,
    and for a value that is not accepted, unless it is one of several, which is for the run to tell."""
    before, equals, value = argument.partition("=")
    if (accepted := command.keys.get(before.lstrip("+"))) and accepted.text:
        argument = f"{before}{equals}{_as_text(value)}"
    found = _parsed(command, argument)
    key = found.key_or_group
    name = f"{key}@{found.package}" if found.package is not None else key
    if re.match(r"hydra\b", key):
        return found
    if key.partition("/")[0] in command.added and name == key:  # a named sweep may have a group of its own
        if not found.is_add():
            raise InputError(f"{key}: it has no default to override; accepted: +{key}=NAME")
        return found
    if key.startswith(f"{GROUP}."):
        return _parsed(command, f"++{argument.lstrip('+')}") if not found.is_delete() else found
    if name not in {*command.keys, *command.groups}:
        raise InputError(keys.unknown(name, command.keys))
    if found.is_delete():
        raise InputError(f"~{key}: a key cannot be left out; accepted: {key}=VALUE")
    found = _parsed(command, argument.lstrip("+"))  # what is there is changed, whoever would add it
    if key in command.groups:
        return found
    told = found.value()
    if not found.is_sweep_override() and not (isinstance(told, str) and "${" in told):
        command.keys[key].check(key, told)
    return found


def _parsed(command: Command, argument: str) -> Override:
    """Raises InputError."""
    try:
        return _parser.parse_override(argument)
    except Exception as error:  # of ANTLR's and Python's, for numbers of 5,000 digits or as many brackets
        key, equals, value = argument.partition("=")
        name = key.lstrip("+~")
        accepted = command.keys.get(name)
        if accepted and not accepted.text:
            accepted.check(name, value)
        if accepted or re.fullmatch(rf"(hydra|{GROUP})\.[\w.]+", name):
            short = len(value) < 1000 and value.isprintable()
            typed = shlex.quote(f"{key}={quoted(value)}") if short else "the same in quotes"
            raise InputError(f"{name}: {shown(value)} is no text to Hydra without quotes; accepted: {typed}") from error
        if equals and re.fullmatch(r"[\w./@:-]+", name):
            raise InputError(keys.unknown(name, command.keys)) from error
        raise InputError(f"{shown(argument)} is no key=value; accepted: such as +{GROUP}=nf4, block=64") from error


def _as_text(value: str) -> str:
    """A value, or several, with quotes about what Hydra would take for a number."""
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
    """A text as Hydra's grammar takes any."""
    return QuotedString(value, Quote.single if '"' in value else Quote.double).with_quotes()


def text_of(value: str) -> str:
    """What a value stands for that may be in quotes."""
    try:
        found = _parser.parse_rule(value, "value")
    except (HydraException, ValueError, RecursionError):  # no text in quotes, whatever else it is
        return value
    return found.text if isinstance(found, QuotedString) else value


def _check_single(command: Command, override: Override) -> None:
    """Raises InputError for several values, where one run was asked for."""
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


def _check_no_tune(overrides: Iterable[Override]) -> None:
    """Raises InputError for keys of a fine-tune where there is none."""
    chosen = [name for override in overrides if override.key_or_group == "tune" for name in _values(override)]
    for override in overrides if "none" in chosen else ():
        if override.key_or_group.startswith("tune."):
            raise InputError(f"{override.key_or_group}: tune=none takes no such key; accepted: with another tune")


def _check_choices(command: Command, line: Line, groups: Iterable[str]) -> None:
    """Raise what Hydra would at the run that needs it, for one of several choices of a group."""
    for override in [*line.overrides, *line.params]:
        if override.is_choice_sweep() and override.key_or_group in groups:
            prefix = "+" if override.is_add() else ""
            for name in _values(override):
                _composed(command, line.asked, [_parser.parse_override(f"{prefix}{override.key_or_group}={name}")])


def _values(override: Override) -> list[str]:
    """The choices of a group that an argument names."""
    value = override.value()
    return [str(name) for name in (value.list if isinstance(value, ChoiceSweep) else [value])]


def _of_format(override: Override) -> bool:
    return override.key_or_group.partition(".")[0] == GROUP


def _composed(command: Command, asked: Namespace, overrides: Iterable[Override]) -> DictConfig:
    """The configuration, Hydra's own part included. Raises Hydra's exceptions."""
    also = [os.path.abspath(asked.config_dir)] if asked.config_dir else []
    folder = os.path.abspath(asked.config_path) if asked.config_path else str(command.folder)
    with initialize_config_dir(folder, version_base="1.3", job_name=command.module):
        told = [*command.searched(*also), *(str(override.input_line) for override in overrides)]
        return compose(asked.config_name or command.config, told, return_hydra_config=True)


def plain(config: DictConfig) -> dict:
    """The resolved config, without Hydra's own part, in which `format` is what `formats.get` takes.

    The target is what `custom` stands for, and nothing to the other formats of a sweep.
    """
    names = [str(key) for key in config if key != "hydra"]
    found: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, names), resolve=True)
    if isinstance(found.get(GROUP), dict):
        found[GROUP].pop("target", None)
    return found


def one_line(error: Exception) -> str:
    """Hydra's message of several lines, as one that names the input and what is accepted."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        if group == GROUP:
            from .format_group import unknown

            return unknown(name)
        extra = LAUNCHERS.get(name) if group == "hydra/launcher" else None
        brings = f"; {install(extra)} brings it" if extra else ""
        return f"{group}: {name!r} is unknown; accepted: {', '.join(error.options)}{brings}"
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith("full_key"))


def show_help(command: Command) -> None:
    """Print every key with what it means, its default and what it accepts."""
    told = OmegaConf.load(command.folder / f"{command.config}.yaml").hydra.help
    explained = help_page.read(command.folder / f"{command.config}.yaml")
    for group, file in command.groups.items():
        explained |= help_page.read(file, f"{group}.")
    chosen = {f"+{GROUP}": ("", "the format, which has no default", "a name that python -m qbench --formats lists")}
    if "experiments" in command.added:
        names = ", ".join(sorted(file.stem for file in EXPERIMENTS.glob("*.yaml")))
        chosen["+experiments"] = ("", "a named sweep", names)
    for group, file in command.groups.items():
        names = ", ".join(sorted(other.stem for other in file.parent.glob("*.yaml")))
        if names != file.stem:
            chosen[group] = (file.stem, "the fine-tune: what its keys are where nothing is said", names)
    help_page.show(told.header, chosen, explained, command.keys, told.footer)


def _check_run(config: dict) -> None:
    from qbench import settings
    from qbench.runs import trackers

    settings.parts(config)
    trackers.checked(config["track"])


def _check_values(table: Mapping[str, keys.Accepted]) -> Check:
    return lambda config: keys.check(table, keys.leaves({k: v for k, v in config.items() if k != GROUP}))


RUN = Command(
    "qbench",
    CONF,
    "config",
    keys.RUN,
    {
        name: CONF / name / ("lora.yaml" if name == "tune" else "default.yaml")
        for name in ("model", "data", "tune", "eval")
    },
    (GROUP, "experiments"),
    check=_check_run,
)
QUANTIZE = Command(
    "qbench.quantize",
    CONF,
    "quantize",
    keys.QUANTIZE,
    no_sweep="--multirun is not accepted; one checkpoint at a time is",
    check=_check_values(keys.QUANTIZE),
)
PLAN = Command(
    "qbench.plan",
    CONF / "plan",  # beside the group `model`, Hydra would take `model=` for a choice of that
    "config",
    keys.PLAN,
    no_sweep="--multirun: a plan is one at a time; accepted: sweep=true, which compares formats",
    check=_check_values(keys.PLAN),
)
