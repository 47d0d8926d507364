"""The result file: one JSON a run, written atomically; everything else is derived from it."""

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from qbench.errors import InputError
from qbench.system import files, messages
from qbench.system.messages import visible

from . import schema
from .json_files import read_json, write_json

SCHEMA = 1
FILE = "result.json"


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


def read(path: Path | str) -> dict:
    """The result at a path: a result.json, or the folder that holds it. Raises InputError if it is no whole result."""
    path = Path(path)
    return read_file(path / FILE if path.is_dir() else path)


def read_file(file: Path) -> dict:
    return checked(read_json(file, **NUMBERS), str(file))


def checked(result: Any, place: str) -> dict:
    """A result that holds to the schema. place: names it in messages. Raises InputError."""
    number = result.get("schema", SCHEMA) if isinstance(result, dict) else SCHEMA
    if number != SCHEMA:
        raise InputError(f"{visible(place)} has schema {visible(repr(number), 40)}; {SCHEMA} is accepted")
    if found := schema.problem(result):
        raise InputError(f"{visible(place)} is not a result of qbench's: {found}")
    return result


def _integer(text: str) -> int:
    if abs(number := int(text)) >= 1 << 63:
        raise ValueError("an integer of more than 64 bits")
    return number


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON's")


#: how the numbers of a result are parsed: arguments of `json.loads`
NUMBERS: dict[str, Any] = {"parse_int": _integer, "parse_constant": _no_number}


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def error(exception: BaseException) -> dict:
    return {
        "type": type(exception).__name__,
        "message": str(exception),
        "traceback": "".join(traceback.format_exception(exception)),
    }
