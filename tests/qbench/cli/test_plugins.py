"""A format of another package, or of no package, is used as our own are, with nothing changed here."""

import json
import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
import torch
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from rich.console import Console

import formats
from formats import registry
from qbench import checkpoint
from qbench.checkpoint.recipe import Recipe
from qbench.cli import format_group, format_list
from qbench.cli.plan import main as plan_main
from qbench.cli.quantize import main
from qbench.errors import InputError
from qbench.plan import advice
from qbench.plan.settings import PlanSettings
from qbench.plan.shapes import find_shape
from qbench.results import dataframe, provenance, store
from qbench.settings import Settings
from tests.qbench.sample_checkpoints import CPU, assert_same, edit_recipe, in_memory

ROOT = Path(__file__).parents[3]
SHORT = "eval.tokens=64 data.seq=32 tune.steps=1 tune.batch=2 tune.rank=2"
PLUGGED = """
from formats import Format


class Plugged(Format):
    name, bits, source = "plugged", 3, "nowhere else"
    levels = (-1.0, -0.5, -0.2, 0.0, 0.1, 0.3, 0.6, 1.0)

    def __init__(self, block: int = 64, dq: bool = False, spread: float = 1.0):
        super().__init__(block, dq)
        self.levels = tuple(abs(level) ** spread * (1 if level > 0 else -1) for level in self.levels)
"""
PYPROJECT = """
[build-system]
requires = ["setuptools>=61"]
build-backend = "setuptools.build_meta"

[project]
name = "a-plugged-format"
version = "0.1"

[project.entry-points."qbench.formats"]
plugged = "plugged:Plugged"

[tool.setuptools]
py-modules = ["plugged"]
"""
#: command lines in one process, each as `python -m` would run it, then a program
DRIVER = """
import runpy, sys
*lines, program = sys.stdin.read().split("\\n---\\n")
for line in lines:
    module, *arguments = line.split()
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, line
exec(program)
"""
PROGRAM = """
import torch, formats
from pathlib import Path
from qbench import checkpoint
loaded = checkpoint.load(Path("packed"), torch.device("cpu"), torch.float32)
layer = loaded.model.model.layers[1].mlp.up_proj
assert layer.format == "plugged" and layer.bits == 3 and layer.dq
checkpoint.save(loaded.model, Path("saved"), loaded.tokenizer)
again = checkpoint.load(Path("saved"), torch.device("cpu"), torch.float32).model
assert torch.equal(again.model.layers[1].mlp.up_proj.codes, layer.codes)
"""


