"""Kernels where neither the code's folder nor the home folder can hold a cache, as with a read-only root."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytest.importorskip("numba")
from qbench.ops import threads

ROOT = Path(__file__).parents[3]
SCRIPT = """
import torch, formats
q = formats.get("int8", block=64).quantize(torch.linspace(-1, 1, 4096))
print(formats.__file__, int(q.codes.sum()), float(q.dequantize().square().sum()))
"""
pytestmark = pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows has a home for everybody")


@pytest.fixture(scope="module")
def read_only(tmp_path_factory) -> Path:
    """Copies of the packages in which even root cannot write a cache: a file stands in for each cache folder."""
    root = tmp_path_factory.mktemp("packages")
    for package in ("formats", "qbench"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [path for path in root.rglob("*") if path.is_dir()]:
        (folder / "__pycache__").touch()
    return root


def quantized(root: Path, temporary: Path) -> str:
    """The output of a process that has no home, and `temporary` as its temporary folder."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "NUMBA_"))}
    env |= {
        "HOME": "/dev/null",
        "NUMBA_CACHE_DIR": "/dev/null/cache",
        "PYTHONPATH": str(root),
        "TMPDIR": str(temporary),
    }
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=temporary, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith(str(root))
    return done.stdout


@pytest.mark.thorough
def test_kernels_are_kept_in_the_temporary_folder(read_only, tmp_path):
    first = quantized(read_only, tmp_path)
    folder = tmp_path / f"qbench-{os.getuid()}"
    kept = {path: path.stat().st_mtime_ns for path in folder.rglob("*.nbc")}
    assert kept and folder.stat().st_mode & 0o777 == 0o700
    assert quantized(read_only, tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.nbc")} == kept, "compiled again"


@pytest.mark.thorough
def test_kernels_are_compiled_where_they_can_be_kept_nowhere(read_only, tmp_path):
    (tmp_path / f"qbench-{os.getuid()}").touch()
    assert quantized(read_only, tmp_path).startswith(str(read_only))
    assert not list(tmp_path.rglob("*.nbc"))


@pytest.mark.parametrize("folder_is", ["open to others", "a link", "a file"])
def test_a_folder_that_others_could_write_to_is_not_used(folder_is, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(threads._config, "CACHE_DIR", "")
    folder = tmp_path / f"qbench-{os.getuid()}"
    if folder_is == "open to others":
        folder.mkdir()
        folder.chmod(0o770)
    elif folder_is == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        folder.symlink_to(tmp_path / "elsewhere")
    else:
        folder.touch()
    assert not threads._cache_in_temporary_folder.__wrapped__() and threads._config.CACHE_DIR == ""
