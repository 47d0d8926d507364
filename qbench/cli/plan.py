"""python -m qbench.plan model=llama-65b +format=nf4 dq=true gpu=48GB: will it fit, and what would make it?"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from qbench.errors import InputError
from qbench.system import messages
from qbench.system.interrupts import interruptible

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from qbench.plan.settings import PlanSettings

    from .commands import Check, Job


def main() -> int:
    """Print the plan that the command line asks for. 0: done, whether it fits or not; 2: bad input; 130: interrupted."""
    messages.printable()
    # PEFT would import it: 3 s; the stub does not know that None bars an import
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
    codes.clear()
    try:
        with interruptible():
            from . import command_line, commands  # Hydra, which takes a while to import

        return command_line.start(commands.PLAN, load) or max(codes, default=0)
    except KeyboardInterrupt:
        sys.stderr.write("qbench: interrupted\n")
        return 130


def load() -> tuple["Job", "Check"]:
    """The job, and what is known to be wrong before it."""
    from . import format_group

    format_group.store()
    return job, settings_of


codes: list[int] = []  #: what came of the job: 0 done, 2 bad input


def job(config: "DictConfig") -> None:
    """What Hydra runs; bad input is told here, for Hydra would add lines of its own."""
    from .compose import resolve
    from .console import stderr

    try:
        answer(resolve(config))
        codes.append(0)
    except InputError as error:
        stderr.print(f"qbench: {error}")
        codes.append(2)


def answer(asked: dict) -> None:
    """Count, print, and write what is asked for. Raises InputError."""
    from rich.console import Console

    from .console import stderr

    with interruptible(), stderr.status("counting"):  # transformers and PEFT take seconds to import
        from qbench.plan import advice, check, paper, wording
        from qbench.plan.count import count
        from qbench.plan.shapes import find
        from qbench.results.json_files import write_json

        content: list[dict] | dict
        if asked["paper"]:
            found = paper.compare()
            plans, content = [one.plan for one in found], paper.plain(found)
        elif asked["sweep"]:
            settings, blocks = settings_of(asked), tuple(asked["blocks"])
            plans = advice.sweep(find(asked["model"]), settings, blocks)
            content = [wording.plain(plan) for plan in plans]
        else:
            settings = settings_of(asked)
            shape, measured = find(asked["model"]), None
            plans = [count(shape, settings)]
            if asked["check"]:
                expected = check.comparable(shape, settings).needed
                measured = {"expected": expected, "measured": check.measure(shape, settings)}
            remedies = advice.changes(plans[0]) if not plans[0].fits else []
            content = wording.plain(plans[0]) | {"check": measured}
    console = Console(highlight=False, markup=False)
    if asked["paper"]:
        paper.show(found, console)
    elif asked["sweep"]:
        wording.show_sweep(plans, console)
    else:
        wording.show(plans[0], remedies, console)
        if measured:
            console.print(f"\n{wording.checked(settings, **measured)}")
    if asked["json"]:
        try:
            write_json(Path(asked["json"]), content)
        except OSError as error:
            raise InputError(f"json: {asked['json']!r} cannot be written: {error}") from error
    if asked["figure"]:
        from qbench.plan import figures

        figures.draw(plans, Path(asked["figure"]))
    written = [str(asked[key]) for key in ("json", "figure") if asked[key]]
    if written:
        console.print(f"\nWritten: {', '.join(written)}")


def settings_of(asked: dict) -> "PlanSettings":
    """The typed settings of a resolved config, without a format those of a sweep. Raises InputError."""
    from qbench.plan.settings import UNQUANTIZED, Dtypes, PlanSettings, size

    from .format_group import format_of

    names = set(PlanSettings.__dataclass_fields__) - {"format", "dtype", "gpu", "context", "targets"}
    targets = asked["targets"]
    return PlanSettings(
        format=UNQUANTIZED if asked["sweep"] or asked["paper"] else format_of(asked),
        dtype=Dtypes(**asked["dtype"]),
        gpu=None if asked["gpu"] is None else size("gpu", asked["gpu"]),
        context=None if asked["context"] is None else size("context", asked["context"]),
        targets=tuple(targets) if isinstance(targets, list) else targets,
        **{name: asked[name] for name in names},
    )
