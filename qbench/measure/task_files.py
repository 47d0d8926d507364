"""Where lm-eval tasks lie: those that come along, folders and YAML files of the user's, and those that lm-eval names."""

import hashlib
import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from qbench.errors import InputError

SHIPPED = Path(__file__).parents[1] / "assets" / "tasks"
YAML = (".yaml", ".yml")
_PARTS = {*YAML, ".py", ".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".arrow"}


def shipped() -> list[str]:
    """The names of the tasks that come along."""
    return sorted(file.stem for file in SHIPPED.glob("*.yaml"))


def unknown(entry: str, why: str = "is no task") -> InputError:
    return InputError(
        f"eval.tasks: {entry!r} {why}; accepted: {', '.join(shipped())}, a folder or YAML file of lm-eval tasks, or, where"
        " there is a network, the name of any lm-eval task"
    )


def place(entry: str) -> Path | None:
    """The YAML file or the folder of tasks that an entry of `eval.tasks` is; None for a name that lm-eval may know.

    Raises InputError for a path that leads nowhere, or to a folder without tasks.
    """
    if entry in shipped():
        return SHIPPED / f"{entry}.yaml"
    path = Path(entry).expanduser()
    if any(path.rglob("*.yaml")) if path.is_dir() else path.is_file() and path.suffix in YAML:
        return path
    if entry != path.name or path.suffix in YAML:
        raise unknown(entry, "is no YAML file, nor a folder that holds one")
    return None


def digest(entries: Iterable[str]) -> str:
    """What tells tasks from others: SHA-256 over the files beside their YAML files and those named there; of the tasks
    that lm-eval names, over its version. Raises InputError."""
    total = hashlib.sha256()
    for entry in entries:
        path = place(entry)
        if path is None:
            total.update(f"{entry} {version('lm_eval')}".encode())
            continue
        beside = path.rglob("*") if path.is_dir() else path.parent.iterdir()
        files = {file for file in beside if file.suffix in _PARTS and file.is_file()}
        for file in [file for file in files if file.suffix in YAML]:
            words = re.findall(r"[^\s'\"\[\]{},]+", file.read_text("utf-8", "replace"))
            files |= {Path(word) for word in words if Path(word).suffix in _PARTS and Path(word).is_file()}
        for file in sorted(files):
            total.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()
