"""Finds the files of lm-eval tasks: bundled ones, the user's folders and YAML files, and lm-eval's own by name."""

import hashlib
import re
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from qbench.errors import InputError

BUNDLED_TASKS = Path(__file__).parents[1] / "assets" / "tasks"
YAML = (".yaml", ".yml")
_SUFFIXES = {*YAML, ".py", ".json", ".jsonl", ".csv", ".tsv", ".txt", ".parquet", ".arrow"}


def bundled_names() -> list[str]:
    """The names of the bundled tasks."""
    return sorted(file.stem for file in BUNDLED_TASKS.glob("*.yaml"))


def bad_entry(entry: str, why: str = "is no task") -> InputError:
    """The InputError for an entry of `eval.tasks` that cannot be used."""
    return InputError(
        f"eval.tasks: {entry!r} {why}; accepted: {', '.join(bundled_names())}, a folder or YAML file of lm-eval tasks, or,"
        " where there is a network, the name of any lm-eval task"
    )


def find_file(entry: str) -> Path | None:
    """The YAML file or folder that an entry of `eval.tasks` means; None for a name, which lm-eval may know.

    Raises InputError for a path that does not exist or is a folder without tasks.
    """
    if entry in bundled_names():
        return BUNDLED_TASKS / f"{entry}.yaml"
    path = Path(entry).expanduser()
    if any(path.rglob("*.yaml")) if path.is_dir() else path.is_file() and path.suffix in YAML:
        return path
    if entry != path.name or path.suffix in YAML:
        raise bad_entry(entry, "is no YAML file, nor a folder that holds one")
    return None


def digest(entries: Iterable[str]) -> str:
    """A SHA-256 that changes when the tasks change. Raises InputError.

    It covers the tasks' YAML files, all files in their folders, and the files that they name. For lm-eval's own
    tasks it covers the name and lm-eval's version.
    """
    total = hashlib.sha256()
    for entry in entries:
        path = find_file(entry)
        if path is None:
            total.update(f"{entry} {version('lm_eval')}".encode())
            continue
        beside = path.rglob("*") if path.is_dir() else path.parent.iterdir()
        files = {file for file in beside if file.suffix in _SUFFIXES and file.is_file()}
        for file in [file for file in files if file.suffix in YAML]:
            words = re.findall(r"[^\s'\"\[\]{},]+", file.read_text("utf-8", "replace"))
            files |= {Path(word) for word in words if Path(word).suffix in _SUFFIXES and Path(word).is_file()}
        for file in sorted(files):
            total.update(file.name.encode() + hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()
