"""One entry: every command has the same help, version and exit codes, however it is typed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import formats
import qbench
from qbench.bench import compiled, products
from qbench.cli import arguments, bench, main
from qbench.cli.format_names import format_names
from qbench.errors import InputError

ROOT = Path(__file__).parents[3]
CONSOLE = "import sys; from qbench.cli.main import main; sys.argv[0] = '/usr/bin/qbench'; sys.exit(main())"
OTHERS = [name for name in main.COMMANDS if name != "run"]


def typed(*line: str, folder: Path = ROOT) -> tuple[int, str, str]:
    """Run a command; returns exit code, standard output and standard error."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"}
    done = subprocess.run([sys.executable, *line], cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", OTHERS)
def test_help_is_the_same_however_a_command_is_typed(name):
    first, second = typed("-m", "qbench", name, "--help"), typed("-m", f"qbench.{name}", "--help")
    assert first == second and first[0] == 0 and not first[2]
    page = first[1]
    assert page.startswith(f"qbench {name}: ") and f"    python -m qbench {name}" in page and "what it accepts" in page
    console = typed("-c", CONSOLE, name, "--help")[1]
    assert f"    qbench {name}" in console and "python -m" not in console


def test_the_first_page_lists_the_commands_and_completion():
    code, page, _ = typed("-m", "qbench", "--help")
    assert code == 0 and all(f"python -m qbench {name} " in page for name in OTHERS)
    assert 'eval "$(register-python-argcomplete qbench)"' in page
    assert typed("-m", "qbench", "run", "--help")[1] == page


@pytest.mark.parametrize("name", OTHERS)
def test_versions_are_printed(name):
    assert typed("-m", "qbench", name, "--version") == (0, f"qbench {name} {qbench.__version__}\n", "")


WRONG = {
    "raport x": "qbench: 'raport' is not a command; did you mean report?",
    "nf4": "qbench: 'nf4' is not a command; accepted: run, report, plan, quantize, bench, runs, or key=value",
    "report": "qbench: PATH: none is given; --help explains all",
    "report sweeps --oot x": "qbench: --oot is unknown; did you mean --out?",
    "report nowhere": "qbench: nowhere does not exist",
    "runs nowhere": "qbench: nowhere is not a folder; accepted: folders of runs or sweeps",
    "runs --claen": "qbench: --claen is unknown; did you mean --clean?",
    "bench": "qbench: BENCHMARK: none is given; --help explains all",
    "bench product": "qbench: BENCHMARK: 'product' is unknown; accepted: products, step, tune, compile; ",
    "bench step --steps 0": "qbench: --steps: '0' is not accepted; an integer of at least 1 is; --help explains all",
    "bench products --models 8B": "qbench: --models: '8B' is unknown; accepted: 7B, 70B, tiny; --help explains all",
}


@pytest.mark.parametrize("line", WRONG)
def test_a_mistake_is_one_line(line, tmp_path):
    code, out, err = typed("-m", "qbench", *line.split(), folder=tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith(WRONG[line])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["report", "bench", "runs"])
def test_ctrl_c_while_a_command_is_imported_is_one_line(name, tmp_path):
    script = f"""
import signal, sys
from importlib import import_module
from qbench.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
def interrupted(name):
    signal.raise_signal(signal.SIGINT)
main.import_module = interrupted
sys.argv = ["qbench", "{name}", "{"step" if name == "bench" else tmp_path}"]
sys.exit(main.main())
"""
    assert typed("-c", script, folder=tmp_path) == (130, "", "qbench: interrupted\n")


def test_names_are_those_of_the_modules_that_have_them():
    assert set(format_names()) >= set(formats.names())
    assert tuple(products.SHAPES) == arguments.MODELS
    assert tuple(map(str, compiled.DEVICES)) == arguments.CAPABILITIES
    assert set(arguments.BENCHMARKS) == set(bench.BENCHMARKS)


def test_arguments_of_a_benchmark():
    parsed = arguments.parse("qbench.cli.bench", ["products", "--formats", "nf4", "int8", "--rows", "1"])
    assert (parsed.formats, parsed.rows, parsed.block, parsed.out) == (["nf4", "int8"], [1], 64, Path("runs/bench"))
    with pytest.raises(InputError, match="--formats: 'nf5' is unknown; accepted: "):
        arguments.parse("qbench.cli.bench", ["products", "--formats", "nf5"])
