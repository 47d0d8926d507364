"""The house stands as the README says: imports run one way, a format is one file, the examples run."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

import formats
from qbench.__main__ import main
from qbench.arguments import CONF
from qbench.testing import check_format

ROOT = Path(__file__).parent.parent
# what each part may import of the house: itself and what is listed before it
ORDER = [
    "imports",
    "errors",
    "keys",
    "manual",
    "messages",
    "catalog",
    "files",
    "schema",
    "record",
    "ops",
    "quant_linear",
    "fsdp",
    "layers",
    "counting",
    "functions",
    "lora",
    "measure",
    "optim",
    "starts",
    "settings",
    "shards",
    "recipe",
    "places",
    "auto",
    "names",
    "skeleton",
    "opened",
    "interop",
    "pretrained",
    "checkpoint",
    "models",
    "testing",
    "data",
    "adapters",
    "merge",
    "tune",
    "baseline",
    "report",
    "runs",
    "phases",
    "track",
    "task_stages",
    "fresh",
    "experiment",
    "quantize",
    "plan",
    "bench",
]
HYDRAS = (("quantize", "__main__"), ("plan", "__main__"))


def imported(file: Path, at_once: bool = False) -> set[str]:
    """Full names of the modules that a file imports, relative ones resolved; all, or those that it imports when it is."""
    package = list(file.relative_to(ROOT).with_suffix("").parts[:-1])
    found = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            start = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{start}.{alias.name}" for alias in node.names}
    return found


def test_formats_know_torch_and_themselves():
    for file in (ROOT / "formats").glob("*.py"):
        tops = {name.partition(".")[0] for name in imported(file)}
        assert tops <= {"torch", "formats"} | set(sys.stdlib_module_names), file


def test_imports_of_the_harness_run_one_way():
    for file in (ROOT / "qbench").rglob("*.py"):
        parts = file.relative_to(ROOT / "qbench").with_suffix("").parts
        if parts[0] in ("__main__", "api", "arguments", "jobs", "groups", "__init__") or parts in HYDRAS:
            continue
        for name in imported(file):
            assert name.partition(".")[0] not in ("hydra", "omegaconf"), f"{file} sees a Hydra config"
            if name.startswith("qbench.") and name != "qbench.__version__":
                assert ORDER.index(name.split(".")[1]) <= ORDER.index(parts[0]), f"{file} imports {name}"


def test_the_readme_has_every_format_and_conf_none():
    page = (ROOT / "README.md").read_text()
    assert all(f"`{name}`" in page for name in formats.names())
    assert not (CONF / "format").exists(), "a format is one file"


def test_lm_eval_is_imported_only_where_tasks_are_asked_for():
    """It takes seconds, and most runs do without."""
    slow = {"qbench.measure.tasks", "qbench.measure.task_scores"}
    for file in (ROOT / "qbench").rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        if name not in slow and not name.startswith("qbench.tasks."):
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
    for found in scope.values():
        if isinstance(found, type) and issubclass(found, formats.Format) and found is not formats.Format:
            check_format(found)


def test_the_lowest_releases_are_those_of_the_project():
    """`make test-lowest` installs what pyproject.toml says is enough."""
    pinned = re.findall(r"(\w+)==(\S+)", (ROOT / "Makefile").read_text())
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    least = dict(re.findall(r"^(\w+)>=([\d.]+)", "\n".join(wanted), re.M))
    assert "transformers" in dict(pinned)
    assert [(name, least[name] + ".0") for name, _ in pinned] == pinned
