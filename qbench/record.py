"""The result file: one JSON a run, written atomically; everything else is derived from it."""

import hashlib
import json
import math
import os
import platform
import re
import stat
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from formats import Format
from formats.registry import ours

from . import __version__, files, messages, schema
from .errors import InputError
from .messages import visible

if TYPE_CHECKING:
    import pandas

SCHEMA = 1
FILE = "result.json"
LARGEST = 128 << 20  #: bytes of a file of JSON that is read
_PACKAGES = (
    "torch", "triton", "numba", "numpy", "transformers", "peft", "tokenizers", "safetensors", "bitsandbytes",
    "lm_eval",
)  # fmt: skip
_ROOT = Path(__file__).parent.parent


def blank(config: dict) -> dict:
    """A result before anything has been measured."""
    return {
        "schema": SCHEMA,
        "status": "failed",
        "error": None,
        "run": {"id": None, "started": now(), "seconds": {}},
        "config": config,
        "environment": None,
        "metrics": {},
    }


@contextmanager
def kept(folder: Path, result: dict, row: bool = True) -> Iterator[None]:
    """Whatever is raised inside is told by result.json, and raised again.

    What had finished in the folder stays until one that has measured something takes its place. Without `row`, neither is
    told what is refused or interrupted before that: no run has begun. Where result.json cannot be written, what was raised
    inside is raised all the same.
    """
    try:
        yield
    except BaseException as exception:
        result["status"] = "oom" if isinstance(exception, torch.OutOfMemoryError | MemoryError) else "failed"
        result["error"] = error(exception)
        unbegun = not row and isinstance(exception, InputError | KeyboardInterrupt)
        if measured(result) or not (unbegun or done(folder)):
            with suppress(OSError):
                write(folder, result)
        raise


def measured(result: dict) -> bool:
    """Whether a result holds what its run measured itself, not only the baseline of another."""
    reused = result["run"].get("baseline", {}).get("reused")
    return bool(set(result["metrics"].get("quality", ())) - ({"baseline"} if reused else set()))


def done(folder: Path) -> dict | None:
    """The finished result in a folder, of whatever run."""
    with suppress(OSError, InputError):
        result = read(folder)
        return result if result["status"] == "done" else None
    return None


def finished(folder: Path, run_id: str) -> dict | None:
    """The result in a folder, if it is that of the run and done."""
    result = done(folder)
    return result if result and result["run"]["id"] == run_id else None


def since(folder: Path, started: str) -> dict | None:
    """The result in a folder, finished or not, of a run that began at a time or after."""
    with suppress(OSError, InputError):
        result = read(folder)
        return result if result["run"]["started"] >= started else None
    return None


def write(folder: Path, result: dict) -> Path:
    """Write a result to `folder`/result.json. What another run had finished there is kept beside, as result-ID.json."""
    before = done(folder)
    if before and before["run"]["id"] != result["run"]["id"]:
        name = re.sub(r"\W", "", str(before["run"]["id"]))
        with files.replaced(folder / f"result-{name}.json") as file:
            file.write((folder / FILE).read_bytes())
    return write_json(folder / FILE, result)


def discard(folder: Path) -> None:
    """Remove a folder in which no run began, and what Hydra and libraries left in it."""
    files.discard(folder, {".hydra", messages.FILE})


