"""python -m qbench bench BENCHMARK: time the kernels and a training step, and the same work in other libraries."""

import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec

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
from qbench.system.extras import install_command

from .arguments import parse

console = Console()


def run_products(arguments: Namespace) -> None:
    """time products with a packed weight, forward and backward: formats × rows × layers of Llama"""
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

        def report(result: dict, description: str) -> None:
            write_json(folder / "products.json", result)
            advance(description)

        result = products.measure(plan, device, report)
    page.write(result, folder)
    console.print("\n".join(page.summarize(result)))
    console.print(f"{folder}: products.json, products.md, products.png")


def run_step(arguments: Namespace) -> None:
    """time a QLoRA training step, and one of PEFT with bitsandbytes"""
    _require("bitsandbytes", install_command("bnb"))
    device = _device(arguments.device)
    with _progress(2 * (arguments.steps + 1)) as advance:
        result = step.measure(device, arguments.steps, advance)
    write_json(arguments.out / "step.json", result)
    console.print("\n".join(step.summarize(result)))
    console.print(f"{arguments.out}: step.json")


def run_tune(arguments: Namespace) -> None:
    """find the fastest path and tile sizes for this GPU, and save them for later runs"""
    _require("triton", "pip install triton")
    device = _device("auto")
    if device.type != "cuda":
        raise InputError("tune: PyTorch finds no GPU; run it on a machine with one")
    with _progress(len(products.OPS) * len(tiles.ROWS)) as advance:
        result = tiles.tune(device, tuple(arguments.models or ["7B", "70B"]), advance)
    file = arguments.out or choices.tuned_file(torch.cuda.get_device_name(device))
    write_json(file, result)
    for op in products.OPS:
        for rule in result["choices"][op]:
            rows = "M beyond" if rule["up_to"] is None else f"M ≤ {rule['up_to']}"
            console.print(f"{op:<10} {rows:<10}", {k: v for k, v in rule.items() if k != "up_to"})
    console.print(f"choices written to {file}" + (f"; set QBENCH_TUNED={file} to use them" if arguments.out else ""))


def run_compile(arguments: Namespace) -> None:
    """count registers, spills, shared memory and instructions per weight of every kernel; needs no GPU"""
    _require("triton", "pip install triton")
    capabilities = list(map(int, arguments.capability or compiled.DEVICES))
    with _progress(sum(len(compiled.configurations(capability)) for capability in capabilities)) as advance:
        results = compiled.compile_all(capabilities, advance)
    if arguments.out:
        write_json(arguments.out, [asdict(kernel) for kernel in results])
    table = Table(
        Column("kernel", no_wrap=True), "sm", "registers", "spills", "KiB shared", "instr. per weight", box=None
    )
    for kernel in results:
        cells = kernel.registers, kernel.spills, f"{kernel.shared / 1024:.1f}", f"{kernel.instructions:.2f}"
        table.add_row(kernel.name, str(kernel.capability), *map(str, cells))
    console.print(table)


def _quantized() -> list[str]:
    return [name for name in formats.names() if name != "none"]


def _device(name: str) -> torch.device:
    """The device that --device names. Raises InputError if it is not available."""
    available = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    if name not in ("auto", *available):
        raise InputError(f"--device: {name!r} is not available; accepted: auto, {', '.join(available)}")
    return torch.device(available[-1] if name == "auto" else name)


@contextmanager
def _progress(total: int) -> Iterator[Callable[..., None]]:
    columns = BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total)
        yield lambda description="": progress.update(task, advance=1, description=description)


def _require(module: str, how: str) -> None:
    """Raises InputError if a module is not installed. how: the command that installs it."""
    if find_spec(module) is None:
        raise InputError(f"{module} is not installed; {how} brings it")


BENCHMARKS = {"products": run_products, "step": run_step, "tune": run_tune, "compile": run_compile}


def main() -> int:
    """Run the benchmark that the command line names. Returns 0 if done, 2 for bad input, 130 if interrupted."""
    messages.replace_unencodable()
    try:
        arguments = parse("qbench.cli.bench", sys.argv[1:])
        BENCHMARKS[arguments.benchmark](arguments)
    except InputError as error:
        print(f"qbench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qbench: interrupted", file=sys.stderr)
        return 130
    return 0
