"""The config group `format`, made from the registered formats: a format needs no configuration file.

`+format=nf4` sets name, block, dq and the options of NF4. `+format=custom format.target=my_module.MyFormat` names a class
that is not registered.
"""

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

import formats
from formats.contract import first_line
from qbench import keys
from qbench.errors import InputError
from qbench.keys import shown

from .commands import GROUP, NO_FORMAT

CUSTOM = "custom"
_PLAIN = bool | int | float | str | None  #: the types of option defaults that a config can hold


def choices() -> list[str]:
    """The names that +format= accepts."""
    return [*formats.names(), CUSTOM]


def unknown(name: str) -> str:
    """The message for a name that +format= does not accept."""
    problem = formats.problems().get(name)
    return f"format: {problem}" if problem else f"format: {shown(name)} is unknown; accepted: {', '.join(choices())}"


def store() -> None:
    """Register the group with Hydra. Its configs take any key, so that a format itself reports which it accepts."""
    for name in formats.names():
        entry = formats.find(name)
        plain = {key: value for key, value in entry.options.items() if isinstance(value, _PLAIN)}
        _store(name, {"name": name, "block": "${block}", "dq": "${dq}", **entry.cls.fixed, **plain})
    _store(CUSTOM, {"name": "${.target}", "target": None, "block": "${block}", "dq": "${dq}"})


def _store(name: str, content: dict) -> None:
    node = OmegaConf.create(content, flags={"struct": False})
    ConfigStore.instance().store(group=GROUP, name=name, node=node)


def format_of(config: dict) -> formats.Format:
    """Returns the format of a resolved config. Raises InputError."""
    recipe = config.get(GROUP)
    if not isinstance(recipe, dict):
        raise InputError(NO_FORMAT)
    if not isinstance(recipe.get("name"), str):
        problem = "none is given" if recipe.get("name") is None else f"{recipe['name']!r} names no class"
        raise InputError(f"format.target: {problem}; accepted: module.Class, such as my_module.MyFormat")
    keys.check(keys.RUN, {"block": recipe.get("block", 64), "dq": recipe.get("dq", False)})
    try:
        return formats.get(**recipe)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"format: {first_line(error)}") from error
