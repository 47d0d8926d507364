"""What a system lacks: each module can be imported without it, and the main job runs without all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: of Linux and macOS; what this system's psutil and portalocker need of them, they have by then
POSIX = "import sys, psutil, portalocker\n"
IMPORTS = (
    POSIX
    + """
import importlib, json, pkgutil
if sys.argv[1] != "CUDA":
    sys.modules[sys.argv[1]] = None
import formats, qbench
failed = {}
for package in formats, qbench:
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            failed[module.name] = str(error)
import torch
w = torch.linspace(-1, 1, 1000)
error = formats.get("nf4", dq=True).quantize(w).dequantize() - w
print(json.dumps([failed, error.abs().max().item(), torch.cuda.is_available()]))
"""
)
#: modules of kernels, which need what they are written in
NEEDED = {
    "numba": {"qbench.ops.cpu", "qbench.ops.threads", "qbench.ops.avx512"},
    "triton": {"qbench.ops.kernels"},
}
TAKEN = (
    POSIX
    + """
import os, signal
for name in "resource", "fcntl", "triton":
    sys.modules[name] = None
for name in "SIGALRM", "setitimer", "getitimer", "alarm":
    delattr(signal, name)
del os.fork
from qbench.__main__ import main
sys.exit(main())
"""
)


def python(code: str, *arguments: object, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "", **environment}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8", errors="replace"
    )


@pytest.mark.parametrize(
    "missing",
    [
        "numba",
        *(
            pytest.param(name, marks=pytest.mark.thorough)
            for name in ("CUDA", "triton", "resource", "bitsandbytes", "fcntl")
        ),
    ],
)
def test_every_module_can_be_imported_without(missing, tmp_path):
    done = python(IMPORTS, missing, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    failed, error, cuda = json.loads(done.stdout.splitlines()[-1])
    assert set(failed) == NEEDED.get(missing, set()) and 0 < error < 0.2 and not cuda
    assert all(f"'{missing}'" in why or f" {missing} " in why for why in failed.values()), failed
    messages = [line for line in done.stderr.splitlines() if "qbench: " in line]
    assert len(messages) == (missing == "numba") and all("pip install numba" in line for line in messages)


@pytest.fixture(scope="module")
def without(tiny_llama, tmp_path_factory):
    """The main job where there is no Linux: no forks, alarms, locks or limits of POSIX, no Triton, no UTF-8."""
    folder = tmp_path_factory.mktemp("without")
    short = "eval.tokens=200", "data.seq=32", "tune.batch=2", f"model.path={tiny_llama}"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "cp1252"}

    def run(*arguments: str) -> tuple[int, str, dict]:
        name = f"out{len(list(folder.iterdir()))}"
        done = python(TAKEN, "+format=nf4", *short, *arguments, f"hydra.run.dir={name}", folder=folder, **plain)
        return done.returncode, done.stderr, json.loads((folder / name / "result.json").read_text("utf-8"))

    return run


def test_the_main_job_runs_without_linux(without):
    code, stderr, result = without("tune.steps=1")
    assert code == 0, stderr
    assert result["status"] == "done" and result["metrics"]["memory"]["peak_bytes"]["tune"]["rss"] > 1e8
    assert "Traceback" not in stderr


@pytest.mark.thorough
def test_it_is_stopped_in_time_as_well(without):
    code, stderr, result = without("tune.steps=100000", "timeout=4")
    assert code == 1 and "RunTimeout: the run took longer than timeout=4 s" in stderr
    assert result["status"] == "failed" and result["error"]["type"] == "RunTimeout"
