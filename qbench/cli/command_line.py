"""A command line is checked here before Hydra runs it, so a mistake is one line, before PyTorch is imported.

`python -m qbench`, `qbench quantize` and `qbench plan` call `start`. It checks keys and values (`overrides`), composes the
configuration (`compose`), and hands over to Hydra, which runs one job or a sweep and answers its own flags.
"""

import os
import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qbench import keys
from qbench.errors import InputError
from qbench.system.interrupts import interruptible
from qbench.system.version import VERSION

from . import help_page
from .commands import GROUP, NO_FORMAT, Check, Command, Job
from .compose import compose_config, describe_error, resolve, search_path
from .config_files import EXPERIMENTS, read_keys
from .console import stderr
from .overrides import check_no_tune, check_override, check_single, count_jobs, separate_choices


@dataclass(frozen=True)
class Line:
    """A command line that has passed the checks.

    asked: Hydra's flags, parsed. flags: the same flags as typed.
    overrides: the arguments key=value, spelled as Hydra needs them.
    params: the overrides of a named sweep. Hydra reads them from its file itself.
    sweeps: whether the line asks for a sweep.
    """

    asked: Namespace
    flags: list[str]
    overrides: list[Override]
    params: list[Override]
    sweeps: bool

    @property
    def jobs(self) -> int | None:
        """The number of runs. None if a sweeper other than Hydra's default picks them."""
        if any(override.key_or_group == "hydra/sweeper" for override in self.overrides):
            return None
        return count_jobs([*self.params, *self.overrides])

    @property
    def runs(self) -> bool:
        """Whether the line runs a job. Some flags only print something."""
        return not (self.asked.cfg or self.asked.info or self.asked.hydra_help or self.asked.shell_completion)


def start(
    command: Command,
    load: Callable[[], tuple[Job, Check]],
    settings: Sequence[str] = (),
    announce: Callable[[int | None], None] = lambda jobs: None,
) -> int:
    """Let Hydra run the command line in sys.argv.

    load: does the slow imports; returns the job and a check of the resolved config.
    settings: overrides that come before those of the command line.
    announce: called with the number of runs before the first begins.

    Returns 0 when Hydra is done, even if jobs failed; 1 if a folder cannot be written; 2 for bad input. Raises
    KeyboardInterrupt.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing several lines of its own
    try:
        line = read(command, sys.argv[1:])
        if line is None:
            return 0
        with interruptible():
            job, check = load()
        if line.runs and not line.sweeps:
            check(resolve(compose_config(command, line.asked, line.overrides)))
        _check_choices(command, line, [GROUP])
        announce(line.jobs)
        # flags last: --info takes an override that follows it for its own argument
        overrides = [*settings, *command.first_overrides, *(str(o.input_line) for o in line.overrides)]
        sys.argv[1:] = [*search_path(command), *overrides, *line.flags]
        hydra.main(version_base="1.3", config_path=str(command.folder), config_name=command.config)(job)()
    except InputError as error:
        stderr.print(f"qbench: {error}")
        return 2
    except (HydraException, OmegaConfBaseException) as error:
        stderr.print(f"qbench: {describe_error(error)}")
        return 2
    except OSError as error:  # Hydra could not create the folder of a run
        stderr.print(f"qbench: {error.filename}: {error.strerror}" if error.filename else f"qbench: {error}")
        return 1
    return 0


def read(command: Command, arguments: Sequence[str]) -> Line | None:
    """Check a command line as far as that is possible without PyTorch.

    Prints the help or the version and returns None if the line asks for it. Raises InputError and Hydra's exceptions.
    """
    if "--version" in arguments:
        print(f"{command.name} {VERSION}")
        return None
    asked = _parse_flags(list(arguments))
    if asked.help:
        show_help(command)
        return None
    if asked.experimental_rerun is not None:
        raise InputError("--experimental-rerun is not accepted; accepted: the same command line again")
    flags = list(arguments)
    for argument in asked.overrides:
        flags.remove(argument)
    if asked.shell_completion:
        return Line(asked, [*flags, *asked.overrides], [], [], False)
    overrides = [check_override(command, argument) for argument in asked.overrides]
    check_no_tune(overrides)
    config = compose_config(
        command, asked, [o for o in overrides if not o.is_sweep_override() and not _is_of_format(o)]
    )
    sweeps = asked.multirun or config.hydra.mode == RunMode.MULTIRUN
    if sweeps and command.no_sweep:
        raise InputError(command.no_sweep)
    named = (config.hydra.sweeper.get("params") or {}) if sweeps else {}
    params = [check_override(command, f"{key}={value}") for key, value in named.items()]
    line = Line(asked, flags, overrides, params, sweeps)
    resolved = resolve(config)
    for key in keys.leaves({name: value for name, value in resolved.items() if name != GROUP}):
        if key not in command.keys:
            raise InputError(keys.unknown(key, command.keys))
    check_no_tune([*overrides, *params])
    if sweeps:
        _check_choices(command, line, command.groups)
    else:
        for override in overrides:
            check_single(command, override)
    if line.runs and not any(o.key_or_group == GROUP for o in [*overrides, *params]) and GROUP not in resolved:
        _check_format_is_chosen(resolved)
    if not sweeps:
        command.check(resolved)
    return line


def _check_format_is_chosen(config: dict) -> None:
    """Raise InputError if no format is chosen. A plan of all formats, or of the paper's table, needs none."""
    if config.get("sweep") is not True and config.get("paper") is not True:
        raise InputError(NO_FORMAT)


