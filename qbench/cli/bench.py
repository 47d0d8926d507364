"""python -m qbench.bench COMMAND: how fast the kernels and a training step are, beside their peers in the same run."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

import formats
from qbench.bench import compiled, page, products, step, tiles
from qbench.errors import InputError
from qbench.ops import choices
from qbench.results.json_files import write_json
from qbench.system import messages
from qbench.system.extras import install

console = Console()


def run_products(arguments: argparse.Namespace) -> None:
    """the product with a packed weight, forward and backward: formats × rows × the layers of Llama"""
    device = _device(arguments.device)
    cuda = device.type == "cuda"
    plan = products.Plan(
        formats=tuple(arguments.formats or (_quantized() if cuda else ["nf4"])),
        models=tuple(arguments.models or (["7B", "70B"] if cuda else ["7B"])),
        rows=tuple(arguments.rows or (products.ROWS if cuda else (1, 16, 128, 512))),
        block=arguments.block,
        repeats=arguments.repeats,
    )
    folder = arguments.out
    with _progress(plan.steps()) as advance:

        def found(result: dict, words: str) -> None:
            write_json(folder / "products.json", result)
            advance(words)

        result = products.measure(plan, device, found)
    page.write(result, folder)
    console.print("\n".join(page.answer(result)))
    console.print(f"{folder}: products.json, products.md, products.png")


def run_step(arguments: argparse.Namespace) -> None:
    """a QLoRA training step, beside PEFT with bitsandbytes"""
    _needs("bitsandbytes", install("bnb"))
    device = _device(arguments.device)
    with _progress(2 * (arguments.steps + 1)) as advance:
        result = step.measure(device, arguments.steps, advance)
    write_json(arguments.out / "step.json", result)
    console.print("\n".join(step.answer(result)))
    console.print(f"{arguments.out}: step.json")


def run_tune(arguments: argparse.Namespace) -> None:
    """measure the best path and tiles for this GPU, and keep them for every later run"""
    _needs("triton", "pip install triton")
    device = _device("auto")
    if device.type != "cuda":
        raise InputError("tune: there is no GPU here that PyTorch can use")
    with _progress(len(products.OPS) * len(tiles.ROWS)) as advance:
        result = tiles.tune(device, tuple(arguments.models or ["7B", "70B"]), advance)
    file = arguments.out or choices.tuned_file(torch.cuda.get_device_name(device))
    write_json(file, result)
    for op in products.OPS:
        for rule in result["choices"][op]:
            rows = "M beyond" if rule["up_to"] is None else f"M ≤ {rule['up_to']}"
            console.print(f"{op:<10} {rows:<10}", {k: v for k, v in rule.items() if k != "up_to"})
    console.print(
        f"{file} holds the choices" + (f"; QBENCH_TUNED={file} makes runs take them" if arguments.out else "")
    )


def run_compile(arguments: argparse.Namespace) -> None:
    """registers, spills, shared memory and instructions a weight of every kernel; needs no GPU"""
    _needs("triton", "pip install triton")
    capabilities = arguments.capability or list(compiled.DEVICES)
    with _progress(sum(len(compiled.configurations(capability)) for capability in capabilities)) as advance:
        found = compiled.compile_all(capabilities, advance)
    if arguments.out:
        write_json(arguments.out, [asdict(one) for one in found])
    table = Table(
        Column("kernel", no_wrap=True), "sm", "registers", "spills", "KiB shared", "instr. a weight", box=None
    )
    for one in found:
        cells = one.registers, one.spills, f"{one.shared / 1024:.1f}", f"{one.instructions:.2f}"
        table.add_row(one.name, str(one.capability), *map(str, cells))
    console.print(table)


def _quantized() -> list[str]:
    return [name for name in formats.names() if name != "none"]


def _device(name: str) -> torch.device:
    """Raises InputError for a device that is not there."""
    there = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    if name not in ("auto", *there):
        raise InputError(f"--device: {name!r} is not here; accepted: auto, {', '.join(there)}")
    return torch.device(there[-1] if name == "auto" else name)


@contextmanager
def _progress(total: int) -> Iterator[Callable[..., None]]:
    columns = BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        yield lambda words="": progress.update(task, advance=1, description=words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qbench.bench", description=__doc__.partition(": ")[2])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        added = commands.add_parser(run.__name__.removeprefix("run_"), help=run.__doc__, description=run.__doc__)
        added.set_defaults(run=run)
        return added

    of_products = command(run_products)
    of_products.add_argument("--formats", nargs="+", choices=_quantized(), help="default: all; on a CPU nf4")
    of_products.add_argument("--models", nargs="+", choices=list(products.SHAPES), help="default: 7B 70B; on a CPU 7B")
    of_products.add_argument("--rows", nargs="+", type=int, metavar="M", help="numbers of rows of x")
    of_products.add_argument("--block", type=int, default=64)
    of_products.add_argument("--repeats", type=int, default=10, help="samples of each time")
    of_step = command(run_step)
    of_step.add_argument("--steps", type=int, default=5, help="steps to time")
    for one in of_products, of_step:
        one.add_argument("--device", default="auto", help="auto, cpu or cuda")
        one.add_argument(
            "--out", type=Path, default=Path("runs/bench"), help="folder for results (default: %(default)s)"
        )
    of_tune = command(run_tune)
    of_tune.add_argument("--models", nargs="+", choices=list(products.SHAPES), help="whose layers (default: 7B 70B)")
    of_tune.add_argument("--out", type=Path, help="file for the choices (default: in the package)")
    of_compile = command(run_compile)
    of_compile.add_argument("--capability", nargs="+", type=int, choices=list(compiled.DEVICES), help="default: all")
    of_compile.add_argument("--out", type=Path, help="JSON file for the figures")
    return parser


def _needs(module: str, how: str) -> None:
    if find_spec(module) is None:
        raise InputError(f"{module} is not installed; {how} brings it")


def main() -> int:
    messages.printable()
    arguments = _parser().parse_args()
    try:
        arguments.run(arguments)
    except InputError as error:
        print(f"qbench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qbench: interrupted", file=sys.stderr)
        return 130
    return 0
