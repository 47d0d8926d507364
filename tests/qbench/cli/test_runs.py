"""The list of the folders of runs, and the removal of those without a finished result."""

import os
import sys
from pathlib import Path

import pytest

from qbench.cli import runs
from qbench.errors import InputError
from qbench.results import store
from qbench.system import files
from tests.qbench.sample_results import finished

EMPTY = "nf4_block64_dq-False_seed0_12345678"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Runs that are done, failed, killed, empty, set aside, in progress, and one among files of others."""
    monkeypatch.chdir(tmp_path)
    failed = store.new_result({"format": {"name": "nf4"}, "block": 64, "dq": True})
    failed["error"] = store.describe_error(InputError("no"))
    for name, result in {"done": finished("nf4"), "failed": failed, "busy": failed, "others": failed}.items():
        store.write(Path("runs") / name, result)
    (Path("runs") / "killed" / ".hydra").mkdir(parents=True)
    (Path("runs") / "killed" / ".lock").touch()
    (Path("runs") / EMPTY).mkdir()
    (Path("runs") / "mine").mkdir()
    (Path("runs") / "busy" / ".lock").touch()
    store.write(Path("runs") / "aside", failed)
    os.rename(store.write(Path("runs") / "aside2", finished("int8")), "runs/aside/result-1234.json")
    os.rmdir("runs/aside2")
    (Path("runs") / "others" / "thesis.tex").touch()
    (Path("runs") / "sweep" / "one" / ".hydra").mkdir(parents=True)
    (Path("runs") / "sweep" / "multirun.yaml").touch()
    return Path("runs")


@pytest.fixture
def command(folder, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["qbench.runs", *arguments])
        with files.locked(folder / "busy"):
            code = runs.main()
        return code, *capsys.readouterr()

    return run


def test_each_run_is_a_line(command):
    code, said, _ = command()
    rows = {line.split()[0]: line for line in said.splitlines()[1:]}
    assert code == 0 and list(rows) == [
        f"runs/{name}" for name in ("aside", "busy", "done", "failed", "killed", EMPTY, "others", "sweep/one")
    ]
    assert "nf4 + dq, block 64" in rows["runs/failed"] and "InputError" in rows["runs/failed"]
    assert "nf4" in rows["runs/done"] and "done" in rows["runs/done"].split("done", 1)[1]
    assert "running" in rows["runs/busy"] and "no result" in rows["runs/killed"]


def test_clean_removes_what_holds_no_finished_result_after_showing_it(command, folder, monkeypatch):
    before = sorted(folder.rglob("*"))
    for answer in ("n", "", EOFError()):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: _say(answer))
        code, said, _ = command("--clean")
        assert code == 0 and "runs/killed" in said and "runs/done" not in said and "nothing was removed" in said
        assert sorted(folder.rglob("*")) == before
    monkeypatch.setattr("builtins.input", lambda question: "y")
    code, said, error = command("--clean")
    assert code == 0 and "runs/others stays: no run wrote thesis.tex" in error
    assert sorted(file.name for file in folder.iterdir()) == ["aside", "busy", "done", "mine", "others"]
    code, said, _ = command("--clean", "--yes")
    assert "runs/others" in said and (folder / "others" / "thesis.tex").exists()


def _say(answer):
    if isinstance(answer, Exception):
        raise answer
    return answer


def test_a_run_that_began_meanwhile_stays(folder, monkeypatch):
    left = [runs.read(folder / "failed"), runs.read(folder / "killed")]
    store.write(folder / "failed", finished("nf4"))
    with files.locked(folder / "killed"):
        runs.clean(left, [folder], True)
    assert (folder / "failed" / store.FILE).exists() and (folder / "killed").exists()


def test_what_is_no_folder_is_named(command):
    code, _, error = command("nowhere")
    assert code == 2 and error == "qbench: nowhere is not a folder; accepted: folders of runs or sweeps\n"
