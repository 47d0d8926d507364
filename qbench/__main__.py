"""python -m qbench +format=nf4 block=64: where Hydra ends and typed arguments begin."""

import logging
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

import formats
from qbench.errors import InputError

HERE = Path(__file__).parent
CONF = HERE / "conf" if (HERE / "conf").is_dir() else HERE.parent / "conf"
stderr = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def settings_of(config: DictConfig):
    """The typed settings of a resolved config. Raises InputError."""
    plain = OmegaConf.to_container(config, resolve=True)
    recipe = plain.get("format")
    if not isinstance(recipe, dict):
        raise InputError(f"format: none is given; accepted: {', '.join('+format=' + name for name in choices())}")
    try:
        fmt = formats.get(**recipe)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"format: {error.args[0]}") from error
    from qbench.settings import DataSettings, EvalSettings, ModelSettings, Settings
    from qbench.tune import TuneSettings

    tune = plain["tune"]
    return Settings(
        format=fmt,
        model=ModelSettings(**plain["model"]),
        data=DataSettings(**plain["data"]),
        tune=None if tune["method"] == "none" else TuneSettings(**tune),
        eval=EvalSettings(**plain["eval"]),
        seed=plain["seed"],
        device=plain["device"],
    )


def choices() -> list[str]:
    """What +format= accepts."""
    return sorted(file.stem for file in (CONF / "format").glob("*.yaml"))


def main() -> int:
    """Run what the command line says. 0: done; 1: a run failed; 2: bad input; 130: interrupted."""
    codes = [0]

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def job(config: DictConfig) -> None:
        folder = Path(HydraConfig.get().runtime.output_dir)
        try:
            with stderr.status("starting"):  # transformers and PEFT take seconds to import
                settings = settings_of(config)
                from qbench.report import terminal
                from qbench.run import run
            result = run(settings, folder)
        except InputError as error:
            stderr.print(f"qbench: {error}")
            codes.append(2)
        except Exception as error:
            stderr.print(
                f"qbench: {type(error).__name__}: {error} (traceback in {os.path.relpath(folder)}/result.json)"
            )
            codes.append(1)
        else:
            terminal.show(result, folder)

    # PEFT imports bitsandbytes where it is installed, which then warns of kernels that nobody asked for
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing several lines of its own
    try:
        job()
    except (HydraException, OmegaConfBaseException) as error:
        stderr.print(f"qbench: {one_line(error)}")
        return 2
    except KeyboardInterrupt:
        stderr.print("qbench: interrupted; what was measured is in result.json")
        return 130
    return max(codes)


def one_line(error: Exception) -> str:
    """Hydra's message of several lines, as one that names the input and what is accepted."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{group}: {name!r} is unknown; accepted: {', '.join(error.options)}"
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith("full_key"))


if __name__ == "__main__":
    sys.exit(main())
