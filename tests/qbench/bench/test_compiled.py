"""Every kernel configuration compiles for GPUs that are not here, without a spill, within their shared memory, and in no
more instructions a weight than recorded.

`python -m qbench.bench compile --out tests/qbench/bench/compiled-X.Y.json` records anew, for a release of Triton: that of
requirements.lock, and the newest.
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
SLACK = 1.1  # of releases that differ in their last number
recorded = pytest.mark.skipif(not RECORD.exists(), reason=f"nothing is recorded for Triton {TRITON}")
compiles = pytest.mark.thorough


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """In a process of its own: this one interprets its kernels."""
    file = tmp_path_factory.mktemp("compiled") / "compiled.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "qbench.bench", "compile", "--out", str(file)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    return [compiled.Compiled(**one) for one in json.loads(file.read_text())]


@compiles
def test_every_configuration_of_every_device_is_there(found):
    expected = [(one.name, one.capability) for c in compiled.DEVICES for one in compiled.configurations(c)]
    assert [(one.name, one.capability) for one in found] == expected


def record():
    return {(one["name"], one["capability"]): one for one in json.loads(RECORD.read_text())}


@compiles
@recorded
def test_nothing_spills(found):
    """But for what a release of Triton is known to spill."""
    known = record()
    assert not [one for one in found if one.spills > known[one.name, one.capability]["spills"]]
    assert sum(one["spills"] for one in known.values()) <= 8


@compiles
def test_shared_memory_suffices(found):
    assert not [one for one in found if one.shared > compiled.DEVICES[one.capability][1]]


@compiles
@recorded
def test_no_kernel_takes_more_instructions_than_recorded(found):
    known = record()
    slower = {
        (one.name, one.capability): (one.instructions, known[one.name, one.capability]["instructions"])
        for one in found
        if one.instructions > SLACK * known[one.name, one.capability]["instructions"]
    }
    assert not slower


def test_an_interpreted_kernel_is_not_compiled(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compiled.compile_one(compiled.configurations(90)[0])


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
    assert compiled.longest(code) == 3
    assert compiled.longest("        /*0000*/                   EXIT ;") == 1
