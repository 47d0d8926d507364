"""The plan's command: its answer in words, what it writes, and its answers to bad input."""

import json
import re
import sys

import pytest

import formats
from qbench.cli.commands import CONF
from qbench.cli.plan import main

GB = 10**9


@pytest.fixture
def command(monkeypatch, capfd, tmp_path):
    """Run the command in an empty folder; returns exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["qbench.plan", *map(str, arguments)])
        return main(), *capfd.readouterr()

    return run


def test_the_command_answers_in_words_and_writes_where_it_is_asked(command, tmp_path):
    arguments = [
        "model=llama-7b",
        "+format=nf4",
        "dq=true",
        "gpu=24GB",
        "batch=1",
        "figure=a/bars.png",
        "json=a/x.json",
    ]
    code, out, err = command(*arguments)
    assert code == 0 and not err and out.startswith("Fits 24.00 GB, with ")
    assert all(len(line) <= 80 for line in out.splitlines())
    told = json.loads((tmp_path / "a/x.json").read_text())
    assert told["margin"] == 24 * GB - told["needed"] == 24 * GB - sum(told["moments"][told["peak"]].values())
    for key in told["assumptions"]:
        assert f"{key}=" in out, "every assumption is printed"
        assert re.search(rf"^\s*{key.rpartition('.')[2]}:", (CONF / "plan/config.yaml").read_text(), re.M), "and a key"
    assert (tmp_path / "a/bars.png").stat().st_size > 5000
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a", "bars.png", "x.json"]
    code, out, _ = command(*arguments[:3], "gpu=7GB")
    assert code == 0 and out.startswith("Does not fit 7.00 GB") and "What would change that" in out


def test_a_config_file_and_a_sweep_of_it(command, any_model):
    code, out, _ = command(f"model={any_model}/config.json", "sweep=true", "blocks=[32]", "gpu=600MB", "seq=64")
    assert code == 0 and re.search(r"\d+ of \d+ formats fit 600\.0 MB", out)
    assert all(name in out for name in formats.names() if name != "none") and "16 bit" in out


def test_the_paper_in_a_command(command):
    code, out, _ = command("paper=true")
    assert code == 0 and "llama-65b" in out and "37,074" in out and "paged_adamw" in out


BAD = {
    "no model": (["+format=nf4"], r"model: none is given; accepted: .*llama-65b"),
    "unknown model": (["model=llama-66b", "+format=nf4"], r"model: 'llama-66b' is unknown; accepted: .*llama-65b"),
    "broken config": (["model=broken.json", "+format=nf4"], r"model: 'broken\.json' could not be read: .*accepted: "),
    "no causal LM": (["model=vit.json", "+format=nf4"], r"model: no causal LM comes of 'vit\.json'"),
    "no format": (["model=bundled"], r"format: none is given; accepted: .*\+format=nf4"),
    "unknown format": (["model=bundled", "+format=nf5"], r"nf5.*accepted: fp4.*quantile"),
    "block": (["model=bundled", "+format=nf4", "block=0"], r"block: 0 is not accepted; an integer of at least 1"),
    "gpu": (["model=bundled", "+format=nf4", "gpu=foo"], r"gpu: 'foo' is unknown; accepted: .*24GB"),
    "gpu without a unit": (["model=bundled", "+format=nf4", "gpu=48"], r"gpu: 48 is unknown; accepted: .*unit"),
    "batch": (["model=bundled", "+format=nf4", "batch=-1"], r"batch: -1 is not accepted; an integer of at least 1"),
    "seq": (["model=bundled", "+format=nf4", "seq=1025"], r"seq: 1025 is more than the model's 1024 positions"),
    "rank": (["model=bundled", "+format=nf4", "rank=300"], r"rank: 300 is larger than .*q_proj.*accepted: 1 to 256"),
    "targets": (["model=bundled", "+format=nf4", "targets=[w]"], r"targets: .*'w'; accepted: all, .*q_proj"),
    "method": (["model=bundled", "+format=nf4", "method=full"], r"method: full .*\+format=none"),
    "optimizer": (["model=bundled", "+format=nf4", "optimizer=lion"], r"optimizer: 'lion'.*paged_adamw"),
    "dtype": (["model=bundled", "+format=nf4", "dtype.head=int3"], r"dtype\.head: 'int3'.*bfloat16"),
    "fragmentation": (["model=bundled", "+format=nf4", "fragmentation=-1"], r"fragmentation: -1.*at least 0"),
    "typo": (["model=bundled", "+format=nf4", "blok=32"], r"blok is unknown; did you mean block\?"),
    "blocks": (
        ["model=bundled", "sweep=true", "blocks=[0]"],
        r"blocks: \[0\] is not accepted; a list of integers of at least 1",
    ),
    "sweep": (["model=bundled", "sweep=maybe"], r"sweep: 'maybe' is not accepted; true or false"),
    "sweep of full": (["model=bundled", "sweep=true", "method=full"], r"sweep: method=full .*accepted: lora, none"),
    "multirun": (["-m", "model=bundled"], r"--multirun: .*sweep=true"),
    "check": (["model=bundled", "+format=nf4", "check=true", "method=none"], r"check: takes a step of method=lora"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(command, case, tmp_path):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "vit.json").write_text('{"model_type": "vit"}')
    arguments, expected = BAD[case]
    code, out, err = command(*arguments)
    assert code == 2 and not out
    lines = err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("qbench: "), err
    assert re.search(expected, lines[0]), lines[0]
