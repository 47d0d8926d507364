"""The arguments of `report`, `bench` and `runs`. Nothing slow is imported.

The other commands take `key=value` (`command_line`). All commands have the same --help page, and refuse a mistake in one
line.
"""

import argparse
import re
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from qbench.errors import InputError
from qbench.system.version import VERSION

from .format_names import format_names

MODELS = ("7B", "70B", "tiny")  #: models whose layer shapes `bench` uses; see `products.SHAPES`
CAPABILITIES = ("80", "90", "100")  #: of the GPUs that `bench compile` compiles for; see `compiled.DEVICES`
BENCHMARKS = {
    "products": "the product with a packed weight, forward and backward: formats × rows × the layers of Llama",
    "step": "a QLoRA training step, compared with PEFT and bitsandbytes",
    "tune": "measure the best path and tiles for this GPU, and save them for later runs",
    "compile": "registers, spills, shared memory and instructions per weight of every kernel; needs no GPU",
}


class Parser(argparse.ArgumentParser):
    """An argparse parser with qbench's help page. A mistake raises InputError."""

    def __init__(self, program: str, purpose: str, *examples: str, footer: str = ""):
        super().__init__(prog=program, allow_abbrev=False)
        self.purpose, self.examples, self.footer = purpose, examples, footer
        self.rows: list[tuple[str, str, str]] = []
        self.add_argument("--version", action="version", version=f"{program} {VERSION}", help="print the version")

    def accept(self, name: str, meaning: str, accepts: str, shown: str = "", **options: Any) -> argparse.Action:
        """Add an argument. accepts: its values in words. shown: its default in words."""
        action = self.add_argument(name, help=meaning, **options)
        label = str(action.metavar or action.dest) if not action.option_strings else name
        default = f"={shown}" if shown or (action.nargs != 0 and action.option_strings) else ""
        self.rows.append((label + default, meaning, accepts))
        return action

    def print_help(self, file: Any = None) -> None:
        from . import help_page

        command = " ".join(self.prog.split()[:2])
        lines = [f"{self.prog}: {self.purpose}.", "", *(f"    python -m {command}{e}" for e in self.examples)]
        help_page.show("\n".join(lines), "argument=default", self.rows, self.footer)

    def error(self, message: str) -> NoReturn:
        known = [flag for action in self._actions for flag in action.option_strings]
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            near = get_close_matches(unknown[1], known, 1)
            accepted = f"did you mean {near[0]}?" if near else f"accepted: {', '.join(known)}"
            raise InputError(f"{unknown[1]} is unknown; {accepted}")
        if missing := re.match(r"the following arguments are required: (.*)", message):
            raise InputError(f"{missing[1]}: none is given; --help explains all")
        raise InputError(f"{message.removeprefix('argument ')}; --help explains all")


def integer(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is not accepted; an integer of at least 1 is")
    return int(text)


def name_type(names: Iterable[str]) -> Callable[[str], str]:
    """An argument type that accepts only `names`."""
    known = list(names)

    def check(text: str) -> str:
        if text not in known:
            raise ArgumentTypeError(f"{text!r} is unknown; accepted: {', '.join(known)}")
        return text

    check.choices = known  # type: ignore[attr-defined]  # for completion
    return check


def report_parser() -> Parser:
    parser = Parser(
        "qbench report",
        "compare finished runs: a page, its Markdown twin, and tables",
        " sweeps",
        " runs sweeps/quick-1a2b3c4d --out comparison",
        footer="A summary goes to standard output; report.html, report.md, results.parquet and results.csv go to --out.",
    )
    parser.accept(
        "paths", "results to compare", "result.json files, or folders above them", nargs="+", type=Path, metavar="PATH"
    )
    parser.accept("--out", "where to write", "a folder", "PATH/report", type=Path)
    return parser


def runs_parser() -> Parser:
    parser = Parser(
        "qbench runs",
        "list the folders of runs, and remove those without a finished result",
        "",
        " sweeps --clean",
        footer="A folder stays if a run is in progress there, or if it holds a file that no run writes.",
    )
    parser.accept("paths", "where to look", "folders of runs or sweeps", "runs", nargs="*", type=Path, metavar="PATH")
    parser.accept("--clean", "remove folders without a finished result, after asking", "", action="store_true")
    parser.accept("--archive", "copy all results below each path into PATH/results.jsonl.xz", "", action="store_true")
    parser.accept("--yes", "do not ask", "with --clean", action="store_true")
    return parser


def bench_parser(benchmark: str | None = None) -> Parser:
    """The parser of `qbench bench BENCHMARK`, or of `qbench bench` itself."""
    if benchmark is None:
        parser = Parser(
            "qbench bench",
            "time the kernels and a training step, and the same work in other libraries",
            " products --formats nf4 --rows 1 16",
            " step --help",
        )
        parser.add_argument("benchmark", metavar="BENCHMARK", type=name_type(BENCHMARKS))
        parser.rows += [
            (name, meaning, f"python -m qbench bench {name} --help") for name, meaning in BENCHMARKS.items()
        ]
        return parser
    parser = Parser(f"qbench bench {benchmark}", BENCHMARKS[benchmark], f" {benchmark}")
    models, names = ", ".join(MODELS), [name for name in format_names() if name != "none"]
    if benchmark == "products":
        parser.accept(
            "--formats", "formats to time", ", ".join(names), "all; on a CPU nf4", nargs="+", type=name_type(names)
        )
        parser.accept(
            "--models",
            "models whose layers are timed",
            models,
            "7B 70B; on a CPU 7B",
            nargs="+",
            type=name_type(MODELS),
        )
        parser.accept("--rows", "numbers of rows of x", "integers", "1 to 4096", nargs="+", type=integer)
        parser.accept("--block", "weights that share one scale", "an integer", "64", type=integer, default=64)
        parser.accept("--repeats", "measurements of each time", "an integer", "10", type=integer, default=10)
    if benchmark == "step":
        parser.accept("--steps", "steps to time", "an integer", "5", type=integer, default=5)
    if benchmark in ("products", "step"):
        parser.accept("--device", "where to run", "auto, cpu, cuda", "auto", default="auto")
        parser.accept("--out", "where to write", "a folder", "runs/bench", type=Path, default=Path("runs/bench"))
    if benchmark == "tune":
        parser.accept("--models", "models whose layers are timed", models, "7B 70B", nargs="+", type=name_type(MODELS))
        parser.accept("--out", "where to write the choices", "a file", "in the package", type=Path)
    if benchmark == "compile":
        kinds = ", ".join(CAPABILITIES)
        parser.accept(
            "--capability", "compute capabilities of the GPUs", kinds, "all", nargs="+", type=name_type(CAPABILITIES)
        )
        parser.accept("--out", "where to write the figures as JSON", "a file", "nowhere", type=Path)
    return parser


PARSERS: dict[str, Callable[[], Parser]] = {
    "qbench.cli.report": report_parser,
    "qbench.cli.runs": runs_parser,
    "qbench.cli.bench": bench_parser,
}


def parse(module: str, arguments: Sequence[str]) -> Namespace:
    """Parse the arguments of a command. Prints the help or the version if asked. Raises InputError for a mistake."""
    parser = PARSERS[module]()
    if module != "qbench.cli.bench":
        return parser.parse_args(arguments)
    benchmark = parser.parse_args(arguments[:1]).benchmark
    return argparse.Namespace(benchmark=benchmark, **vars(bench_parser(benchmark).parse_args(arguments[1:])))
