"""The commands with a Hydra configuration: their files, and the keys that they accept."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig

from qbench import keys
from qbench.errors import InputError

from .config_files import CONF

GROUP = "format"  #: the config group of the formats, whose choices are not files
NO_FORMAT = (
    f"{GROUP}: none is given; accepted: +{GROUP}=NAME, such as +{GROUP}=nf4; python -m qbench --formats lists the names"
)
Job = Callable[[DictConfig], object]
Check = Callable[[dict], object]  #: of a resolved config; raises InputError


@dataclass(frozen=True)
class Command:
    """A command with a Hydra configuration.

    name: what a user types, such as `qbench plan`.
    folder, config: the folder and the name of its main configuration file.
    keys: what each key accepts.
    groups: the config groups, each with the file that documents its keys.
    added: the groups without a default, typed with a plus.
    no_sweep: the message that refuses -m; None if the command takes it.
    check: checks a resolved config without its format, before PyTorch is imported. Raises InputError.
    overlay: the subfolder of a second configuration file, whose values replace those of the main one.
    translate: rewrites an argument in the spelling of the configuration. Raises InputError.
    hidden: keys that --help does not list.
    """

    name: str
    folder: Path
    config: str
    keys: Mapping[str, keys.Accepted]
    groups: Mapping[str, Path] = field(default_factory=dict)
    added: tuple[str, ...] = (GROUP,)
    no_sweep: str | None = None
    check: Check = lambda config: None
    overlay: str | None = None
    translate: Callable[[str], str] = str
    hidden: frozenset[str] = frozenset()

    @property
    def files(self) -> list[Path]:
        """The main configuration file, and the overlay if there is one."""
        main = self.folder / f"{self.config}.yaml"
        return [main] if self.overlay is None else [main, self.folder / self.overlay / "config.yaml"]

    @property
    def first_overrides(self) -> list[str]:
        """The override that adds the overlay."""
        return [] if self.overlay is None else [f"+{self.overlay}=config"]


def _check_run(config: dict) -> None:
    from qbench import settings
    from qbench.runs import trackers

    settings.parts(config)
    trackers.checked(config["track"])


def _check_values(table: Mapping[str, keys.Accepted]) -> Check:
    return lambda config: keys.check(table, keys.leaves({k: v for k, v in config.items() if k != GROUP}))


def _check_plan(config: dict) -> None:
    from qbench import settings

    _check_values(keys.PLAN)(config)
    settings.parts(config)


def _respell_plan(argument: str) -> str:
    """Rewrite an argument of a plan in the spelling of a run: `model=llama-65b` becomes `model.path=llama-65b`.

    Raises InputError for a key's old name.
    """
    key, equals, value = argument.partition("=")
    name = key.lstrip("+~")
    if name in keys.PLAN_RENAMED:
        new = keys.PLAN_RENAMED[name]
        shown = value if value.isprintable() and 0 < len(value) < 100 else "VALUE"
        raise InputError(f"plan: {name} is now {new}; type {new}={shown}")
    if name == "model" and equals and value not in {file.stem for file in (CONF / "model").glob("*.yaml")}:
        return f"model.path={value}"
    return argument


GROUPS = {
    name: CONF / name / ("lora.yaml" if name == "tune" else "default.yaml")
    for name in ("model", "data", "tune", "eval")
}
RUN = Command("qbench", CONF, "config", keys.RUN, GROUPS, (GROUP, "experiments"), check=_check_run)
QUANTIZE = Command(
    "qbench quantize",
    CONF,
    "quantize",
    keys.QUANTIZE,
    no_sweep="--multirun is not accepted; accepted: one checkpoint at a time",
    check=_check_values(keys.QUANTIZE),
)
PLAN = Command(
    "qbench plan",
    CONF,
    "config",
    keys.PLAN,
    GROUPS,
    (GROUP, "experiments"),
    no_sweep="--multirun: a plan takes no sweep; accepted: sweep=true, which compares formats",
    check=_check_plan,
    overlay="plan",
    translate=_respell_plan,
    hidden=frozenset(keys.RUN) - frozenset(keys.MEMORY_KEYS),
)
