"""The house stands as the README says: imports run one way, a format is one file, the examples run."""

import ast
import re
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

import formats
from qbench.cli import COMMANDS
from qbench.cli.commands import CONF
from qbench.cli.run import main
from qbench.system import import_hooks
from qbench.system.moved import MOVED
from qbench.testing import check_format

ROOT = Path(__file__).parent.parent
#: the rooms, from the bottom to the top: each imports from itself and from those before it
ROOMS = [
    "errors", "system", "keys", "results", "ops", "model", "checkpoint", "settings", "training", "measure", "report",
    "runs", "testing", "plan", "bench", "cli",
]  # fmt: skip
#: modules that import what no import statement shows, and why
UNSEEN = {
    "__init__": "public names are imported when they are first used, so that `import qbench` is fast",
    "checkpoint.__init__": "load and save come late: the plug-in is imported within transformers",
    "system.import_hooks": "a library brings its plug-in along; commands and old names of modules are found",
    "cli.main": "a command imports only its own module",
    "cli.format_names": "names of formats in other packages, by their entry points",
    "ops.threads": "numba's OpenMP, which may be missing",
    "checkpoint.layouts.gguf": "the package gguf, which may be missing",
}


def imported(file: Path, at_once: bool = False) -> set[str]:
    """Full names of the modules that a file imports, relative ones resolved; all, or those that it imports when it is."""
    package = list(file.relative_to(ROOT).with_suffix("").parts[:-1])
    names = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{start}.{alias.name}" for alias in node.names}
    return names


def test_formats_know_torch_and_themselves():
    for file in (ROOT / "formats").glob("*.py"):
        tops = {name.partition(".")[0] for name in imported(file)}
        assert tops <= {"torch", "formats"} | set(sys.stdlib_module_names), file


def test_imports_of_the_harness_run_one_way():
    for file in (ROOT / "qbench").rglob("*.py"):
        room = file.relative_to(ROOT / "qbench").with_suffix("").parts[0]
        if room in ("__init__", "__main__", "assets"):
            continue
        for name in imported(file):
            if room != "cli":
                assert name.partition(".")[0] not in ("hydra", "omegaconf"), f"{file} sees a Hydra config"
            if name.startswith("qbench.") and name.split(".")[1] != room:
                assert ROOMS.index(name.split(".")[1]) <= ROOMS.index(room), f"{file} imports {name}"


def test_every_import_that_no_statement_shows_has_its_reason():
    modules = {
        file.relative_to(ROOT / "qbench").with_suffix("").as_posix().replace("/", ".")
        for file in (ROOT / "qbench").rglob("*.py")
        if re.search(r"import_module\(|__import__|^def __getattr__|entry_points\(", file.read_text(), re.M)
    }
    # import a package that may be missing, or read the names of entry points; they import no module of ours
    assert modules == set(UNSEEN)
    for module in (*import_hooks.FOLLOWERS.values(), *import_hooks.MAINS.values(), *COMMANDS.values()):
        assert find_spec(module), module
    for places in MOVED.values():
        assert all(find_spec(f"qbench.{place}") for place in places.split()), places


def test_the_top_of_the_house_is_small():
    files = [file.relative_to(ROOT / "qbench") for file in (ROOT / "qbench").rglob("*") if file.is_file()]
    entries = {file.parts[0] for file in files if "__pycache__" not in file.parts}
    rooms = {name for name in entries if (ROOT / "qbench" / name).is_dir()}
    assert len(rooms) <= 14 and entries - rooms == {
        "__init__.py", "__main__.py", "errors.py", "keys.py", "settings.py", "py.typed",
    }  # fmt: skip


def test_the_readme_and_the_first_page_have_every_format_and_conf_none():
    for name in ("README.md", "docs/run.md"):
        page = (ROOT / name).read_text("utf-8")
        assert all(f"`{fmt}`" in page for fmt in formats.names()), name
    assert not (CONF / "format").exists(), "a format is one file"


def test_lm_eval_is_imported_only_where_tasks_are_asked_for():
    """It takes seconds, and most runs do without."""
    slow = {"qbench.measure.tasks", "qbench.measure.task_scores"}
    for file in (ROOT / "qbench").rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if name not in slow and not name.startswith("qbench.assets."):
            tops = imported(file, at_once=True)
            assert not slow & tops and not {"lm_eval", "datasets"} & {top.partition(".")[0] for top in tops}, file


EXPERIMENTS = sorted(file.stem for file in (ROOT / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_named_sweep_says_what_it_asks_and_composes(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["qbench", f"+experiments={name}", "--cfg", "job"])
    assert main() == 0
    composed = yaml.safe_load(capsys.readouterr().out)
    assert composed["block"] == 64 and not list(tmp_path.iterdir())
    lines = (ROOT / "experiments" / f"{name}.yaml").read_text().splitlines()
    assert lines[1].startswith("# ") and "?" in " ".join(lines[:5])
    assert f"({name}.yaml)" in (ROOT / "experiments" / "README.md").read_text()


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S))
def test_the_examples_of_the_readme_run(block, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    scope = {"torch": torch, "w": torch.randn(30, 70)}
    exec(block, scope)
    for value in scope.values():
        if isinstance(value, type) and issubclass(value, formats.Format) and value is not formats.Format:
            check_format(value)


def test_the_lowest_releases_are_those_of_the_project():
    """`make test-lowest` installs what pyproject.toml says is enough."""
    pinned = re.findall(r"(\w+)==(\S+)", (ROOT / "Makefile").read_text())
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    least = dict(re.findall(r"^(\w+)>=([\d.]+)", "\n".join(wanted), re.M))
    assert "transformers" in dict(pinned)
    assert [(name, least[name] + ".0") for name, _ in pinned] == pinned
