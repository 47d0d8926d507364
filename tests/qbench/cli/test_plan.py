"""The command `plan`: the command lines of a run that it takes, its answer, its files, its exit codes, and bad input."""

import json
import re
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import formats
from qbench import keys
from qbench.cli import command_line
from qbench.cli.commands import PLAN, RUN
from qbench.cli.plan import main
from qbench.errors import InputError
from qbench.settings import parts

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
        "tune.batch=1",
        "figure=a/bars.png",
        "json=a/x.json",
    ]
    code, out, err = command(*arguments)
    assert code == 0 and not err and out.startswith("Fits 24.00 GB, with ")
    assert all(len(line) <= 80 for line in out.splitlines())
    plan = json.loads((tmp_path / "a/x.json").read_text())
    assert plan["margin"] == 24 * GB - plan["needed"] == 24 * GB - sum(plan["moments"][plan["peak"]].values())
    for key in plan["assumptions"]:
        assert f"{key}=" in out, "every assumption is printed"
        assert key in keys.PLAN, "and a key"
    assert (tmp_path / "a/bars.png").stat().st_size > 5000
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["a", "bars.png", "x.json"]
    code, out, _ = command(*arguments[:3], "gpu=7GB")
    assert code == 1 and out.startswith("Does not fit 7.00 GB") and "would make it fit:" in out


RUN_LINES = [
    [],
    ["tune=qlora_paper", "data.path=docs", "eval.tasks=[qbench_docs]", "tune.steps=3"],
    ["tune=rslora", "tune.alpha=8", "tune.init=pissa", "tune.lr=1e-2", "timeout=60"],
    ["tune=none", "eval.limit=3", "track=[]"],
    ["tune.optimizer=paged_adamw", "tune.optimizer_budget=4MiB", "tune.optimizer_page=1MiB", "seed=3"],
    ["device=cuda:1", "model.dtype=float16", "data.seq=64", "tune.merge=true", "tune.adapter_format=int8"],
    ["model=default", "data=default", "hydra.run.dir=.", "tune.dropout=0.1", "device=cpu"],
]


@pytest.mark.parametrize("line", RUN_LINES, ids=" ".join)
def test_a_plan_takes_the_command_line_of_a_run(command, line, tmp_path):
    assert command_line.read(RUN, ["+format=nf4", *line])
    code, out, err = command("+format=nf4", *line)
    assert code == 0 and not err and out.startswith("bundled in nf4, block 64, ") and not list(tmp_path.iterdir())


VALUES = {
    "block": ["32", "256"],
    "dq": ["true"],
    "seed": ["7"],
    "device": ["auto", "cpu", "cuda", "cuda:3"],
    "timeout": ["null", "5"],
    "track": ["mlflow", "[wandb]", "null"],
    "model.path": ["null", "a/b", "2024"],
    "model.dtype": ["auto", "float32"],
    "model.revision": ["null", "main"],
    "model.trust_remote_code": ["true"],
    "data.path": ["docs"],
    "data.seq": ["auto", "33"],
    "eval.tokens": ["64"],
    "eval.tasks": ["a", "[a,b]"],
    "eval.limit": ["3"],
    "eval.batch": ["2"],
    "tune": ["lora", "dora", "rslora", "ia3", "prefix", "p_tuning", "full", "none", "qlora_paper"],
    "tune.method": ["lora", "full"],
    "tune.steps": ["3"],
    "tune.batch": ["8", "3"],
    "tune.accumulate": ["1", "2"],
    "tune.group_by_length": ["true"],
    "tune.checkpointing": ["true"],
    "tune.rank": ["4"],
    "tune.alpha": ["0.5"],
    "tune.dropout": ["0.5"],
    "tune.init": ["loftq", "pissa"],
    "tune.init_rounds": ["2"],
    "tune.virtual_tokens": ["4"],
    "tune.lr": ["1e-4"],
    "tune.schedule": ["constant"],
    "tune.warmup": ["0"],
    "tune.weight_decay": ["0.1"],
    "tune.clip": ["0.3"],
    "tune.optimizer": ["sgd", "paged_adamw_8bit"],
    "tune.optimizer_budget": ["null", "1GB"],
    "tune.optimizer_page": ["8192"],
    "tune.merge": ["true"],
    "tune.adapter_format": ["null"],
    "tune.adapter_block": ["32"],
}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(sorted(VALUES)), max_size=5, unique=True), st.data())
def test_a_plan_checks_a_command_line_as_a_run_does(names, data):
    line = ["+format=nf4", *(f"{name}={data.draw(st.sampled_from(VALUES[name]))}" for name in names)]

    def refusal(asked):
        try:
            command_line.read(replace(asked, check=asked.check if asked is PLAN else check_run), line)
        except InputError as error:
            return str(error)

    assert set(VALUES) - {"tune"} == set(keys.RUN)
    assert refusal(PLAN) == refusal(RUN), line


