"""Let Hydra compose a command's files and overrides into one configuration, as plain data.

The arguments of a format have one source: the block `format` of a composed config, which is what `formats.get` takes,
{name, block, dq, options…}. `format.block` and `format.dq` only point at the keys `block` and `dq` that a user types, so
that the block is complete by itself. Other forms derive from it:

    Format.arguments           the same, kept by `formats.get` on the format that it makes
    Recipe.arguments           the same, of a packed checkpoint; its config.json stores the options separately
    config of a result.json    format.name and source, and block and dq as the format took them (`Settings.plain`)
"""

import os
from argparse import Namespace
from collections.abc import Iterable
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.types import Override
from hydra.errors import MissingConfigException
from omegaconf import DictConfig, OmegaConf

from qbench.system.extras import install_command

from .commands import GROUP, Command
from .config_files import EXPERIMENTS
from .overrides import quoted

#: Hydra's launchers, and the extra that installs each
LAUNCHERS = {"joblib": "joblib", "submitit_local": "slurm", "submitit_slurm": "slurm", "ray": "ray"}


def compose_config(command: Command, flags: Namespace, overrides: Iterable[Override]) -> DictConfig:
    """Returns the configuration, including Hydra's own part. Raises Hydra's exceptions."""
    folders = [os.path.abspath(flags.config_dir)] if flags.config_dir else []
    main_folder = os.path.abspath(flags.config_path) if flags.config_path else str(command.folder)
    with initialize_config_dir(main_folder, version_base="1.3", job_name=command.name):
        lines = [*search_path(command, *folders), *command.first_overrides]
        lines += [str(override.input_line) for override in overrides]
        return compose(flags.config_name or command.config, lines, return_hydra_config=True)


def search_path(command: Command, *folders: str) -> list[str]:
    """The override that makes Hydra look for configurations in `folders` and in experiments/ too."""
    paths = [*folders, *([str(EXPERIMENTS.parent)] if "experiments" in command.added else [])]
    return [f"hydra.searchpath=[{','.join(quoted(f'file://{path}') for path in paths)}]"] if paths else []


def resolve(config: DictConfig) -> dict:
    """Returns the config as plain data, without Hydra's own part; `format` holds the arguments of `formats.get`."""
    names = [str(key) for key in config if key != "hydra"]
    resolved: Any = OmegaConf.to_container(OmegaConf.masked_copy(config, names), resolve=True)
    if isinstance(resolved.get(GROUP), dict):
        resolved[GROUP].pop("target", None)  # +format=custom has it as its name too; other formats ignore it
    return resolved


def describe_error(error: Exception) -> str:
    """Returns Hydra's message as one line that names the input and what is accepted."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        if group == GROUP:
            from .format_group import unknown

            return unknown(name)
        extra = LAUNCHERS.get(name) if group == "hydra/launcher" else None
        brings = f"; {install_command(extra)} brings it" if extra else ""
        return f"{group}: {name!r} is unknown; accepted: {', '.join(error.options)}{brings}"
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith("full_key"))
