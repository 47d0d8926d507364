"""JSON files, written whole or not at all, and read within limits."""

import json
import math
import stat
from pathlib import Path
from typing import Any

from qbench.errors import InputError
from qbench.system import files
from qbench.system.messages import visible

LARGEST = 128 << 20  #: bytes of a file of JSON that is read


def write_json(path: Path, content: dict | list) -> Path:
    """Write a JSON file, and its folder: the old file or the whole new one, never a part. NaN and Inf become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(content), indent=1, allow_nan=False)
    with files.replaced(path) as file:
        file.write(text.encode())
    return path


def read_json(file: Path, **numbers: Any) -> Any:
    """numbers: of `json.loads`. Raises InputError if it is no whole JSON file, and OSError."""
    size = check_regular(file)
    if size > LARGEST:
        raise InputError(f"{visible(str(file))} has {size:,} bytes; up to {LARGEST:,} are accepted")
    return parse_json(file.read_bytes(), str(file), **numbers)


def check_regular(file: Path) -> int:
    """The size of a file in bytes. Raises InputError for a pipe, a device or a folder, and OSError."""
    about = file.stat()
    if not stat.S_ISREG(about.st_mode):  # to open a pipe would wait for who writes into it
        raise InputError(f"{visible(str(file))} is no file, but {_kind(about.st_mode)}")
    return about.st_size


def parse_json(content: bytes, place: str, **numbers: Any) -> Any:
    """Parse JSON in UTF-8. place: names it in messages. numbers: of `json.loads`. Raises InputError if it is not whole."""
    try:
        return json.loads(content.decode("utf-8"), **numbers)
    except RecursionError:
        raise InputError(f"{visible(place)} is not whole JSON: it is nested too deep") from None
    except ValueError as error:  # JSON or UTF-8 cut short
        raise InputError(f"{visible(place)} is not whole JSON: {visible(str(error), 200)}") from error


def _kind(mode: int) -> str:
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    return next((name for is_one, name in kinds.items() if is_one(mode)), "a device")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
