"""result.json, one file per run: create, write and read it, and record in it how a run failed."""

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
from qbench.system.messages import sanitize

from . import schema
from .json_files import read_json, write_json

SCHEMA = 1
FILE = "result.json"


def new_result(config: dict) -> dict:
    """Returns a result before anything has been measured. Its status is "failed" until the run sets another."""
    return {
        "schema": SCHEMA,
        "status": "failed",
        "error": None,
        "run": {"id": None, "started": timestamp(), "seconds": {}},
        "config": config,
        "environment": None,
        "metrics": {},
    }


def timestamp() -> str:
    """The time now, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write(folder: Path, result: dict) -> Path:
    """Write a result to `folder`/result.json. A finished result of another run there is kept as result-ID.json."""
    before = read_finished(folder)
    if before and before["run"]["id"] != result["run"]["id"]:
        name = re.sub(r"\W", "", str(before["run"]["id"]))
        with files.atomic_write(folder / f"result-{name}.json") as file:
            file.write((folder / FILE).read_bytes())
    return write_json(folder / FILE, result)


def read(path: Path | str) -> dict:
    """Read the result at a path: a result.json, or the folder that holds it. Raises InputError if it is invalid."""
    path = Path(path)
    return read_file(path / FILE if path.is_dir() else path)


def read_file(file: Path) -> dict:
    """Read a result.json. Raises InputError if it is invalid, and OSError."""
    return check_result(read_json(file, **NUMBERS), str(file))


def check_result(result: Any, place: str) -> dict:
    """Returns `result` if it follows the schema, or raises InputError. place: where it was read, for the message."""
    number = result.get("schema", SCHEMA) if isinstance(result, dict) else SCHEMA
    if number != SCHEMA:
        raise InputError(f"{sanitize(place)} has schema {sanitize(repr(number), 40)}; {SCHEMA} is accepted")
    if problem := schema.why_invalid(result):
        raise InputError(f"{sanitize(place)} is not a qbench result: {problem}")
    return result


def _parse_integer(text: str) -> int:
    if abs(number := int(text)) >= 1 << 63:
        raise ValueError("an integer of more than 64 bits")
    return number


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


#: how the numbers of a result are parsed: arguments of `json.loads`
NUMBERS: dict[str, Any] = {"parse_int": _parse_integer, "parse_constant": _refuse_constant}


def read_finished(folder: Path, run_id: str | None = None) -> dict | None:
    """Returns the finished result in a folder, or None. run_id: accept only the result of this run."""
    with suppress(OSError, InputError):
        result = read(folder)
        return result if result["status"] == "done" and run_id in (None, result["run"]["id"]) else None
    return None


def read_started_since(folder: Path, started: str) -> dict | None:
    """Returns the result in a folder, finished or not, if its run started at the time `started` or later."""
    with suppress(OSError, InputError):
        result = read(folder)
        return result if result["run"]["started"] >= started else None
    return None


@contextmanager
def record_failure(folder: Path, result: dict, in_sweep: bool = True) -> Iterator[None]:
    """Record an exception of the block in result.json, and raise it again.

    A finished result in the folder is overwritten only if the new run has measured something. Outside a sweep, an
    InputError or an interrupt before that is not recorded. If result.json cannot be written, the exception of the block is
    raised all the same.
    """
    try:
        yield
    except BaseException as exception:
        result["status"] = "oom" if isinstance(exception, torch.OutOfMemoryError | MemoryError) else "failed"
        result["error"] = describe_error(exception)
        refused = not in_sweep and isinstance(exception, InputError | KeyboardInterrupt)
        if has_measurements(result) or not (refused or read_finished(folder)):
            with suppress(OSError):
                write(folder, result)
        raise


def describe_error(exception: BaseException) -> dict:
    """The value of `error` in result.json."""
    return {
        "type": type(exception).__name__,
        "message": str(exception),
        "traceback": "".join(traceback.format_exception(exception)),
    }


def has_measurements(result: dict) -> bool:
    """Whether the run has measured something itself; a baseline that another run measured does not count."""
    reused = result["run"].get("baseline", {}).get("reused")
    return bool(set(result["metrics"].get("quality", ())) - ({"baseline"} if reused else set()))


def remove_unbegun(folder: Path) -> None:
    """Remove the folder of a run that did not begin: it holds only what Hydra and libraries wrote."""
    files.remove_unused(folder, {".hydra", messages.FILE})