def _parse_flags(arguments: list[str]) -> Namespace:
    """Parse Hydra's own flags, which may stand anywhere between overrides. Raises InputError."""
    parser: ArgumentParser = get_args_parser()
    known = [flag for action in parser._actions for flag in action.option_strings]

    def refuse(message: str) -> None:
        unknown = re.match(r"unrecognized arguments: (\S+)", message)
        near = get_close_matches(unknown[1], [*known, "--formats"], 1) if unknown else []
        problem = f"{unknown[1]} is unknown" if unknown else message
        raise InputError(f"{problem}; did you mean {near[0]}?" if near else f"{problem}; accepted: {', '.join(known)}")

    parser.error = refuse  # type: ignore[assignment,method-assign]
    return parser.parse_intermixed_args(arguments)


def _check_choices(command: Command, line: Line, groups: Iterable[str]) -> None:
    """Compose each choice of a swept group, so that an unknown one is refused before the first run."""
    for override in [*line.overrides, *line.params]:
        if override.is_choice_sweep() and override.key_or_group in groups:
            for choice in separate_choices(override):
                compose_config(command, line.asked, [choice])


def _is_of_format(override: Override) -> bool:
    return override.key_or_group.partition(".")[0] == GROUP


def explain_keys(command: Command) -> dict[str, tuple[str, str]]:
    """Returns default and meaning of every key, from the comments in conf/."""
    meanings: dict[str, tuple[str, str]] = {}
    for file in command.files:
        meanings |= read_keys(file)
    for group, file in command.groups.items():
        meanings |= read_keys(file, f"{group}.")
    return meanings


def show_help(command: Command) -> None:
    """Print every key with its meaning, its default and what it accepts."""
    page = OmegaConf.load(command.files[-1]).hydra.help
    explained = explain_keys(command)
    rows = [(f"+{GROUP}=", "the format, which has no default", "a name that python -m qbench --formats lists")]
    if "experiments" in command.added and command.no_sweep is None:
        names = ", ".join(sorted(file.stem for file in EXPERIMENTS.glob("*.yaml")))
        rows.append(("+experiments=", "a named sweep", names))
    for group, file in command.groups.items():
        names = ", ".join(sorted(other.stem for other in file.parent.glob("*.yaml")))
        if names != file.stem:
            rows.append((f"{group}={file.stem}", "the fine-tune: the defaults of its keys", names))
    for name, accepts in command.keys.items():
        if name not in command.hidden:
            default, meaning = explained[name]
            rows.append((f"{name}={default}", meaning, accepts.words.rstrip(",")))
    help_page.show(page.header, "key=default", rows, page.footer)
