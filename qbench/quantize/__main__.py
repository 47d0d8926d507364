"""python -m qbench.quantize +format=nf4 dq=true model.path=FOLDER out=FOLDER2: where Hydra ends, and a person looks on."""

import os
import sys
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from qbench import groups, messages
from qbench.errors import InputError
from qbench.files import Busy
from qbench.groups import format_of
from qbench.jobs import CONF, INTERRUPTED, one_line, plain, stderr

AGAIN = "what is done is kept; the same command goes on from there"


def main() -> int:
    """Do what the command line says. 0: done; 1: failed; 2: bad input; 130: interrupted."""
    messages.printable()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing several lines of its own
    codes: list[int] = []

    def job(config: DictConfig) -> None:
        codes.append(attempt(plain(config)))  # what it raised, Hydra would speak of as well

    if {"-m", "--multirun"} & set(sys.argv):
        stderr.print("qbench: --multirun is not accepted; one checkpoint at a time is")
        return 2
    groups.store()
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name="quantize")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        stderr.print(f"qbench: {one_line(error)}")
        return 2
    return max(codes, default=0)


def attempt(config: dict) -> int:
    """Quantize what a configuration names. Returns the exit code."""
    try:
        quantize(config)
    except InputError as error:
        stderr.print(f"qbench: {error}")
        return 2
    except Busy as error:
        stderr.print(f"qbench: {error}")
        return 1
    except (OSError, MemoryError) as error:
        stderr.print(f"qbench: {str(error) or type(error).__name__}; {AGAIN}")
        return 1
    except KeyboardInterrupt:
        stderr.print(f"qbench: interrupted; {AGAIN}")
        return INTERRUPTED
    return 0


def quantize(config: dict) -> None:
    """Raises InputError, files.Busy, OSError."""
    fmt = format_of(config)
    if not isinstance(config["out"], str):
        raise InputError("out: none is given; accepted: a new or empty folder")
    out = Path(config["out"]).expanduser()
    with stderr.status("starting"):  # transformers takes seconds to import
        from qbench import checkpoint, shards
        from qbench.quantize import source, stream

        layout = checkpoint.layout_of(config["layout"])
        found = source.read(config["model"]["path"])
    recipe = layout.of(config["format"], found.dtypes)
    columns = [BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
    with Progress(TextColumn("quantize"), *columns, console=stderr, disable=not stderr.is_terminal) as progress:
        before = sum(spec.nbytes for spec in shards.merged(found.contents).values())
        task = progress.add_task("quantize", total=before)
        contents = stream.run(found, recipe, out, lambda n: progress.advance(task, n), stderr.print)
    after = sum(spec.nbytes for spec in shards.merged(contents).values())
    stderr.print(f"{out}: {len(found.layers)} layers in {fmt!r}, {decimal(before)} to {decimal(after)}")
    if sentence := messages.left_in_words(found.left):
        stderr.print(sentence)


if __name__ == "__main__":
    sys.exit(main())
