"""The same bits in every mode of PyTorch, whichever comes first: each mode begins a process of its own (`in_mode`)."""

import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from formats import blockwise

SCRIPT = Path(__file__).with_name("in_mode.py")
ROOT = SCRIPT.parents[2]
MODES = [
    "inference_mode", "no_grad", "device", "default_device", "fake", "fake_beside_others", "bfloat16", "float64",
    "autocast", "thread", "fork", "torch_func",
]  # fmt: skip


def run(mode: str, file: Path, kernels: str) -> None:
    blocked = "import sys; sys.modules['numba'] = None; " if kernels == "reference" else ""
    code = f"{blocked}import sys, runpy; sys.argv = {['in_mode', mode, str(file)]}; runpy.run_path({str(SCRIPT)!r})"
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]


REFERENCE = pytest.param("reference", marks=pytest.mark.thorough)
FIRST = ("inference_mode", "bfloat16")  #: that have been met; the others are for CI


@pytest.fixture(scope="module", params=["kernels", REFERENCE])
def plain(request, tmp_path_factory) -> tuple[Path, str]:
    """A file with what a process in no mode finds."""
    file = tmp_path_factory.mktemp("modes") / "plain.pt"
    run("plain", file, request.param)
    return file, request.param


@pytest.mark.thorough
def test_without_numba_and_triton_plain_pytorch_gives_the_same_bits(tmp_path):
    code = f"""
import sys, warnings
sys.modules["triton"] = None
if {{}}:
    sys.modules["numba"] = None
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    sys.argv = ["in_mode", "plain", {{}}]
    import runpy
    runpy.run_path({str(SCRIPT)!r})
messages = [str(w.message) for w in caught if "numba cannot be imported" in str(w.message)]
assert len(messages) == {{}}, messages
assert not [w for w in caught if "cannot be imported" in str(w.message) and str(w.message) not in messages], caught
"""
    for blocked in (True, False):
        script = code.format(blocked, repr(str(tmp_path / f"{blocked}.pt")), int(blocked))
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600, cwd=ROOT)
        assert done.returncode == 0, done.stderr[-3000:]
    plain, kernels = (torch.load(tmp_path / f"{blocked}.pt")[:2] for blocked in (True, False))
    for tensors, expected in zip(plain, kernels, strict=True):
        assert len(tensors) == len(expected) and all(map(torch.equal, tensors, expected))


def test_kernels_that_cannot_be_imported_leave_the_reference_in_their_place(monkeypatch):
    broken = EntryPoint("broken", "no_such_module_anywhere", "formats.kernels")
    monkeypatch.setattr(blockwise, "entry_points", lambda group: [broken])
    with pytest.warns(
        RuntimeWarning, match=r"^formats: the kernels no_such_module_anywhere cannot be imported \(.*\);"
    ):
        blockwise.load_kernels.__wrapped__()


@pytest.mark.parametrize("mode", [m if m in FIRST else pytest.param(m, marks=pytest.mark.thorough) for m in MODES])
def test_a_mode_that_comes_first_changes_nothing(mode, plain):
    run(mode, *plain)