@pytest.mark.thorough
def test_a_package_that_pip_installs(tmp_path, tiny_llama):
    source, site = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    (source / "plugged.py").write_text(PLUGGED)
    (source / "pyproject.toml").write_text(PYPROJECT)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--target", str(site), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [
        "qbench --formats",
        f"qbench.quantize +format=plugged dq=true model.path={tiny_llama} out=packed",
        f"qbench +format=plugged format.spread=1.5 model.path={tiny_llama} {SHORT} hydra.run.dir=one",
        f"qbench -m +format=plugged,nf4 block=32 model.path={tiny_llama} {SHORT} hydra.sweep.dir=sweep",
        "qbench.report sweep",
    ]
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DRIVER], cwd=tmp_path, text=True, capture_output=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{site}", "COLUMNS": "80"},
        input="\n---\n".join([*lines, PROGRAM]),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    row = next(line for line in process.stdout.splitlines() if line.startswith("plugged "))
    assert row.split()[:3] == ["plugged", "3.500", "3.127"] and "8, −1 … 1" in row and "a-plugged-format" in row
    recipe = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    assert (recipe["format"], recipe["options"]) == ("plugged", {"spread": 1.0})
    single = store.read(tmp_path / "one")
    assert single["status"] == "done" and "tuned" in single["metrics"]["quality"]
    recorded = {"name": "plugged_spread1.5", "source": "nowhere else", "class": "plugged.Plugged"}
    assert single["config"]["format"] == recorded
    results, _ = dataframe.read_results(tmp_path / "sweep")
    assert sorted(r["config"]["format"]["name"] for r in results.values()) == ["nf4", "plugged"]
    assert "plugged, block 32" in (tmp_path / "sweep/report/report.md").read_text()


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Put a module, and a package that names some of it as formats, where Python looks, and have them discovered anew."""
    site = tmp_path / "site"
    formats.names()  # ours are found once a process
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.setattr(registry, "_problems", {})
    monkeypatch.setattr(registry, "_discovered", False)
    modules = set(sys.modules)

    def install(module: str, code: str, **points: str) -> Path:
        info = site / f"{module}_package-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}-package\nVersion: 1.0\n")
        lines = "".join(f"{name} = {target}\n" for name, target in points.items())
        (info / "entry_points.txt").write_text(f"[qbench.formats]\n{lines}")
        monkeypatch.syspath_prepend(str(site))
        return site / f"{module}.py"

    yield install
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) and str(site) in sys.modules[name].__file__:
            del sys.modules[name]


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Run a command in a folder of its own; returns exit code, standard output and standard error."""

    def run(*arguments, main=main):
        (tmp_path / "here").mkdir(exist_ok=True)
        monkeypatch.chdir(tmp_path / "here")
        monkeypatch.setattr(sys, "argv", ["qbench", *map(str, arguments)])
        return main(), *capfd.readouterr()

    return run


def listed(width: int) -> list[str]:
    out = StringIO()
    assert format_list.show(Console(file=out, width=width, highlight=False, markup=False)) == 0
    return out.getvalue().splitlines()


def test_the_settings_of_a_format_are_its_constructors():
    format_group.store()
    nodes = {name: ConfigStore.instance().load(f"format/{name}.yaml").node for name in format_group.choices()}
    open_ones = {"block": "${block}", "dq": "${dq}"}
    for name, node in nodes.items():
        wanted = {"block": 64, "dq": False} if name == "none" else open_ones
        assert OmegaConf.to_container(node).items() >= wanted.items(), name
    assert OmegaConf.to_container(nodes["fp4"]) == {"name": "fp4", "variant": "bnb", **open_ones}
    assert OmegaConf.to_container(nodes["fp4_e2m1"]) == {"name": "fp4_e2m1", **open_ones}


@pytest.mark.parametrize("width", [80, 120])
def test_every_format_is_listed(width):
    lines = listed(width)
    assert max(map(len, lines)) <= width
    rows = {line.split()[0]: line for line in lines if re.match(r"\w+ +\d+\.\d{3} ", line)}
    assert sorted(rows) == formats.names() and all(row.split()[-1] == "qbench" for row in rows.values())
    assert rows["nf4"].split()[1:6] == ["4.500", "4.127", "16,", "−1", "…"]
    assert "16, 0 … 1, z" in rows["int4_asym"] and "16, own" in rows["quantile"] and "15, −1 … 1" in rows["fp4"]


TROUBLE = """
from formats import Format, register

@register("found_on_import", "nf4_of_another", spread=2.0)
class Plain(Format):
    bits, source, levels = 1, "here", (-1.0, 1.0)
    def __init__(self, block=64, dq=False, spread=1.0, name="found_on_import"):
        super().__init__(block, dq)
        self.name = name

class Taken(Plain): ...
class Short(Format):
    name, bits, source, levels = "short", 2, "here", (-1.0, 0.0, 1.0)
def function(): ...
"""


