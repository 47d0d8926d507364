"""Many results at once: find them under folders, read them, and turn them into one DataFrame."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qbench.errors import InputError
from qbench.system.messages import sanitize

from . import archive
from .store import FILE, read_file

if TYPE_CHECKING:
    import pandas


def load(*paths: Path | str) -> "pandas.DataFrame":
    """Load every result at or under the paths into one DataFrame: `qbench.load`.

    A row is a run, and `path` is its folder; the rows are sorted by it. A column is a value of result.json, named by its
    path in it (`metrics.quality.tuned.perplexity`; docs/result.md explains them all). Values of layers, windows and steps
    are arrays. Warns about files and folders that cannot be read. Raises InputError if a path does not exist.
    """
    results, unreadable = read_results(*paths)
    for reason in unreadable.values():
        warnings.warn(reason, stacklevel=2)
    return to_dataframe(results)


def to_dataframe(results: dict[Path, dict]) -> "pandas.DataFrame":
    """Turn the results of `read_results` into the DataFrame that `load` returns."""
    import pandas

    # a result may have keys that the schema does not name, such as `path`
    rows = pandas.json_normalize([{key: r[key] for key in r if key != "path"} for r in results.values()])
    rows.insert(0, "path", [escape_surrogates(str(file.parent)) for file in results])
    return rows


def read_results(*paths: Path | str) -> tuple[dict[Path, dict], dict[Path, str]]:
    """Read every result at or under the paths.

    Returns the results by their paths, and the files and folders that cannot be read, each with the reason. A result in an
    archive has the path ARCHIVE/RUN/result.json.

    Ten thousand results fit into memory. For that, lists of numbers become arrays, and lists of records (layers) become
    records of arrays, except in `config`. Every text can be encoded in UTF-8. Raises InputError if a path does not exist.
    """
    results: dict[Path, dict] = {}
    unreadable: dict[Path, str] = {}

    def add_unreadable(error: OSError) -> None:
        path = Path(os.fsdecode(error.filename))
        unreadable[path] = f"{sanitize(str(path))} cannot be read: {error.strerror}"

    for file in find_results(*paths, on_error=add_unreadable):
        try:
            for path, result in archive.read(file) if archive.is_archive(file) else [(file, read_file(file))]:
                if isinstance(result, InputError):
                    unreadable[path] = str(result)
                else:
                    results[path] = {
                        escape_surrogates(key): _compact(item, key != "config") for key, item in result.items()
                    }
        except InputError as problem:
            unreadable[file] = str(problem)
        except OSError as error:
            error.filename = error.filename or file
            add_unreadable(error)
    return results, unreadable


def find_results(*paths: Path | str, on_error: Callable[[OSError], None] = lambda error: None) -> list[Path]:
    """Returns every result.json and archive at or under the paths, sorted. Links to folders are not followed.

    on_error: called for each folder that cannot be listed. Raises InputError if a path does not exist.
    """
    results: set[Path] = set()
    for path in map(Path, paths):
        if not os.path.lexists(path):
            accepted = f"{FILE} or {archive.FILE} files, or folders above them"
            raise InputError(f"{sanitize(str(path))} does not exist; accepted: {accepted}")
        results |= set(_find_under(path, on_error)) if path.is_dir() else {path}
    return sorted(results)


def _find_under(top: Path, on_error: Callable[[OSError], None]) -> Iterator[Path]:
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
            on_error(error)


def _compact(value: Any, arrays: bool = True) -> Any:
    """A value of result.json in less memory. arrays: turn lists of numbers and of records into arrays."""
    if isinstance(value, str):
        return escape_surrogates(value)
    if isinstance(value, dict):
        return {escape_surrogates(key): _compact(item, arrays) for key, item in value.items()}
    if not isinstance(value, list) or not value:
        return value
    kinds = {type(item) for item in value}
    if arrays and kinds <= {int, float}:
        return np.array(value)
    if arrays and kinds == {dict} and len({tuple(item) for item in value}) == 1:
        return {escape_surrogates(key): _compact([item[key] for item in value]) for key in value[0]}
    if kinds == {str}:
        return tuple(sys.intern(escape_surrogates(item)) for item in value)
    return [_compact(item, arrays) for item in value]


def escape_surrogates(text: str) -> str:
    r"""Replace each half of a surrogate pair by its code, `\ud800`. File names may hold them, UTF-8 cannot."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()
