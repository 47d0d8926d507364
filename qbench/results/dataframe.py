"""Many results: found under folders, collected, and as one DataFrame."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qbench.errors import InputError
from qbench.system.messages import visible

from . import archive
from .store import FILE, read_file

if TYPE_CHECKING:
    import pandas


def find(*paths: Path | str, refused: Callable[[OSError], None] = lambda error: None) -> list[Path]:
    """Every result.json and archive at or under the paths, each once, sorted. Links to folders are not followed.

    refused: is told of each folder that cannot be looked into. Raises InputError for a path that is not there.
    """
    found: set[Path] = set()
    for path in map(Path, paths):
        if not os.path.lexists(path):
            accepted = f"{FILE} or {archive.FILE} files, or folders above them"
            raise InputError(f"{visible(str(path))} does not exist; accepted: {accepted}")
        found |= set(_under(path, refused)) if path.is_dir() else {path}
    return sorted(found)


def _under(top: Path, refused: Callable[[OSError], None]) -> Iterator[Path]:
    waiting = [os.fspath(top)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.name in (FILE, archive.FILE):
                        yield Path(entry.path)
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
        except OSError as error:
            refused(error)


def collect(*paths: Path | str) -> tuple[dict[Path, dict], dict[Path, str]]:
    """Every result at or under the paths, by its path; and, by file or folder, why one could not be read.

    The path of a result in an archive is that of the archive and, below it, that of the run.

    To hold ten thousand, lists of numbers become arrays, and lists of records (layers) records of arrays, but in `config`;
    texts are `whole`. Raises InputError for a path that is not there.
    """
    results: dict[Path, dict] = {}
    unreadable: dict[Path, str] = {}

    def refused(error: OSError) -> None:
        path = Path(os.fsdecode(error.filename))
        unreadable[path] = f"{visible(str(path))} cannot be read: {error.strerror}"

    for file in find(*paths, refused=refused):
        try:
            for path, result in archive.read(file) if archive.is_archive(file) else [(file, read_file(file))]:
                if isinstance(result, InputError):
                    unreadable[path] = str(result)
                else:
                    results[path] = {whole(key): _compact(item, key != "config") for key, item in result.items()}
        except InputError as problem:
            unreadable[file] = str(problem)
        except OSError as error:
            error.filename = error.filename or file
            refused(error)
    return results, unreadable


def _compact(value: Any, arrays: bool = True) -> Any:
    if isinstance(value, str):
        return whole(value)
    if isinstance(value, dict):
        return {whole(key): _compact(item, arrays) for key, item in value.items()}
    if not isinstance(value, list) or not value:
        return value
    kinds = {type(item) for item in value}
    if arrays and kinds <= {int, float}:
        return np.array(value)
    if arrays and kinds == {dict} and len({tuple(item) for item in value}) == 1:
        return {whole(key): _compact([item[key] for item in value]) for key in value[0]}
    if kinds == {str}:
        return tuple(sys.intern(whole(item)) for item in value)
    return [_compact(item, arrays) for item in value]


def whole(text: str) -> str:
    """With the code of each half of a surrogate pair, of which names of files may have some and UTF-8 has none."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def load(*paths: Path | str) -> "pandas.DataFrame":
    """Every result at or under the paths, as runs and sweeps leave them, as one DataFrame: `qbench.load`.

    A row a run, sorted by `path`, its folder; a column a number, named by its place in result.json
    (`metrics.quality.tuned.perplexity`; docs/result.md explains them all). Numbers of layers, windows and steps are lists,
    as in `collect`. Warns of files and folders that could not be read. Raises InputError for a path that is not there.
    """
    results, unreadable = collect(*paths)
    for reason in unreadable.values():
        warnings.warn(reason, stacklevel=2)
    return as_frame(results)


def as_frame(results: dict[Path, dict]) -> "pandas.DataFrame":
    """What `collect` found, as `load` gives it."""
    import pandas

    # of the keys that no schema names one may be called as our column is
    rows = pandas.json_normalize([{key: r[key] for key in r if key != "path"} for r in results.values()])
    rows.insert(0, "path", [whole(str(file.parent)) for file in results])
    return rows
