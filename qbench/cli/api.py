"""`qbench.run`: one experiment from Python, as `python -m qbench` runs it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra import compose as compose_files
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from formats import Format
from qbench import keys
from qbench.errors import InputError
from qbench.report.run import answer, tables
from qbench.report.wording import escape_markdown, recipe_name
from qbench.runs import experiment
from qbench.runs import trackers as trackers

from . import commands, compose, format_group, jobs

Keys = Mapping[str, Any]


class Result(dict[str, Any]):
    """The result of a run: the content of its result.json, whose keys docs/result.md explains.

    folder: the folder of the run, with result.json, report.md, its figures, and the adapters. A notebook shows a result as
    its findings in words and a table of scores.
    """

    def __init__(self, content: Keys, folder: Path):
        super().__init__(content)
        self.folder = folder

    @property
    def metrics(self) -> dict[str, Any]:
        """error, bits, memory, throughput and quality, as result.json has them."""
        return self["metrics"]

    @property
    def answer(self) -> list[str]:
        """The findings, one sentence each."""
        return answer.describe_run(self)

    def __repr__(self) -> str:
        return f"<Result of {recipe_name(self['config'])} in {self.folder}>"

    def _repr_markdown_(self) -> str:
        lines = [f"{escape_markdown(sentence)}  " for sentence in self.answer]
        for table in filter(None, (tables.scores_table(self), tables.tasks_table(self))):
            lines += ["", *table.to_markdown(), "", table.note]
        return "\n".join(lines)


def run(
    format: str | Format = "nf4",
    block: int = 64,
    dq: bool = False,
    *,
    model: str | Path | Keys | None = None,
    data: str | Path | Keys | None = None,
    tune: str | Keys | None = "lora",
    eval: Keys | None = None,
    seed: int = 0,
    device: str = "auto",
    track: str | Sequence[str] = (),
    out: str | Path | None = None,
) -> Result:
    """Run one experiment in this process, with the keys and defaults of `python -m qbench +format=… block=…`.

    format: a name, or a `Format`, whose own block and dq are then used. model: a folder or a hub id, None for the bundled
    model; or `model.*` keys. data: a text file or the name of a bundled text; or `data.*` keys. tune: a name in conf/tune,
    None for no fine-tune; or `tune.*` keys, which change the defaults of their `method`. eval: `eval.*` keys.
    track: names in `qbench.runs.trackers.NAMES`.
    out: the folder to write into; by default the one under runs/ that the command line uses for the same run. If it
    holds the finished result of this run, that is returned.

    Returns the result. Bad input raises InputError with a message of one line, and leaves no folder. Other errors are
    recorded in result.json and raised again.

        result = qbench.run(format="nf4", block=64, dq=True, tune={"steps": 100, "lr": 3e-4})
        result.metrics["quality"]["tuned"]["perplexity"]
    """
    given: dict[str, Any] = {"model": _keys(model), "data": _keys(data), "eval": dict(eval or {}), "tune": {}}
    if isinstance(tune, Mapping):
        given["tune"] = {key: value for key, value in tune.items() if key != "method"}
        method = tune.get("method", "lora")
    else:
        method = tune
    name = "none" if isinstance(format, Format) else format
    config = _composed(name, method or "none", {"block": block, "dq": dq, "seed": seed, "device": device, **given})
    chosen = format if isinstance(format, Format) else format_group.format_of(config)
    settings = jobs.settings_of(config, chosen)
    names = trackers.checked(track)
    if out is None:
        digits = jobs.short_hash(config if isinstance(format, str) else {**config, "format": repr(format)})
        out = jobs.RUNS / f"{chosen.name}_block{chosen.block}_dq-{chosen.dq}_seed{seed}_{digits}"
    return Result(experiment.run(settings, Path(out), trackers=names), Path(out))


def _keys(given: str | Path | Keys | None) -> dict[str, Any]:
    """The keys of `model` or `data`. A text or a path is the value of `path`."""
    if isinstance(given, Mapping):
        return dict(given)
    return {} if given is None else {"path": str(given)}


def _composed(format: str, tune: str, given: Keys) -> dict[str, Any]:
    """The configuration that a command line with these values gives. Raises InputError."""
    for key in keys.leaves(given):
        if key not in keys.RUN:
            raise InputError(keys.unknown(key, keys.RUN))
    format_group.store()
    try:
        with initialize_config_dir(str(commands.CONF), version_base="1.3"):
            config = compose_files("config", [f"+format={format}", f"tune={tune}"])
        config.merge_with(OmegaConf.create(dict(given)))
        return compose.resolve(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(compose.describe_error(error)) from error