def check_run(config):
    """What a run checks, but for trackers that are not installed."""
    parts(config)


RENAMED = {
    "rank=64": "rank is now tune.rank; type tune.rank=64",
    "+batch=1": "batch is now tune.batch; type tune.batch=1",
    "method=full": "method is now tune; type tune=full",
    "seq=512": "seq is now data.seq; type data.seq=512",
    "accumulate=2": "accumulate is now tune.accumulate; type tune.accumulate=2",
    "checkpointing=true": "checkpointing is now tune.checkpointing; type tune.checkpointing=true",
    "optimizer=sgd": "optimizer is now tune.optimizer; type tune.optimizer=sgd",
    "dropout=0.1": "dropout is now tune.dropout; type tune.dropout=0.1",
    "~rank": "rank is now tune.rank; type tune.rank=VALUE",
}


@pytest.mark.parametrize("argument", RENAMED)
def test_a_renamed_key_is_refused_with_its_new_name(command, argument):
    assert command("+format=nf4", argument) == (2, "", f"qbench: plan: {RENAMED[argument]}\n")


@pytest.mark.thorough
def test_the_exit_code_tells_whether_it_fits(command):
    line = ["+format=nf4", "device=cpu"]
    needed = 300 * 10**6
    assert [command(*line, *gpu)[0] for gpu in ([], [f"gpu={needed}"], ["gpu=1MB"], ["gpu=1"])] == [0, 0, 1, 2]
    sweep = ["sweep=true", "blocks=[64]", "device=cpu"]
    assert [command(*sweep, f"gpu={gpu}")[0] for gpu in ("1GB", "1MB")] == [0, 1]


def test_a_full_fine_tune_is_counted_in_fp32_as_a_run_trains_it(command, tmp_path):
    assert command("+format=none", "tune=full", "json=x.json")[0] == 0
    plan = json.loads((tmp_path / "x.json").read_text())
    lines, parameters = plan["moments"]["step"], plan["parameters"]["all"]
    weights = lines["weights"] + lines["embeddings"] + lines["head"] + lines["norms"]
    assert 0 <= weights - 4 * parameters < 1000, "and some buffers"
    assert lines["gradients"] == 4 * parameters and lines["states"] == 8 * parameters


def test_a_budget_of_optimizer_states_stays_on_the_device(command, tmp_path):
    states = {}
    for budget in ("null", "4MiB", "1GB"):
        line = ["tune.optimizer=paged_adamw", f"tune.optimizer_budget={budget}", "json=x.json"]
        assert command("+format=nf4", *line)[0] == 0
        plan = json.loads((tmp_path / "x.json").read_text())
        states[budget] = plan["moments"]["step"]["states"], plan["paged"]["states"]
    everything = states["null"][1]
    assert states == {"null": (0, everything), "4MiB": (4 * 2**20, everything - 4 * 2**20), "1GB": (everything, 0)}


def test_paging_names_the_budget_that_a_run_needs(command, tmp_path):
    line = ["+format=nf4", "tune.optimizer=paged_adamw", "tune.rank=64"]
    command(*line, "json=x.json")
    plan = json.loads((tmp_path / "x.json").read_text())
    gpu = f"gpu={plan['needed'] + plan['paged']['states'] // 2}"
    code, out, _ = command(*line, gpu)
    budget = re.search(r"tune\.optimizer_budget=\d+MiB", " ".join(out.split()))
    assert code == 0 and budget
    code, out, _ = command(*line, gpu, budget[0])
    assert code == 0 and "Beyond the budget" in " ".join(out.split())