def write_json(path: Path, content: dict | list) -> Path:
    """Write a JSON file, and its folder: the old file or the whole new one, never a part. NaN and Inf become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(content), indent=1, allow_nan=False)
    with files.replaced(path) as file:
        file.write(text.encode())
    return path


def read(path: Path | str) -> dict:
    """The result at a path: a result.json, or the folder that holds it. Raises InputError if it is no whole result."""
    path = Path(path)
    return _read(path / FILE if path.is_dir() else path)


def _read(file: Path) -> dict:
    result = read_json(file, parse_int=_integer, parse_constant=_no_number)
    number = result.get("schema", SCHEMA) if isinstance(result, dict) else SCHEMA
    if number != SCHEMA:
        raise InputError(f"{visible(str(file))} has schema {visible(repr(number), 40)}; {SCHEMA} is accepted")
    if found := schema.problem(result):
        raise InputError(f"{visible(str(file))} is not a result of qbench's: {found}")
    return result


def _integer(text: str) -> int:
    if abs(number := int(text)) >= 1 << 63:
        raise ValueError("an integer of more than 64 bits")
    return number


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")


def read_json(file: Path, **numbers: Any) -> Any:
    """numbers: of `json.loads`. Raises InputError if it is no whole JSON file, and OSError."""
    about = file.stat()
    if not stat.S_ISREG(about.st_mode):  # to open a pipe would wait for who writes into it
        raise InputError(f"{visible(str(file))} is no file, but {_kind(about.st_mode)}")
    if about.st_size > LARGEST:
        raise InputError(f"{visible(str(file))} has {about.st_size:,} bytes; up to {LARGEST:,} are accepted")
    try:
        return json.loads(file.read_text("utf-8"), **numbers)
    except RecursionError:
        raise InputError(f"{visible(str(file))} is not a whole JSON file: it is nested too deep") from None
    except ValueError as error:  # JSON or UTF-8 cut short
        raise InputError(f"{visible(str(file))} is not a whole JSON file: {visible(str(error), 200)}") from error


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    return next((name for is_one, name in kinds.items() if is_one(mode)), "a device")


def find(*paths: Path | str, refused: Callable[[OSError], None] = lambda error: None) -> list[Path]:
    """Every result.json at or under the paths, each once, sorted. Links to folders are not followed.

    refused: is told of each folder that cannot be looked into. Raises InputError for a path that is not there.
    """
    found: set[Path] = set()
    for path in map(Path, paths):
        if not os.path.lexists(path):
            raise InputError(f"{visible(str(path))} does not exist; accepted: result.json files or folders above them")
        found |= set(_under(path, refused)) if path.is_dir() else {path}
    return sorted(found)


def _under(top: Path, refused: Callable[[OSError], None]) -> Iterator[Path]:
    waiting = [os.fspath(top)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    if entry.name == FILE:
                        yield Path(entry.path)
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
        except OSError as error:
            refused(error)


def collect(*paths: Path | str) -> tuple[dict[Path, dict], dict[Path, str]]:
    """Every result at or under the paths, by its file; and, by file or folder, why one could not be read.

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
            results[file] = {whole(key): _compact(item, key != "config") for key, item in _read(file).items()}
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


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def run_id(config: dict, **digests: str | list[str | None] | None) -> str:
    """The hash of all that decides a result: configuration, code, and the digests of weights, text and formats."""
    decisive = json.dumps([config, code_digest(), digests], sort_keys=True)
    return hashlib.sha256(decisive.encode()).hexdigest()[:16]


@lru_cache
def code_digest() -> str:
    """SHA-256 over the Python files of `qbench` and `formats` that have a part in the numbers of a run."""
    aside = {"report", "bench", "plan", "testing"}
    found = [file for package in ("formats", "qbench") for file in (_ROOT / package).rglob("*.py")]
    return _digest(_ROOT, (file for file in found if not aside & set(file.relative_to(_ROOT).parts)))


def format_digest(fmt: Format) -> str | None:
    """SHA-256 over the Python files of the module or the package that a format comes from; None for one of `formats`,
    which `code_digest` has, and of a notebook, which has no file."""
    top = sys.modules.get(type(fmt).__module__.partition(".")[0])
    file: Any = getattr(top, "__file__", None)
    roots = [Path(folder) for folder in getattr(top, "__path__", [])]
    if ours(type(fmt)) or not (file or roots):
        return None
    if not roots:
        return _digest(Path(file).parent, [Path(file)])
    return "".join(_digest(root, root.rglob("*.py")) for root in roots)


def _digest(root: Path, found: Iterable[Path]) -> str:
    total = hashlib.sha256()
    for file in sorted(found):
        total.update(str(file.relative_to(root)).encode() + file.read_bytes())
    return total.hexdigest()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def error(exception: BaseException) -> dict:
    return {
        "type": type(exception).__name__,
        "message": str(exception),
        "traceback": "".join(traceback.format_exception(exception)),
    }


def environment(device: torch.device) -> dict:
    """Versions, commit, device, CPU flags and threads: what a number needs beside it."""
    cuda = device.type == "cuda"
    return {
        "versions": {
            "python": platform.python_version(),
            "qbench": __version__,
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
    """The commit of the checkout that runs, with a plus if files differ from it; None outside a checkout."""
    if not (_ROOT / ".git").exists():
        return None
    # GIT_DIR and others, as a hook of git's has them, would name another repository
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment["GIT_OPTIONAL_LOCKS"] = "0"  # a run that is killed leaves none in the repository

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
