"""Files that are whole or not there, and folders that one process at a time works in."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

_PARTIAL = re.compile(r"\..+\.\d+")


class Busy(Exception):
    """Another process is at this folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have a folder for this process alone. Raises Busy. The system lets go of the lock however the process ends."""
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise Busy(f"{folder} is in the hands of another process") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file to write bytes to, which takes the place of `path` once it is whole and on the disk.

    Whatever is raised before that leaves the old file; an OSError then names `path`.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def clear_partial(folder: Path) -> None:
    """Remove what `replaced` left in a folder where its process was killed; only for who has the folder locked."""
    for file in folder.iterdir():
        if _PARTIAL.fullmatch(file.name):
            file.unlink()