def test_a_config_file_and_a_sweep_of_it(command, any_model):
    code, out, _ = command(f"model={any_model}/config.json", "sweep=true", "blocks=[32]", "gpu=600MB", "data.seq=64")
    assert code == 0 and re.search(r"\d+ of \d+ formats fit 600\.0 MB", out)
    assert all(name in out for name in formats.names() if name != "none") and "16 bit" in out


@pytest.mark.thorough
def test_the_paper_in_a_command(command):
    code, out, _ = command("paper=true")
    assert code == 0 and "llama-65b" in out and "37,074" in out and "paged_adamw" in out


BAD = {
    "unknown model": (["model=llama-66b", "+format=nf4"], r"model: 'llama-66b' is unknown; accepted: .*llama-65b"),
    "broken config": (["model=broken.json", "+format=nf4"], r"model: 'broken\.json' could not be read: .*accepted: "),
    "no causal LM": (["model=vit.json", "+format=nf4"], r"model: 'vit\.json' is not a causal LM: "),
    "no format": (["model=bundled"], r"format: none is given; accepted: .*\+format=nf4"),
    "unknown format": (["model=bundled", "+format=nf5"], r"nf5.*accepted: fp4.*quantile"),
    "block": (["model=bundled", "+format=nf4", "block=0"], r"block: 0 is not accepted; an integer of at least 1"),
    "gpu": (["model=bundled", "+format=nf4", "gpu=foo"], r"gpu: 'foo' is not accepted; .*24GB"),
    "gpu without a unit": (
        ["model=bundled", "+format=nf4", "gpu=48"],
        r"gpu: 48 is not accepted; .*1000000 or more, such as 24GB",
    ),
    "batch": (
        ["model=bundled", "+format=nf4", "tune.batch=-1"],
        r"tune\.batch: -1 is not accepted; an integer of at least 1",
    ),
    "seq": (
        ["model=bundled", "+format=nf4", "data.seq=1025"],
        r"data\.seq: 1025 is more than the model's 1024 positions",
    ),
    "rank": (
        ["model=bundled", "+format=nf4", "tune.rank=300"],
        r"tune\.rank: 300 is larger than .*q_proj.*accepted: 1 to 256",
    ),
    "targets": (["model=bundled", "+format=nf4", "targets=[w]"], r"targets: .*'w'; accepted: all, .*q_proj"),
    "method": (["model=bundled", "+format=nf4", "tune=full"], r"tune\.method: full .*\+format=none"),
    "optimizer": (["model=bundled", "+format=nf4", "tune.optimizer=lion"], r"tune\.optimizer: 'lion'.*paged_adamw"),
    "dtype": (["model=bundled", "+format=nf4", "dtype.head=int3"], r"dtype\.head: 'int3'.*bfloat16"),
    "fragmentation": (["model=bundled", "+format=nf4", "fragmentation=-1"], r"fragmentation: -1.*at least 0"),
    "typo": (["model=bundled", "+format=nf4", "blok=32"], r"blok is unknown; did you mean block\?"),
    "blocks": (
        ["model=bundled", "sweep=true", "blocks=[0]"],
        r"blocks: \[0\] is not accepted; a list of integers of at least 1",
    ),
    "sweep": (["model=bundled", "sweep=maybe"], r"sweep: 'maybe' is not accepted; true or false"),
    "sweep of full": (["model=bundled", "sweep=true", "tune=full"], r"sweep: tune=full .*lora, dora, rslora, none"),
    "multirun": (["-m", "model=bundled"], r"--multirun: .*sweep=true"),
    "a method that is not counted": (
        ["model=bundled", "+format=nf4", "tune=ia3"],
        r"tune\.method: the memory of ia3 is not counted; accepted in a plan: lora, dora, rslora, full, none",
    ),
    "named sweep": (["+experiments=quick"], r"--multirun: .*sweep=true"),
    "check": (["model=bundled", "+format=nf4", "check=true", "tune=none"], r"check: tune=none trains nothing"),
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