def test_what_cannot_be_used_is_told_and_takes_nothing_from_the_rest(installed, command, tiny_llama):
    installed("trouble", TROUBLE, short="trouble:Short", int8="trouble:Taken", function="trouble:function")
    installed("several", TROUBLE.replace("found_on_import", "by_module").replace("nf4_of_", "of_"), all="several")
    installed("absent", "import nowhere_to_be_found", lost="absent:Lost")
    assert {"short", "found_on_import", "nf4_of_another", "by_module"} < set(formats.names())
    assert not {"lost", "all"} & set(formats.names()) and formats.find("by_module").package == "several-package"
    assert formats.get("found_on_import").name == "found_on_import" and formats.get("int8").bits == 8
    assert formats.find("found_on_import").package == "trouble-package"
    problems = formats.problems()
    assert set(problems) == {"lost", "int8", "function"}
    assert problems["int8"].endswith("ValueError: format name 'int8' is taken, by formats.int8.Int8")
    expected = {
        "lost": r"lost, of absent-package, cannot be loaded: ModuleNotFoundError: No module named 'nowhere_to_be_found'",
        "function": r"function, of trouble-package, .* trouble:function is no subclass of formats\.Format",
        "short": r"short breaks the contract of a format: table: on 131 weights .*: there are 3 levels; expected 4",
        "nf4_of_another": r"naming: name is 'found_on_import'; expected 'nf4_of_another'",
    }
    notes = " ".join(listed(10_000))
    for name, message in expected.items():
        assert re.search(f"not usable: .*{message}", notes), notes
        code, out, err = command(f"+format={name}", f"model.path={tiny_llama}", "out=o")
        assert code == 2 and not out and err.count("\n") == 1 and re.search(f"^qbench: format: .*{message}", err), err
    plans = advice.compare_formats(find_shape("bundled"), PlanSettings(), (64,))
    assert {plan.settings.format.name for plan in plans} == {*formats.names()} - {
        "short",
        "nf4_of_another",
        "of_another",
    }


CUSTOM = """
import sys
from formats import Format

class Custom(Format):
    name, bits, source, levels = "custom_1", 1, "here", (-1.0, 1.0)
    def __init__(self, block=64, dq=False, depth=1, swapped=False):
        super().__init__(block, dq)

class Fails(Custom):
    def __init__(self, block=64, dq=False):
        1 / 0

class Int8(Custom):
    name = "int8"

class Listed(Custom):
    name = ["custom_1"]

class Unsourced(Custom):
    source = None
def function(): ...
"""
BAD_TARGETS = {
    "none": ([], r"format\.target: none is given; accepted: module\.Class, such as my_module\.MyFormat"),
    "a number": (["format.target=7"], r"format\.target: 7 names no class; accepted: module\.Class"),
    "no name": (["format.target=a..b"], r"'a\.\.b' names no class; accepted: module\.Class"),
    "no module": (["format.target=nowhere.F"], r"nowhere\.F: nowhere cannot be imported: there is no such module here"),
    "no part": (["format.target=mine.sub.F"], r"mine\.sub cannot be imported: there is no such module here"),
    "a module that fails": (["format.target=fails.F"], r"fails cannot be imported: SyntaxError: '\(' was never closed"),
    "a module that ends": (["format.target=ends.F"], r"ends cannot be imported: SystemExit: 3"),
    "no attribute": (["format.target=mine.F"], r"mine has no F; accepted: Custom, Fails, Int8, Listed, Unsourced"),
    "no format": (["format.target=mine.function"], r"mine has function, which is none; accepted: Custom, "),
    "no class": (["format.target=mine.sys"], r"mine has sys, which is none; accepted: Custom, "),
    "a constructor": (["format.target=mine.Fails"], r"mine\.Fails cannot be made: ZeroDivisionError: division by zero"),
    "a taken name": (["format.target=mine.Int8"], r"naming: name is 'int8', which is taken, by formats\.int8\.Int8"),
    "a name that is none": (["format.target=mine.Listed"], r"mine\.Listed breaks .* naming: .* name is \['custom_1'\]"),
    "a property": (
        ["format.target=mine.Unsourced"],
        r"mine\.Unsourced breaks the contract .* sourced: .* source is None",
    ),
    "an option": (["format.target=mine.Custom", "format.k=3"], r"'k' is no option of .*: block, dq, depth, swapped"),
    "block": (["format.target=mine.Custom", "block=0"], r"block: 0 is not accepted; an integer of at least 1"),
}


