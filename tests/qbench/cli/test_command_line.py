"""Command lines before Hydra has them: mistakes are one line, reported at once, and nothing is left behind."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.types import QuotedString
from omegaconf import OmegaConf

import qbench
from qbench import keys
from qbench.cli import command_line, compose
from qbench.cli.commands import CONF, PLAN, QUANTIZE, RUN
from qbench.cli.plan import main as plan_main
from qbench.cli.quantize import main as quantize_main
from qbench.cli.run import main as run_main
from qbench.errors import InputError
from qbench.settings import TuneSettings
from qbench.training import lora_init, optim

ROOT = Path(__file__).parents[3]
COMMANDS = {"qbench": RUN, "qbench quantize": QUANTIZE, "qbench plan": PLAN}
MAINS = {"qbench": run_main, "qbench quantize": quantize_main, "qbench plan": plan_main}
VALID = {
    "qbench": ["+format=nf4", "tune.steps=3"],
    "qbench quantize": ["+format=nf4", "out=o"],
    "qbench plan": ["+format=nf4", "model=bundled"],
}


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Run a command in an empty folder; returns exit code, standard output and standard error."""

    def run(module, *line):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [module, *line])
        return MAINS[module](), *capfd.readouterr()

    return run


def refused(module: str, *line: str) -> str:
    """The answer to a command line that is checked before PyTorch is imported."""
    with pytest.raises(InputError) as raised:
        command_line.read(COMMANDS[module], line)
    assert "\n" not in str(raised.value)
    return str(raised.value)


