"""python -m qbench +format=nf4 block=64: one run, or with -m a sweep."""

import hashlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qbench.system import files, messages
from qbench.system.interrupts import interruptible

if TYPE_CHECKING:
    from .commands import Check, Job
    from .sweep import Outcome


def main() -> int:
    """Run what the command line says. Returns 0 if done, 1 if a run failed, 2 for bad input, 130 if interrupted."""
    messages.replace_unencodable()
    modules: dict[str, Any] = sys.modules
    modules.setdefault("bitsandbytes", None)  # PEFT's import of it takes 3 s, and starts CUDA before a run is forked
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking for a GPU must not start CUDA either
    outcomes: list[Outcome] = []
    sweep = None

    def load() -> tuple["Job", "Check"]:
        from qbench.checkpoint import location

        from . import format_group, jobs
        from . import sweep as sweep_module

        def check(config: dict) -> None:
            path = jobs.settings_of(config).model.path
            if not (path and location.is_hub_id(path)):  # a hub id may be a download, which is left to the run
                location.locate(path)

        format_group.store()
        sweep_module.outcomes = outcomes
        return jobs.job, check

    def announce(total: int | None) -> None:
        from . import jobs
        from .sweep import Progress

        jobs.progress = Progress(total)

    try:
        if "--formats" in sys.argv[1:]:
            from . import format_list

            return format_list.show()
        with interruptible():
            from . import command_line, commands, overrides  # Hydra, which takes a while to import

        sweep = sweep_folder(sys.argv[1:])
        settings = [f"hydra.sweep.dir={overrides.quoted(str(sweep))}"] if sweep else []
        with messages.redirect():
            if code := command_line.start(commands.RUN, load, settings, announce):
                return code
        if sweep and outcomes:
            return summary(sweep, outcomes)
        return max((outcome.code for outcome in outcomes), default=0)
    except KeyboardInterrupt:
        left = outcomes[-1].why if outcomes else "no run had begun"
        if sweep and sweep.is_dir():
            left = "what is done is kept; the same command goes on with the other runs"
        sys.stderr.write(f"qbench: interrupted; {left}\n")
        return 130
    finally:
        if sweep:
            files.remove_unused(sweep, {"multirun.yaml"})


def sweep_folder(arguments: list[str]) -> Path | None:
    """The folder of a sweep. The same command has the same folder, so that it resumes an interrupted sweep.

    None if the arguments ask for no sweep.
    """
    from .overrides import unquoted

    named = [argument.removeprefix("+experiments=") for argument in arguments if argument.startswith("+experiments=")]
    if not named and not {"-m", "--multirun"} & set(arguments):
        return None
    for argument in arguments:
        if argument.startswith("hydra.sweep.dir="):
            return Path(unquoted(argument.removeprefix("hydra.sweep.dir=")))
    decisive = sorted(
        a for a in arguments if "=" in a and not a.lstrip("+").startswith(("hydra", "timeout=", "track="))
    )
    return Path("sweeps") / f"{'-'.join(named) or 'sweep'}-{hashlib.sha256(repr(decisive).encode()).hexdigest()[:8]}"


def summary(folder: Path, outcomes: list["Outcome"]) -> int:
    """Print a table of the runs, how many are done, and why the others are not. Returns 0 if all are done, else 1."""
    from rich.console import Console

    from qbench.runs import baseline

    from . import jobs
    from .console import stderr
    from .sweep import show_table

    baseline.clear(folder / jobs.BASELINES)
    asked = {outcome.folder: outcome for outcome in outcomes}  # 16 bit is one run for all blocks
    missing = [outcome for outcome in asked.values() if outcome.code]
    show_table(list(asked.values()), Console(stderr=True, highlight=False, markup=False))
    stderr.print(f"\n{len(asked) - len(missing)} of {len(asked)} runs are done in {folder}")
    for outcome in missing:
        stderr.print(f"  {os.path.relpath(outcome.folder)}: {outcome.why}")
    if len(missing) < len(asked):
        stderr.print(f"python -m qbench report {folder} compares them")
    return 1 if missing else 0
