"""What a result depends on: the id of a run, the digests of its code, and the machine and versions that it ran on."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from formats import Format
from formats.registry import ours
from qbench.system.version import VERSION

_PACKAGES = (
    "torch", "triton", "numba", "numpy", "transformers", "peft", "tokenizers", "safetensors", "bitsandbytes",
    "lm_eval",
)  # fmt: skip
_ROOT = Path(__file__).parents[2]


def run_id(config: dict, **digests: str | list[str | None] | None) -> str:
    """The hash of everything that determines a result: configuration, code, and digests of weights, text and formats."""
    decisive = json.dumps([config, code_digest(), digests], sort_keys=True)
    return hashlib.sha256(decisive.encode()).hexdigest()[:16]


@lru_cache
def code_digest() -> str:
    """SHA-256 over the Python files of `qbench` and `formats` that affect the numbers of a run."""
    excluded = {"report", "bench", "plan", "testing"}
    sources = [file for package in ("formats", "qbench") for file in (_ROOT / package).rglob("*.py")]
    return _digest(_ROOT, (file for file in sources if not excluded & set(file.relative_to(_ROOT).parts)))


def format_digest(fmt: Format) -> str | None:
    """SHA-256 over the Python files of the module or package that a format comes from.

    None for a format of `formats`, which `code_digest` covers, and for one from a notebook, which has no file.
    """
    top = sys.modules.get(type(fmt).__module__.partition(".")[0])
    file: Any = getattr(top, "__file__", None)
    roots = [Path(folder) for folder in getattr(top, "__path__", [])]
    if ours(type(fmt)) or not (file or roots):
        return None
    if not roots:
        return _digest(Path(file).parent, [Path(file)])
    return "".join(_digest(root, root.rglob("*.py")) for root in roots)


def _digest(root: Path, sources: Iterable[Path]) -> str:
    """SHA-256 over the names and contents of files below `root`."""
    total = hashlib.sha256()
    for file in sorted(sources):
        total.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return total.hexdigest()


def environment(device: torch.device) -> dict:
    """The value of `environment` in result.json: versions, commit, device, CPU flags and threads."""
    cuda = device.type == "cuda"
    return {
        "versions": {
            "python": platform.python_version(),
            "qbench": VERSION,
            **{name: _version(name) for name in _PACKAGES},
        },
        "commit": _commit(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if cuda else _cpu("model name") or platform.processor(),
        "cuda": torch.version.cuda if cuda else None,
        "cpu_flags": _cpu("flags").split(),
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this checkout, with a plus if files differ from it; None outside a checkout."""
    if not (_ROOT / ".git").exists():
        return None
    # inside a git hook, GIT_DIR and others name another repository
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"  # a run that is killed must not leave a lock in the repository

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_ROOT), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _cpu(key: str) -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