UNKNOWN = {
    "a typo": (["+format=nf4", "tune.step=5"], "tune.step is unknown; did you mean tune.steps?"),
    "as Hydra advises": (["+format=nf4", "+tune.step=5"], "tune.step is unknown; did you mean tune.steps?"),
    "by force": (["+format=nf4", "++tune.step=5"], "tune.step is unknown; did you mean tune.steps?"),
    "deleted": (["+format=nf4", "~tune.step"], "tune.step is unknown; did you mean tune.steps?"),
    "without a fine-tune": (
        ["+format=nf4", "tune=none", "+tune.step=5"],
        "tune.step is unknown; did you mean tune.steps?",
    ),
    "without its group": (["+format=nf4", "steps=5"], "steps is unknown; did you mean tune.steps?"),
    "a new one": (["+format=nf4", "tune=none", "+foo=5"], "foo is unknown; accepted: block, dq, "),
    "of a group": (["+format=nf4", "+eval.num_fewshot=2"], "eval.num_fewshot is unknown; accepted: eval.tokens, "),
    "in a sweep": (["-m", "+format=nf4", "tune.step=5,6"], "tune.step is unknown; did you mean tune.steps?"),
    "beside a named sweep": (["+experiments=quick", "seeds=3"], "seeds is unknown; did you mean seed?"),
    "a package": (["+format=nf4", "seed@tune=3"], "seed@tune is unknown; "),
    "a node": (["+format=nf4", "tune.lr.x=3"], "tune.lr.x is unknown; "),
    "a known one deleted": (["+format=nf4", "~seed"], "~seed: a key cannot be left out; accepted: seed=VALUE"),
    "no use": (["+format=nf4", "tune=none", "tune.steps=3"], "tune.steps: tune=none takes no such key"),
    "a flag": (["+format=nf4", "--formts"], "--formts is unknown; did you mean --formats?"),
    "no key": (["nf4"], "'nf4' is not key=value; accepted: such as +format=nf4"),
    "format without a plus": (["format=nf4"], "format: it has no default to override; accepted: +format=NAME"),
    "no format": (["block=64"], "format: none is given; accepted: +format=NAME, such as +format=nf4"),
    "no format in a sweep": (["-m", "block=64,32"], "format: none is given"),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_unknown_key_is_refused_with_the_nearest_however_it_is_spelled(case):
    line, expected = UNKNOWN[case]
    assert refused("qbench", *line).startswith(expected)


def test_unknown_keys_of_a_file_are_refused(tmp_path):
    (tmp_path / "experiments").mkdir()
    content = "# @package _global_\nhydra: {mode: MULTIRUN, sweeper: {params: {+format: nf4, tune.stpes: '1,2'}}}\n"
    (tmp_path / "experiments" / "mine.yaml").write_text(content)
    line = ["--config-dir", str(tmp_path), "+experiments=mine"]
    assert refused("qbench", *line) == "tune.stpes is unknown; did you mean tune.steps?"
    (tmp_path / "experiments" / "mine.yaml").write_text("# @package _global_\ntune: {stpes: 3}\n")
    assert refused("qbench", *line, "+format=nf4") == "tune.stpes is unknown; did you mean tune.steps?"


RANGES = {
    "tune.lr": ["-1", "0", "abc", "nan", "inf", "1e31", "true", "[1]", "1" * 5000],
    "tune.dropout": ["1", "-0.1", "nan"],
    "tune.alpha": ["0", "-3", "inf"],
    "tune.clip": ["0", "-1", "nan"],
    "tune.weight_decay": ["-0.1", "inf"],
    "tune.warmup": ["-1", "1.5"],
    "tune.steps": ["0", "2.5", "null", "99999999999"],
    "tune.batch": ["0", "1e3"],
    "tune.merge": ["yes", "1"],
    "tune.optimizer_page": ["4095", "1XB", "-1", "9" * 400 + "MB"],
    "eval.tokens": ["99999999999", "0", "1e5"],
    "eval.tasks": ["{a: b}", "[[a]]"],
    "data.seq": ["1", "long"],
    "seed": ["-1", str(2**32), "1.0", "1" * 5000],
    "block": ["0", "-3", "7.5", str(10**20), "("],
    "dq": ["maybe"],
    "device": ["tpu", "cuda:x"],
    "timeout": ["0", "-1", "x"],
    "track": ["comet", "[comet]"],
    "model.path": ["", "{a: 1}"],
    "model.dtype": ["int3"],
}


@pytest.mark.parametrize("key", RANGES)
def test_every_value_has_a_range(key):
    for value in RANGES[key]:
        message = refused("qbench", "+format=nf4", f"{key}={value}")
        assert message.startswith(f"{key}: ") and ("not accepted; " in message or "unknown; accepted: " in message)
        assert len(message) < 500


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["tune=prefix", "tune.checkpointing=true"], "tune.checkpointing: true is not possible with prefix"),
        (["tune=ia3", "tune.init=loftq"], "tune.init: loftq is for lora"),
        (["tune.batch=4", "tune.accumulate=3"], "tune.accumulate: 3 does not divide tune.batch=4"),
        (["tune.optimizer_budget=1GB"], "tune.optimizer_budget: '1GB' is not accepted with tune.optimizer=adamw"),
        (["block=1,2"], "block: '1,2' is several values, a sweep; accepted: with -m"),
    ],
)
def test_what_does_not_go_together_is_told_at_once(line, expected):
    assert refused("qbench", "+format=nf4", *line).startswith(expected)


def test_prefix_tuning_takes_no_checkpointing_from_python_either():
    with pytest.raises(InputError, match=r"tune\.checkpointing: true .* prefix"):
        TuneSettings(method="prefix", checkpointing=True)
    TuneSettings(method="p_tuning", checkpointing=True)


@pytest.mark.parametrize("text", ["2024", "1e5", "true", "0x10", "1_000", ".5", "nan", "/a/b", "a b", "a-b", "C:\\x"])
def test_a_path_is_text_whatever_it_looks_like(text):
    for command, key in (
        (RUN, "model.path"),
        (RUN, "data.path"),
        (RUN, "eval.tasks"),
        (QUANTIZE, "out"),
        (PLAN, "model.path"),
    ):
        for plus in ("", "+", "++"):
            line = command_line.read(command, ["+format=nf4", f"{plus}{key}={text}"])
            assert line.overrides[1].value() == text and line.overrides[1].input_line.startswith(f"{key}=")
    line = command_line.read(RUN, ["+format=nf4", f"eval.tasks=[{text},b]"])
    assert line.overrides[1].value() == [text, "b"]
    line = command_line.read(RUN, ["-m", "+format=nf4", f"model.path={text},b"])
    assert [part.text if isinstance(part, QuotedString) else part for part in line.overrides[1].value().list] == [
        text,
        "b",
    ]


