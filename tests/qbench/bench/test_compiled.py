"""Every kernel configuration compiles without a GPU: no spills, enough shared memory, no more instructions than recorded.

`python -m qbench bench compile --out tests/qbench/bench/compiled-X.Y.json` makes a new record for a release of Triton.
There are records for the release of requirements.lock and for the newest.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from qbench.bench import compiled

TRITON = ".".join(version("triton").split(".")[:2])
RECORD = Path(__file__).parent / f"compiled-{TRITON}.json"
SLACK = 1.1  # for patch releases
recorded = pytest.mark.skipif(not RECORD.exists(), reason=f"nothing is recorded for Triton {TRITON}")
compiles = pytest.mark.thorough


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """Compiled in another process, because this one interprets its kernels."""
    file = tmp_path_factory.mktemp("compiled") / "compiled.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "qbench.bench", "compile", "--out", str(file)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return [compiled.Compiled(**kernel) for kernel in json.loads(file.read_text())]


@compiles
def test_every_configuration_of_every_device_is_there(kernels):
    expected = [(kernel.name, kernel.capability) for c in compiled.DEVICES for kernel in compiled.configurations(c)]
    assert [(kernel.name, kernel.capability) for kernel in kernels] == expected


def record():
    return {(kernel["name"], kernel["capability"]): kernel for kernel in json.loads(RECORD.read_text())}


@compiles
@recorded
def test_nothing_spills(kernels):
    """Except where a release of Triton is known to spill."""
    known = record()
    assert not [kernel for kernel in kernels if kernel.spills > known[kernel.name, kernel.capability]["spills"]]
    assert sum(kernel["spills"] for kernel in known.values()) <= 8


@compiles
def test_shared_memory_suffices(kernels):
    assert not [kernel for kernel in kernels if kernel.shared > compiled.DEVICES[kernel.capability][1]]


@compiles
@recorded
def test_no_kernel_takes_more_instructions_than_recorded(kernels):
    known = record()
    slower = {
        (kernel.name, kernel.capability): (kernel.instructions, known[kernel.name, kernel.capability]["instructions"])
        for kernel in kernels
        if kernel.instructions > SLACK * known[kernel.name, kernel.capability]["instructions"]
    }
    assert not slower


def test_an_interpreted_kernel_is_not_compiled(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compiled.compile_kernel(compiled.configurations(90)[0])


def test_loops_are_counted():
    code = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0020*/                   ISETP.GE.AND P0, PT, R1, 0x8, PT ;
        /*0030*/              @!P0 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
.L_x_1:
        /*0050*/                   BRA `(.L_x_1);
"""
    assert compiled.longest_loop(code) == 3
    assert compiled.longest_loop("        /*0000*/                   EXIT ;") == 1
