"""python -m qbench quantize +format=nf4 dq=true model.path=FOLDER out=FOLDER2: pack a checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING

from qbench.errors import InputError
from qbench.system.interrupts import interruptible

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from formats import Format

    from .commands import Check, Job

AGAIN = "what is done is kept; the same command goes on from there"


def main() -> int:
    """Do what the command line says. Returns 0 if done, 1 if it failed, 2 for bad input, 130 if interrupted meanwhile.

    Raises KeyboardInterrupt before the work begins.
    """
    codes: list[int] = []

    def job(config: "DictConfig") -> None:
        codes.append(attempt(compose.resolve(config)))  # it raises nothing: Hydra would report that too

    def load() -> tuple["Job", "Check"]:
        from . import format_group

        format_group.store()
        return job, check

    with interruptible():
        from . import command_line, commands, compose  # Hydra, which takes a while to import

    return command_line.start(commands.QUANTIZE, load) or max(codes, default=0)


def check(config: dict) -> "Format":
    """Returns the format of a resolved config. Raises InputError, also if `out` is missing."""
    from .format_group import format_of

    fmt = format_of(config)
    if config["out"] is None:
        raise InputError("out: none is given; accepted: a new or empty folder")
    return fmt


def attempt(config: dict) -> int:
    """Quantize a checkpoint, and report errors. Returns the exit code."""
    from qbench.system.files import Busy

    from .console import INTERRUPTED, stderr

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
    """Quantize the checkpoint that a resolved config names. Raises InputError, files.Busy, OSError."""
    from rich.filesize import decimal
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from .console import stderr

    fmt = check(config)
    out = Path(config["out"]).expanduser()
    with interruptible(), stderr.status("starting"):  # transformers takes seconds to import
        from qbench.checkpoint import packed_checkpoint, safetensors_io
        from qbench.checkpoint.streaming import source, stream

        layout = packed_checkpoint.get_layout(config["layout"])
        checkpoint = source.read_source(config["model"]["path"])
    recipe = layout.of(config["format"], checkpoint.dtypes)
    columns = [BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()]
    with Progress(TextColumn("quantize"), *columns, console=stderr, disable=not stderr.is_terminal) as progress:
        before = sum(spec.nbytes for spec in safetensors_io.merge_specs(checkpoint.contents).values())
        task = progress.add_task("quantize", total=before)
        contents = stream.quantize_checkpoint(
            checkpoint, recipe, out, lambda n: progress.advance(task, n), stderr.print
        )
    after = sum(spec.nbytes for spec in safetensors_io.merge_specs(contents).values())
    stderr.print(f"{out}: {len(checkpoint.layers)} layers in {fmt!r}, {decimal(before)} to {decimal(after)}")
    if sentence := checkpoint.coverage.describe():
        stderr.print(sentence)
