"""python -m qbench plan model=llama-65b +format=nf4 dq=true gpu=48GB: does it fit, and what would make it fit?

A plan takes the command line of a run, and a few keys of its own (conf/plan/config.yaml).
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from qbench.errors import InputError, byte_count
from qbench.settings import FULL, parts
from qbench.system.interrupts import interruptible

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from qbench.plan.count import Plan
    from qbench.plan.settings import PlanSettings
    from qbench.plan.shapes import Shape

    from .commands import Check, Job

DOES_NOT_FIT, BAD_INPUT = 1, 2  #: exit codes


def main() -> int:
    """Print the plan that the command line asks for.

    Returns 0 if the step fits or no gpu is given, 1 if it does not fit, 2 for bad input. Raises KeyboardInterrupt.
    """
    # None stops PEFT from importing it, which takes 3 s; the type stub does not allow None
    sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
    codes: list[int] = []

    def load() -> tuple["Job", "Check"]:
        from . import format_group

        format_group.store()
        return lambda config: codes.append(run_plan(config)), settings_of

    with interruptible():
        from . import command_line, commands  # Hydra, which takes a while to import

    return command_line.start(commands.PLAN, load) or max(codes, default=0)


def run_plan(config: "DictConfig") -> int:
    """Print the plan of a composed configuration. Returns the exit code.

    Bad input is reported here, because Hydra adds lines of its own to an exception.
    """
    from rich.console import Console

    from .compose import resolve
    from .console import stderr

    try:
        resolved, console = resolve(config), Console(highlight=False, markup=False)
        plans, content = print_answer(resolved, console)
        if files := write_files(resolved, plans, content):
            console.print(f"\nWritten: {', '.join(files)}")
    except InputError as error:
        stderr.print(f"qbench: {error}")
        return BAD_INPUT
    return 0 if resolved["paper"] or any(plan.fits for plan in plans) else DOES_NOT_FIT


def print_answer(config: dict, console: "Console") -> tuple[list["Plan"], list | dict]:
    """Count and print what a resolved config asks for. Returns the plans, and the content for `json=`.

    Raises InputError.
    """
    if config["paper"]:
        return print_paper(console)
    return print_sweep(config, console) if config["sweep"] else print_plan(config, console)


def print_paper(console: "Console") -> tuple[list["Plan"], list]:
    """Print the plans beside QLoRA's memory table."""
    with counting():
        from qbench.plan import paper

        comparisons = paper.compare_with_paper()
    paper.print_comparisons(comparisons, console)
    return [comparison.plan for comparison in comparisons], paper.to_json(comparisons)


def print_sweep(config: dict, console: "Console") -> tuple[list["Plan"], list]:
    """Print a comparison of every registered format. Raises InputError."""
    with counting():
        from qbench.plan import advice, wording

        shape = shape_of(config)
        plans = advice.compare_formats(shape, settings_of(config, shape), tuple(config["blocks"]))
    wording.print_sweep(plans, console)
    return plans, [wording.to_json(plan) for plan in plans]


def print_plan(config: dict, console: "Console") -> tuple[list["Plan"], dict]:
    """Print one plan, and with `check=true` the memory of a real step beside it. Raises InputError."""
    with counting():
        from qbench.plan import advice, check, wording
        from qbench.plan.count import count_memory

        shape = shape_of(config)
        settings, measured = settings_of(config, shape), None
        plan = count_memory(shape, settings)
        if config["check"]:
            expected = check.comparable_plan(shape, settings).needed
            measured = {"expected": expected, "measured": check.measure_step(shape, settings)}
        remedies = advice.find_remedies(plan) if not plan.fits else []
    wording.print_plan(plan, remedies, console)
    if measured:
        console.print(f"\n{wording.describe_check(settings, **measured)}")
    return [plan], wording.to_json(plan) | {"check": measured}


@contextmanager
def counting() -> Iterator[None]:
    """Show a status line, and let Ctrl-C end the block: importing transformers and PEFT takes seconds."""
    from .console import stderr

    with interruptible(), stderr.status("counting"):
        yield


def write_files(config: dict, plans: list["Plan"], content: list | dict) -> list[str]:
    """Write what `json=` and `figure=` ask for. Returns the names of the files. Raises InputError."""
    from qbench.results.json_files import write_json

    if config["json"]:
        try:
            write_json(Path(config["json"]), content)
        except OSError as error:
            raise InputError(f"json: {config['json']!r} cannot be written: {error}") from error
    if config["figure"]:
        from qbench.plan import figures

        figures.draw_plans(plans, Path(config["figure"]))
    return [str(config[key]) for key in ("json", "figure") if config[key]]


def shape_of(config: dict) -> "Shape":
    """The model that a resolved config names, without its weights. Raises InputError."""
    from qbench.plan.shapes import find_shape

    model = config["model"]
    return find_shape(model["path"], model["revision"], model["trust_remote_code"])


def settings_of(config: dict, shape: "Shape | None" = None) -> "PlanSettings":
    """The settings of a plan, from a resolved config. A comparison of formats needs no format. Raises InputError.

    shape: sets `data.seq=auto`, and the number of windows scored at once with tune=none. Without it, the settings are only
    checked.
    """
    from qbench.plan.settings import UNQUANTIZED, Dtypes, PlanSettings

    from .format_group import format_of

    tune, seq, targets = parts(config)["tune"], config["data"]["seq"], config["targets"]
    seq = shape.pick_seq(seq) if shape else 256 if seq == "auto" else seq
    device = "cpu" if config["device"] == "cpu" else "cuda"
    if tune:
        training = {name: value for name, value in vars(tune).items() if name in PlanSettings.__dataclass_fields__}
    else:
        training = {"method": "none", "batch": shape.windows_scored_at_once(seq) if shape else 1}
    return PlanSettings(
        format=UNQUANTIZED if config["sweep"] or config["paper"] else format_of(config),
        seq=seq,
        device=device,
        dtype=Dtypes(**config["dtype"] | {"compute": compute_dtype(config, device)}),
        targets=tuple(targets) if isinstance(targets, list) else targets,
        attention=config["attention"],
        gpu=None if config["gpu"] is None else byte_count("gpu", config["gpu"]),
        context=None if config["context"] is None else byte_count("context", config["context"], 0),
        fragmentation=config["fragmentation"],
        **training,
    )


def compute_dtype(config: dict, device: str) -> str:
    """`dtype.compute` of a resolved config. If it is null, the dtype that a run uses: fp32 for a full fine-tune."""
    import torch

    from qbench.model.devices import dtype_name, pick_dtype

    if config["dtype"]["compute"] is not None:
        return config["dtype"]["compute"]
    if config["tune"]["method"] == FULL:
        return "float32"
    return dtype_name(pick_dtype(config["model"]["dtype"], torch.device(device)))
