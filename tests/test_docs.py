"""The pages say what is so: links lead somewhere, Python runs, commands are accepted; docs/formats.md is done in order."""

import argparse
import contextlib
import io
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module, invalidate_caches
from pathlib import Path

import pytest
import torch

import formats
import qbench
from formats import registry
from qbench.checkpoint import loading
from qbench.cli import COMMANDS, command_line, commands
from qbench.measure.error import Sums, compare_weights
from qbench.model import devices, quantizing
from qbench.model.selection import linear_layers

ROOT = Path(__file__).parent.parent
PAGES = {
    str(file.relative_to(ROOT)): file.read_text("utf-8")
    for file in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
PAGE = PAGES["docs/formats.md"]
LINKED = [*PAGES, "reports/README.md", "experiments/README.md", "qbench/assets/tasks/README.md"]
SHORT = ["eval.tokens=64", "data.seq=32"]


def blocks(page: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page: language and content."""
    return re.findall(r"^```(\w+)\n(.*?)^```", page, re.S | re.M)


def typed_commands(page: str) -> list[str]:
    """What a page tells its reader to type."""
    text = "".join(block for language, block in blocks(page) if language == "console")
    return re.findall(r"^\$ (.*)", text, re.M)


def anchors(page: str) -> set[str]:
    """The ids that a renderer gives to the headings of a page."""
    heads = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", page, flags=re.S | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", LINKED)
def test_every_link_leads_somewhere(name):
    page = (ROOT / name).read_text("utf-8")
    prose = re.sub(r"^```.*?^```", "", page, flags=re.S | re.M)
    for target, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)#?([^)\s]*)\)", prose):
        file = (ROOT / name).parent / target if target else ROOT / name
        assert file.exists(), f"{name}: {target}"
        assert not anchor or anchor in anchors(file.read_text("utf-8")), f"{name}: {target}#{anchor}"


def test_the_readme_is_a_screen_and_leads_to_every_page():
    assert len(PAGES["README.md"].splitlines()) <= 120
    index = PAGES["docs/index.md"]
    pages = {name.removeprefix("docs/") for name in PAGES if name.startswith("docs/")} - {"index.md"}
    assert "(docs/index.md)" in PAGES["README.md"] and all(f"({page})" in index for page in pages)


@pytest.mark.parametrize("name", PAGES)
def test_every_file_that_a_page_names_exists(name):
    named = re.findall(r"`((?:qbench|tests|formats|docs|conf|experiments|reports)/[\w/.-]+\.\w+)`", PAGES[name])
    assert [file for file in named if not (ROOT / file).exists() and "NAME" not in file] == []


class Accepted(Exception):
    """A command line that its reader accepts."""


def check_command(line: str, monkeypatch) -> None:
    """Raises where a command of a page is not accepted by what would read it. Nothing is run."""
    program, *arguments = shlex.split(line)
    program = program.removeprefix(".venv/bin/")
    if program == "make":
        subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
    elif program == "pip" or arguments[:2] == ["-m", "pip"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
        assert set(re.findall(r"\.\[(\w+)\]", line)) <= set(extras)
    else:
        if program == "python":
            assert arguments.pop(0) == "-m"
            program = arguments.pop(0)
        assert program == "qbench"
        name = arguments.pop(0) if arguments[0] in COMMANDS else "run"
        if name in ("run", "quantize", "plan"):
            line = [argument for argument in arguments if argument != "--formats"] or ["--help"]
            command_line.read(getattr(commands, name.upper()), line)
        else:
            check_with_argparse(import_module(COMMANDS[name]).main, [name, *arguments], monkeypatch)


def check_with_argparse(main, argv: list[str], monkeypatch) -> None:
    parse = argparse.ArgumentParser.parse_args

    def accept(parser, *given, **kwargs):
        raise Accepted(parse(parser, *given, **kwargs))

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", accept)
        patch.setattr(sys, "argv", argv)
        with pytest.raises(Accepted):
            main()


@pytest.mark.parametrize(
    "name", [name for name, page in PAGES.items() if typed_commands(page) and name != "docs/formats.md"]
)
def test_every_command_is_accepted(name, monkeypatch, tmp_path, capsys):
    lines = typed_commands(PAGES[name])
    monkeypatch.chdir(tmp_path)
    for line in lines:
        if line.startswith("qbench") and "launcher=" in line and not installed(line):
            continue
        check_command(line, monkeypatch)


def installed(line: str) -> bool:
    """Whether the launcher that a command names is there."""
    launcher = re.findall(r"hydra/launcher=(\w+?)(?:_\w+)?(?: |$)", line)[0]
    with contextlib.suppress(ImportError):
        return bool(import_module(f"hydra_plugins.hydra_{launcher}_launcher"))
    return False


def test_the_commands_of_the_readme_are_accepted(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^    ((?:qbench|make) .*?)(?: {2,}#.*)?$", PAGES["README.md"], re.M)
    assert len(lines) == 5
    for line in lines:
        check_command(line, monkeypatch)


WITH_PYTHON = [
    name for name, page in PAGES.items() if "```python\n" in page and name not in ("README.md", "docs/formats.md")
]


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_PYTHON)
def test_the_python_of_a_page_runs(name, tiny_llama, monkeypatch, tmp_path):
    """In order, in an empty folder; what would take long, on little text."""
    run, load = qbench.run, qbench.load
    short = {"model": tiny_llama, "eval": {"tokens": 64}, "data": {"seq": 32}, "out": tmp_path / "runs" / "short"}

    def run_short(*args, tune, **kwargs):
        return run(*args, **{**short, **kwargs}, tune={**tune, "steps": 2, "batch": 1})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(qbench, "run", run_short)
    monkeypatch.setattr(qbench, "load", lambda *paths: load(*(path for path in paths if Path(path).exists())))
    scope: dict = {}
    for language, block in blocks(PAGES[name]):
        if language == "python":
            exec(compile(block, name, "exec"), scope)


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Someone in an empty folder, whose Python looks there, and to whom pip installs there; no trace is left."""
    monkeypatch.chdir(tmp_path)
    formats.names()  # ours are found once a process
    for name in ("_entries", "_problems"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    monkeypatch.setattr(registry, "_discovered", True)
    for path in (tmp_path / "site", tmp_path):
        monkeypatch.syspath_prepend(str(path))
    yield
    sys.modules.pop("bof4", None)


def shown(code: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "a block of the page", "exec"), {"__name__": "__main__"})
    return out.getvalue()


def typed(line: str, tiny_llama: Path, monkeypatch, tmp_path) -> None:
    """A command as a console takes it, but with little text."""
    program, *arguments = shlex.split(line)
    if program == "python":
        assert arguments.pop(0) == "-m" and arguments.pop(0) == "pip"
        quietly = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(tmp_path / "site")]
        subprocess.run([sys.executable, "-m", "pip", *arguments, *quietly], check=True)
        invalidate_caches()
        monkeypatch.setattr(registry, "_discovered", False)
        return
    name = arguments.pop(0) if arguments[0] in COMMANDS else "run"
    if name == "run" and "--formats" not in arguments:
        arguments += [*SHORT, f"model.path={tiny_llama}"]
    monkeypatch.setattr(sys, "argv", ["qbench", *arguments])
    assert import_module(COMMANDS[name]).main() == 0, line


@pytest.mark.slow
@pytest.mark.thorough
def test_the_page_on_formats(reader, tmp_path, tiny_llama, monkeypatch, capsys):
    printed = ""
    for language, block in blocks(PAGE):
        first, _, _ = block.partition("\n")
        if re.fullmatch(r"# \w+\.\w+", first):
            assert len(block.splitlines()) <= 40
            (tmp_path / first[2:]).write_text(block)
        elif language == "python":
            printed = shown(block)
        elif language == "text":
            assert printed == block
        elif language == "console":
            for line in block.splitlines():
                typed(line.removeprefix("$ "), tiny_llama, monkeypatch, tmp_path)
    out = capsys.readouterr().out
    assert {"bof4", "bof4_fit"} < set(formats.names()) and "bof4-format" in out
    assert len(list(tmp_path.glob("sweeps/*/*/result.json"))) == 3 + 2
    check_table()


def check_table() -> None:
    """What the weights alone decide of the page's table; and that nothing in it is missing."""
    layers = linear_layers(
        loading.load(None, devices.pick_dtype("auto", torch.device("cpu")), torch.device("cpu")).model
    )
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")
    ]
    head, *rows = rows
    assert head == ["format", "bits/weight", "perplexity", "Δ nll", "KL", "SQNR, dB"]
    assert {row[0] for row in rows} == {"nf4, block 64", "bof4, block 64", "bof4_fit, block 64", "16 bit, untuned"}
    for title, bits, perplexity, _, _, sqnr in rows:
        assert 90 < float(perplexity) < 110
        if title.startswith("16 bit"):
            continue
        packed = quantizing.quantize(layers, formats.get(title.partition(",")[0]))
        sums = sum((compare_weights(layers[name].weight, q.dequantize()) for name, q in packed.items()), Sums())
        assert bits == "4.500" and float(sqnr) == pytest.approx(sums.weight_metrics()["sqnr_db"], abs=0.02)