ODD = ["a=b", "it's", 'a"b', "a(1)", "a#b", "ä", "日本", "~/x", "a,b", "a[", "{", "a'b\"c", "a;b", "a&b", "!x"]


@pytest.mark.parametrize("text", ODD)
def test_for_other_paths_the_quoting_to_type_is_shown(text, tmp_path):
    """What is shown is typed into a shell, and stands for the path."""
    message = refused("qbench", "+format=nf4", f"model.path={text}")
    typed = message.rpartition(": ")[2]
    (argument,) = subprocess.check_output(["sh", "-c", f"printf '%s\\n' {typed}"], text=True).splitlines()
    line = command_line.read(RUN, ["+format=nf4", argument])
    assert line.overrides[1].value() == text


def test_a_folder_with_an_odd_name_runs_as_hydra_is_told(command, tmp_path):
    code, _, err = command("qbench", "+format=nf4", "model.path='a=b'")
    assert code == 2 and err.startswith("qbench: model.path: 'a=b' does not exist; ") and err.count("\n") == 1
    code, _, err = command("qbench", "+format=nf4", "model.path=2024")
    assert code == 2 and err.startswith("qbench: model.path: '2024' does not exist; ")
    assert not list(tmp_path.iterdir())


MISTAKES = [
    ["qbench", "+format=nf4", "tune.step=5"],
    ["qbench", "block=64"],
    ["qbench", "+format=nf4", "tune.lr=-1"],
    ["qbench", "-m", "+format=nf4", "tune=lora,dorra"],
    ["qbench", "--version"],
    ["qbench", "--help"],
    ["qbench quantize", "+format=nf4", "blok=3"],
    ["qbench quantize", "out=x"],
    ["qbench plan", "model=bundled", "+format=nf4", "tune.batch=-1"],
    ["qbench plan", "model=bundled"],
]


def test_nothing_heavy_is_imported_before_arguments_are_checked(tmp_path):
    heavy = {"torch", "numpy", "pandas", "transformers", "peft", "formats"}
    script = f"""
import importlib, sys
for module, *line in {MISTAKES}:
    sys.argv = [module, *line]
    command = module.partition(" ")[2] or "run"
    print(importlib.import_module("qbench.cli." + command).main(), {heavy} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    codes = [line for line in done.stdout.splitlines() if line.endswith("set()")]
    assert [line.split()[0] for line in codes] == ["2"] * 4 + ["0"] * 2 + ["2"] * 4, done.stdout
    assert len(done.stderr.splitlines()) == 8 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", COMMANDS)
def test_versions(command, module):
    assert command(module, "--version") == (0, f"{module} {qbench.__version__}\n", "")


@pytest.mark.parametrize("module", COMMANDS)
def test_help_has_every_key_with_meaning_default_and_range(command, module, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, shown, _ = command(module, "--help")
    assert code == 0
    asked = COMMANDS[module]
    explained = command_line.explain_keys(asked)
    composed = command_line.read(asked, VALID[module])
    assert composed and set(explained) == set(asked.keys), "the table and conf/ have the same keys"
    config = compose.compose_config(asked, composed.asked, [])
    leaves = keys.leaves({k: v for k, v in compose.resolve(config).items() if k != "format"})
    assert set(leaves) == set(asked.keys)
    for key, (default, meaning) in explained.items():
        assert meaning, f"{key} is not explained"
        assert (f"{key}={default}" in shown) != (key in asked.hidden)
        assert key in asked.hidden or meaning.split()[0] in shown
        assert OmegaConf.create(f"x: {default}").x == leaves[key]
        asked.keys[key].check(key, leaves[key])  # the default is within the range


def test_names_are_those_of_the_modules_that_have_them():
    assert tuple(optim.OPTIMIZERS) == keys.OPTIMIZERS and tuple(optim.PAGED) == keys.PAGED
    assert keys.RUN["tune.init"].words == ", ".join(lora_init.INITS)
    methods = {OmegaConf.load(file).get("method") for file in (CONF / "tune").glob("*.yaml")} - {None, "none"}
    assert methods == set(keys.METHODS)


def test_info_is_hydras(command, tmp_path):
    code, shown, _ = command("qbench", "--info", "searchpath")
    assert code == 0 and "experiments" not in shown and not list(tmp_path.iterdir())
    code, _, err = command("qbench", "--info", "+format=nf4")
    assert code == 2 and err.count("\n") == 1


def _mutations() -> list[tuple[str, list[str]]]:
    """Command lines that are valid but for one argument, each wrong by construction."""
    generator = random.Random(14)
    spoiled = [
        "{a: 1}",
        "[[1]]",
        "(",
        "a=b=c",
        "\n",
        "'",
        "{",
        "[",
        "1" * 5000,
        "[" * 5000,
        "\udcff(",
        "glob(",
        "${nothing}",
    ]
    lines = []
    for module, asked in COMMANDS.items():
        for key in asked.keys:
            wrong = [
                value for value in spoiled if not (asked.keys[key].text and value.isdigit())
            ]  # a path may be digits
            for value in generator.sample(wrong, 3):
                lines.append((module, [*VALID[module], f"{key}={value}"]))
            name = list(key)
            at = generator.randrange(len(name))
            name[at] = generator.choice("qxz_")
            if "".join(name) not in asked.keys and not "".join(name).startswith("hydra"):
                lines.append((module, [*VALID[module], f"{generator.choice(['', '+', '++', '~'])}{''.join(name)}=1"]))
    return generator.sample(lines, 150)


def test_150_mutated_command_lines_are_each_one_line(command, tmp_path):
    for module, line in _mutations():
        code, out, err = command(module, *line)
        assert code == 2 and not out, (module, line, code)
        assert err.startswith("qbench: ") and err.count("\n") == 1 and len(err) < 1500, (module, line, err)
        assert not list(tmp_path.iterdir()), (module, line)


@pytest.mark.parametrize("module", COMMANDS)
def test_ctrl_c_before_a_run_begins_is_one_line(module, tmp_path):
    script = f"""
