"""Sweeps go on where they ended, however they ended, and nothing that had finished is lost or done twice."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from qbench.cli import run as command
from qbench.cli import time_limit

KILLS = int(os.environ.get("QBENCH_KILLS", 2))  # 20 for the full test
pytestmark = pytest.mark.slow
SWEEP = ["-m", "+format=nf4,int4,int8", "block=32,64", "dq=false,true", "eval.tokens=100", "data.seq=32"]
SWEEP += ["tune.steps=2", "tune.batch=2", "tune.rank=2"]

FEW = ["-m", "+format=nf4,int8", "block=32,64", "dq=true", *SWEEP[4:]]
TWO = ["-m", "+format=nf4,int8", "block=64", "dq=true", *SWEEP[4:]]


def start(folder: Path, model: Path, *arguments: str, sweep=SWEEP) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "qbench", *sweep, f"model.path={model}", f"hydra.sweep.dir={folder}", *arguments]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def results(folder: Path) -> dict[str, dict]:
    """Every result that can be read, by the name of its folder."""
    by_name = {}
    for file in folder.glob("*/result.json"):
        by_name[file.parent.name] = json.loads(file.read_text())
    return by_name


def decided(result: dict) -> dict:
    """What the configuration, the code, the weights and the text decide."""
    metrics = result["metrics"]
    kept = {key: metrics[key] for key in ("error", "bits", "quality")} | {"loss": metrics["tune"]["loss"]}
    return {"id": result["run"]["id"], "config": result["config"], **kept}


@pytest.fixture(scope="module")
def undisturbed(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    process = start(folder, tiny_llama)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "12 of 12 runs are done" in output
    by_name = results(folder)
    assert len(by_name) == 12
    return by_name


@pytest.mark.thorough
def test_killed_and_started_again_and_again(tiny_llama, tmp_path, undisturbed):
    generator = random.Random(0)
    done: dict[str, str] = {}
    for _ in range(KILLS):
        process = start(tmp_path, tiny_llama)
        time.sleep(generator.uniform(3, 15))  # from the imports on to the last run
        process.send_signal(signal.SIGKILL)
        process.wait()
        now = {name: r["run"]["started"] for name, r in results(tmp_path).items() if r["status"] == "done"}
        assert done.items() <= now.items(), "a finished run was lost or done again"
        done = now
    process = start(tmp_path, tiny_llama)
    output, _ = process.communicate()
    assert process.returncode == 0 and "12 of 12 runs are done" in output, output
    by_name = results(tmp_path)
    assert done.items() <= {name: r["run"]["started"] for name, r in by_name.items()}.items()
    assert {name: decided(r) for name, r in by_name.items()} == {name: decided(r) for name, r in undisturbed.items()}


@pytest.mark.thorough
def test_what_the_runs_share_is_measured_once(undisturbed):
    made = [r["run"]["baseline"] for r in undisturbed.values()]
    assert len({b["id"] for b in made}) == 1 and sum(not b["reused"] for b in made) == 1
    first, *others = (r["metrics"] for r in undisturbed.values())
    for other in others:
        for key in ("quality", "throughput"):
            assert other[key]["baseline"] == first[key]["baseline"]


@pytest.mark.thorough
def test_peak_memory_is_the_runs_own(undisturbed):
    """But for the first of a format, which may have its kernels compiled."""
    in_order = sorted(undisturbed.values(), key=lambda r: r["run"]["started"])
    names = [r["config"]["format"]["name"] for r in in_order]
    after_others = [r["metrics"] for i, r in enumerate(in_order) if names[i] in names[:i]]
    peaks = [metrics["memory"]["peak_bytes"]["quantize"]["rss"] for metrics in after_others]
    assert len(peaks) == 9 and max(peaks) < 1.05 * min(peaks), "a run is charged for those before it"


@pytest.mark.thorough
def test_a_run_that_is_killed_is_a_row(tiny_llama, tmp_path):
    """As the system does when memory runs out; the parent of the run goes on."""
    process = start(tmp_path, tiny_llama, sweep=["-m", "+format=nf4", "block=64,32", "tune.steps=100000", *SWEEP[4:7]])
    started = time.monotonic()
    for _ in range(2):
        before = len(results(tmp_path))
        while len(results(tmp_path)) == before and time.monotonic() - started < 120:
            time.sleep(0.2)
            for child in psutil.Process(process.pid).children():
                if time.time() - child.create_time() > 1:
                    child.kill()
    output, _ = process.communicate()
    by_name = list(results(tmp_path).values())
    assert process.returncode == 1 and "0 of 2 runs are done" in output
    assert [(r["status"], r["error"]["type"]) for r in by_name] == [("oom", "MemoryError")] * 2
    assert not (tmp_path / "baselines").exists()


def test_16_bit_runs_once_whatever_the_block(sweep, tmp_path):
    code, said = sweep("+format=none", "block=32,64", "dq=false,true")
    assert code == 0 and "1 of 1 runs are done" in said and len(results(tmp_path / "out")) == 1


@pytest.mark.thorough
def test_two_at_once_on_one_folder(tiny_llama, tmp_path, undisturbed):
    processes = [start(tmp_path, tiny_llama, sweep=FEW) for _ in range(2)]
    outputs = [process.communicate()[0] for process in processes]
    final = start(tmp_path, tiny_llama, sweep=FEW)
    output, _ = final.communicate()
    assert final.returncode == 0 and "4 of 4 runs are done" in output, (outputs, output)
    assert all(decided(result) == decided(undisturbed[name]) for name, result in results(tmp_path).items())


@pytest.mark.thorough
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_other_launchers_give_the_same(launcher, tiny_llama, tmp_path, undisturbed):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    process = start(tmp_path, tiny_llama, f"hydra/launcher={launcher}", sweep=TWO)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    by_name = results(tmp_path)
    assert len(by_name) == 2 and "2 of 2 runs are done" in output
    assert all(decided(r) == decided(undisturbed[name]) for name, r in by_name.items())


@pytest.fixture
def sweep(tmp_path, monkeypatch, capfd, tiny_llama):
    """Run a sweep in this process; returns the exit code and standard error."""

    def run(*arguments: str):
        monkeypatch.chdir(tmp_path)
        line = ["qbench", "-m", *SWEEP[4:], f"model.path={tiny_llama}", *arguments, "hydra.sweep.dir=out"]
        monkeypatch.setattr(sys, "argv", line)
        return command.main(), capfd.readouterr().err

    return run


def test_a_failure_is_a_row_and_the_sweep_goes_on(sweep, tmp_path):
    code, said = sweep("+format=nf4", "block=0,64", "tune.lr=0.001,1e30")
    by_name = results(tmp_path / "out")
    assert code == 1 and len(by_name) == 4 and "1 of 4 runs are done" in said
    kinds = sorted((r["status"], (r["error"] or {}).get("type")) for r in by_name.values() if r["status"] != "done")
    assert kinds == [("failed", "FloatingPointError"), ("failed", "InputError"), ("failed", "InputError")]
    assert "block: 0 is not accepted" in said and "no finite likelihood" in said


def test_a_run_that_takes_too_long_is_a_row(sweep, tmp_path):
    code, said = sweep("+format=nf4", "timeout=0.05")
    (result,) = results(tmp_path / "out").values()
    assert code == 1 and result["error"]["type"] == "RunTimeout" and "timeout=0.05" in said
    assert sweep("+format=nf4", "timeout=600")[0] == 0, "the limit is no part of what a run is"
    assert len(results(tmp_path / "out")) == 1


@pytest.mark.thorough
def test_a_truncated_or_foreign_result_is_done_again(sweep, tmp_path):
    assert sweep("+format=nf4")[0] == 0
    (file,) = (tmp_path / "out").glob("*/result.json")
    for content in ("", '{"schema": 1, "stat', "[]", '"text"', "\x00\x00"):
        file.write_text(content)
        code, said = sweep("+format=nf4")
        assert code == 0 and "1 of 1" in said and results(tmp_path / "out").popitem()[1]["status"] == "done"


@pytest.mark.thorough
def test_changed_code_sets_the_old_result_aside(sweep, tmp_path, monkeypatch):
    assert sweep("+format=nf4")[0] == 0
    (file,) = (tmp_path / "out").glob("*/result.json")
    old = file.read_text()
    monkeypatch.setattr("qbench.results.provenance.code_digest", lambda: "other code")
    assert sweep("+format=nf4")[0] == 0
    aside = file.with_name(f"result-{json.loads(old)['run']['id']}.json")
    assert aside.read_text() == old
    assert json.loads(file.read_text())["run"]["id"] != json.loads(old)["run"]["id"]


def test_the_same_command_has_the_same_folder():
    folder = command.sweep_folder
    assert folder(["+format=nf4"]) is None
    assert folder(["-m", "a=1", "b=2"]) == folder(["b=2", "-m", "a=1", "timeout=3"])
    assert folder(["-m", "a=1"]) != folder(["-m", "a=2"])
    assert folder(["+experiments=quick"]).name.startswith("quick-")
    assert folder(["-m", "hydra.sweep.dir=x"]) == Path("x")


def test_time_limit_is_lifted():
    with time_limit.time_limit(0.2):
        pass
    time.sleep(0.3)