@pytest.mark.parametrize("case", BAD_TARGETS)
def test_a_target_that_is_none_is_a_line(installed, command, case):
    for module, code in {"mine": CUSTOM, "fails": "x = (", "ends": "import sys; sys.exit(3)"}.items():
        installed(module, code)
    arguments, message = BAD_TARGETS[case]
    code, out, err = command("+format=custom", *arguments, "out=o")
    assert code == 2 and not out and err.count("\n") == 1 and re.search(message, err), err


def test_a_target_is_what_a_registered_format_is(installed, command, sharded_llama, tmp_path):
    installed("mine", CUSTOM)
    target = ["+format=custom", "format.target=mine.Custom", "block=32"]
    code, _, err = command(*target, "dq=true", f"model.path={sharded_llama}", "out=packed")
    assert code == 0 and "14 layers in custom_1(block=32, dq=True)" in err
    packed = tmp_path / "here/packed"
    loaded = checkpoint.load(packed, CPU, torch.bfloat16).model
    assert_same(loaded, in_memory(sharded_llama, {"name": "mine.Custom", "block": 32, "dq": True}))
    checkpoint.save(loaded, tmp_path / "saved")
    assert Recipe.from_json(json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]).format.dq
    del sys.modules["mine"]
    with pytest.raises(InputError, match=r"format: mine\.Custom is code of yours; accepted once mine is imported"):
        checkpoint.load(packed, CPU, torch.bfloat16)
    assert "mine" not in sys.modules, "what a checkpoint names is not run for that"
    edit_recipe(packed, format="mine.")
    with pytest.raises(InputError, match=r"mine\. is code of yours"):
        checkpoint.load(packed, CPU, torch.bfloat16)
    code, out, _ = command("model=bundled", *target, main=plan_main)
    assert code == 0 and "bundled in custom_1, block 32" in out
    settings = PlanSettings(format=formats.get("mine.Custom", block=32, depth=2))
    smaller = next(ladder[0]["format"] for ladder in advice.ladders(settings) if "format" in ladder[0])
    assert smaller.arguments == settings.format.arguments | {"dq": True}


def test_options_are_part_of_what_a_run_is(installed):
    file = installed("mine", CUSTOM)
    fmt = formats.get("mine.Custom", depth=3, swapped=False)
    assert fmt.name == "custom_1_depth3" and fmt.arguments["depth"] == 3
    assert formats.get("mine.Custom", depth=1).name == "custom_1"
    assert formats.get("fp4", variant="e2m1").name == "fp4_e2m1", "whose name told it already"
    ids = {provenance.run_id(Settings(formats.get("mine.Custom", depth=d)).plain()) for d in (1, 2)}
    assert len(ids) == 2
    before = provenance.format_digest(fmt)
    assert before and provenance.format_digest(formats.get("nf4")) is None
    file.write_text(CUSTOM + "# changed\n")
    assert provenance.format_digest(fmt) != before, "a changed format is run again"


def test_of_a_package_every_file_counts(tmp_path, monkeypatch):
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole/__init__.py").write_text("")
    (tmp_path / "whole/part.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(str(tmp_path))
    fmt = formats.get("whole.part.Custom")
    before = provenance.format_digest(fmt)
    (tmp_path / "whole/other.py").write_text("x = 1")
    assert provenance.format_digest(fmt) != before


def test_a_cell_that_runs_again_takes_its_name_again(monkeypatch):
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    scope = {"__name__": "__main__"}
    for levels in ((-1.0, 1.0), (-0.5, 0.5)):
        code = f"""
from formats import Format, register
@register("cell")
class Cell(Format):
    name, bits, source, levels = "cell", 1, "here", {levels}
"""
        exec(code, scope)
        assert formats.get("cell").levels == levels
    assert provenance.format_digest(formats.get("cell")) in (None, provenance.format_digest(scope["Cell"]()))
