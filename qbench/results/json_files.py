"""Write JSON files atomically, and read them within limits."""

import json
import math
import stat
from pathlib import Path
from typing import Any

from qbench.errors import InputError
from qbench.system import files
from qbench.system.messages import sanitize

LARGEST = 128 << 20  #: bytes of the largest file that is read


def write_json(path: Path, content: dict | list) -> Path:
    """Write a JSON file atomically, and create its folder. NaN and Inf become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_replace_non_finite(content), indent=1, allow_nan=False)
    with files.atomic_write(path) as file:
        file.write(text.encode())
    return path


def read_json(file: Path, **numbers: Any) -> Any:
    """Read a JSON file. numbers: arguments of `json.loads`. Raises InputError if it is not valid JSON, and OSError."""
    size = check_regular(file)
    if size > LARGEST:
        raise InputError(f"{sanitize(str(file))} has {size:,} bytes; up to {LARGEST:,} are accepted")
    return parse_json(file.read_bytes(), str(file), **numbers)


def check_regular(file: Path) -> int:
    """Returns the size of a file in bytes. Raises InputError for a pipe, a device or a folder, and OSError."""
    about = file.stat()
    if not stat.S_ISREG(about.st_mode):  # opening a pipe would wait for a writer
        raise InputError(f"{sanitize(str(file))} is not a file, but {_describe_kind(about.st_mode)}")
    return about.st_size


def parse_json(content: bytes, place: str, **numbers: Any) -> Any:
    """Parse JSON in UTF-8. Raises InputError if it is not valid.

    place: where it was read, for the message. numbers: arguments of `json.loads`.
    """
    try:
        return json.loads(content.decode("utf-8"), **numbers)
    except RecursionError:
        raise InputError(f"{sanitize(place)} is not valid JSON: it is nested too deep") from None
    except ValueError as error:  # JSON or UTF-8 cut short
        raise InputError(f"{sanitize(place)} is not valid JSON: {sanitize(str(error), 200)}") from error


def _describe_kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    return next((name for matches, name in kinds.items() if matches(mode)), "a device")


def _replace_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
