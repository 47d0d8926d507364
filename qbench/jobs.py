"""What Hydra runs, once or for each point of a sweep, here or in another process."""

import atexit
import gc
import hashlib
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

import formats
from qbench.errors import InputError, RunTimeout

HERE = Path(__file__).parent
CONF = HERE / "conf" if (HERE / "conf").is_dir() else HERE.parent / "conf"
stderr = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def choices() -> list[str]:
    """What +format= accepts."""
    return sorted(file.stem for file in (CONF / "format").glob("*.yaml"))


def plain(config: DictConfig) -> dict:
    """The resolved config, without Hydra's own part."""
    keys = [key for key in config if key != "hydra"]
    return OmegaConf.to_container(OmegaConf.masked_copy(config, keys), resolve=True)


def config_hash(*, _root_: DictConfig) -> str:
    """`${config_hash:}` tells a configuration from others, in the name of its folder."""
    decisive = {key: value for key, value in plain(_root_).items() if key != "timeout"}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:8]


atexit.register(gc.unfreeze)  # what `job` froze is to be let go of at the end

OmegaConf.register_new_resolver("config_hash", config_hash, replace=True)


def settings_of(config: dict):
    """The typed settings of a resolved config. Raises InputError."""
    recipe = config.get("format")
    if not isinstance(recipe, dict):
        raise InputError(f"format: none is given; accepted: {', '.join('+format=' + name for name in choices())}")
    try:
        fmt = formats.get(**recipe)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"format: {error.args[0]}") from error
    from qbench.settings import DataSettings, EvalSettings, ModelSettings, Settings
    from qbench.tune import TuneSettings

    tune = config["tune"]
    return Settings(
        format=fmt,
        model=ModelSettings(**config["model"]),
        data=DataSettings(**config["data"]),
        tune=None if tune["method"] == "none" else TuneSettings(**tune),
        eval=EvalSettings(**config["eval"]),
        seed=config["seed"],
        device=config["device"],
    )


codes: list[int] = []  #: what came of the jobs of this process: 0 done, 1 failed, 2 bad input


def job(config: DictConfig) -> None:
    """One run, into the folder that Hydra names. In a sweep, whatever goes wrong is a result as well."""
    from qbench import record

    folder, config = Path(HydraConfig.get().runtime.output_dir), plain(config)
    sweep, started = HydraConfig.get().mode == RunMode.MULTIRUN, record.now()
    try:
        with stderr.status("starting"):  # transformers and PEFT take seconds to import
            with record.kept(folder, record.blank(config)) if sweep else nullcontext():
                settings = settings_of(config)
            from qbench.report import terminal
            from qbench.run import Busy, run
        gc.freeze()  # what the imports made will not go: looking through it would take as long as a small run
        with time_limit(config["timeout"]):
            result = run(settings, folder)
    except InputError as error:
        stderr.print(f"qbench: {error}")
        codes.append(2)
    except (Exception, RunTimeout) as error:
        if isinstance(error, Busy):
            stderr.print(f"qbench: {error}")
        else:
            where = f"{os.path.relpath(folder)}/result.json"
            stderr.print(f"qbench: {type(error).__name__}: {error} (traceback in {where})")
        codes.append(1)
    else:
        codes.append(0)
        if sweep:
            terminal.show_line(result, before=result["run"]["started"] < started)
        else:
            terminal.show(result, folder)
    finally:
        gc.collect()  # a failed run's model goes before the next comes


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Raise RunTimeout inside after so many seconds; None sets no limit."""
    if seconds is None:
        yield
        return

    def stop(*_) -> None:
        raise RunTimeout(f"the run took longer than timeout={seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