import os, signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test may run where it is ignored
from qbench.cli.main import run_command
sys.argv = {[module, *VALID[module]]}
threading.Timer(float(sys.stdin.read()), os.kill, (os.getpid(), signal.SIGINT)).start()
sys.exit(run_command({MAINS[module].__module__!r}))
"""
    for seconds in ("0.1", "0.5", "1", "2"):  # while Hydra is imported, while it composes, while PyTorch is imported
        line = [sys.executable, "-c", script]
        process = subprocess.run(line, cwd=tmp_path, input=seconds, capture_output=True, text=True)
        out, err = process.stdout, process.stderr
        if float(seconds) > 0.5 and process.returncode == 0:  # a fast machine was through by then
            continue
        assert process.returncode == 130 and not out, err
        assert err.startswith("qbench: interrupted") and err.count("\n") == 1, err


def test_a_run_folder_that_cannot_be_made_is_one_line(command, tmp_path):
    (tmp_path / "occupied").write_text("")
    code, _, err = command("qbench", "+format=nf4", "hydra.run.dir=occupied")
    assert code == 1 and err == "qbench: occupied: File exists\n"
    code, _, err = command("qbench", "+format=nf4", "hydra.run.dir=occupied/run")
    assert code == 1 and err == "qbench: occupied/run: Not a directory\n"


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="a file whose content cannot be read")
def test_weights_that_cannot_be_read_end_no_sweep(command, tiny_llama, tmp_path):
    broken = Path(shutil.copytree(tiny_llama, tmp_path / "broken"))
    (broken / "model.safetensors").unlink()
    (broken / "model.safetensors").symlink_to("/proc/self/mem")
    short = ["tune=none", "eval.tokens=100", "data.seq=32", "hydra.sweep.dir=out"]
    code, _, err = command("qbench", "-m", "+format=nf4", f"model.path={broken},{tiny_llama}", *short)
    assert code == 1 and "1 of 2 runs are done" in err and "Traceback" not in err
    results = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("*/result.json")]
    assert sorted(result["status"] for result in results) == ["done", "failed"]
