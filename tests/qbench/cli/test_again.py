"""The same command again: it finds its run, finished or not; and what was not done is told as it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qbench.cli import run as main
from qbench.results import provenance, store
from qbench.runs import experiment, fine_tuning, inputs
from qbench.system import files

SHORT = ["eval.tokens=100", "data.seq=32", "tune.steps=2", "tune.batch=2", "tune.rank=2"]


@pytest.fixture
def command(tmp_path, monkeypatch, capfd, tiny_llama):
    """Run the main command in an empty folder; returns its exit code and what it wrote on standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["qbench", *arguments, f"model.path={tiny_llama}", *SHORT])
        code = main.main()
        return code, capfd.readouterr().err

    return run


def left() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_a_single_run_is_found_again(command, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(experiment, "_carry_out", interrupt)
        code, said = command("+format=nf4")
    assert code == 130 and said.endswith("qbench: interrupted; nothing had been measured\n")
    assert left() == [], "a run that never began leaves nothing"
    with monkeypatch.context() as patch:
        patch.setattr(fine_tuning, "train", interrupt)
        code, said = command("+format=nf4")
    (file,) = Path().glob("runs/*/result.json")
    assert code == 130 and f"interrupted; what was measured is in {file}; the same command does this run again" in said
    assert "quantized" in store.read(file)["metrics"]["quality"]
    code, said = command("+format=nf4")
    result = store.read(file)
    assert code == 0 and result["status"] == "done" and "done already" not in said
    code, said = command("+format=nf4")
    assert code == 0 and f"this run is done already; to repeat it, remove {file.parent} first" in said
    assert store.read(file) == result and [file] == list(Path().glob("runs/*/result.json"))
    with files.locked(file.parent):
        code, said = command("+format=nf4")
    assert code == 1 and "is in use by another process" in said and store.read(file) == result


def test_a_refused_run_leaves_nothing(command, tmp_path):
    (tmp_path / "short.txt").write_text("In the beginning.")
    code, _ = command("+format=nf4", "data.path=short.txt")
    assert code == 2 and left() == ["short.txt"]
    code, _ = command("+format=nf4", "track=wandb")
    assert code == 2 and left() == ["short.txt"]


def test_a_sweep_counts_what_was_asked(command):
    """Not what it finds."""
    sweep = ["-m", "+format=nf4", "block=32,64", "hydra.sweep.dir=s"]
    assert command(*sweep)[0] == 0
    first, second = sorted(Path("s").glob("*/result.json"))
    with files.locked(first.parent):
        code, said = command(*sweep)
    assert code == 1 and "1 of 2 runs are done in s" in said and f"  {first.parent}: running elsewhere\n" in said
    first.unlink()
    second.unlink()
    first.mkdir()  # so that it cannot be written
    code, said = command(*sweep)
    assert code == 1 and "1 of 2 runs are done in s" in said and f"  {first.parent}: IsADirectoryError: " in said
    assert "traceback in" not in said, "result.json tells nothing"


def test_a_failure_beside_a_finished_result_is_told_and_undoes_nothing(command, monkeypatch):
    sweep = ["-m", "+format=nf4", "hydra.sweep.dir=s"]
    assert command(*sweep)[0] == 0
    (file,) = Path("s").glob("*/result.json")
    before = file.read_bytes()
    for arguments in (["timeout=0.01"], ["track=wandb"], ["track=nonsense"]):
        code, said = command(*sweep, *arguments)
        assert code in (1, 2) and file.read_bytes() == before and list(file.parent.glob("result*")) == [file], said
    monkeypatch.setattr(provenance, "code_digest", lambda: "other")  # another run, in the same folder

    def refused(*_):
        raise OSError("no such luck")

    monkeypatch.setattr(inputs, "load_model", refused)
    code, said = command(*sweep)
    assert code == 1 and file.read_bytes() == before and list(file.parent.glob("result*")) == [file]
    assert f"{file.parent}: OSError: no such luck; the result that had finished there stays" in said


NATIVE = """
import ctypes, sys
from qbench.cli import jobs, run
from qbench.runs import scoring

def native(*_):
    mutex, library = ctypes.create_string_buffer(64), ctypes.CDLL(None)
    for _ in range(2):  # the second time it waits for the first, whatever signal comes
        library.pthread_mutex_lock(mutex)

scoring.measure_quantized = native
jobs.GRACE = 1
sys.exit(run.main())
"""


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="a run has a process of its own on Linux")
def test_a_timeout_ends_native_code(tmp_path, tiny_llama):
    command = [sys.executable, "-c", NATIVE, "+format=nf4", "timeout=4", f"model.path={tiny_llama}", *SHORT]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    (file,) = tmp_path.glob("runs/*/result.json")
    assert "RunTimeout: the run took longer than timeout=4 s (traceback in runs/" in done.stderr
    assert done.returncode == 1 and json.loads(file.read_text())["error"]["type"] == "RunTimeout"


@pytest.mark.parametrize("value", ["0", "-1", "x", "inf", "nan", "true"])
def test_a_timeout_is_a_positive_number(command, value):
    code, said = command("+format=nf4", f"timeout={value}")
    assert code == 2 and said.startswith("qbench: timeout: ") and said.count("\n") == 1 and left() == []
