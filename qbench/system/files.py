"""Files that are whole or not there, and folders that one process at a time works in."""

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock, Timeout

LOCK = ".lock"
_PARTIAL = re.compile(r"\..+\.[0-9a-f]{16}")


class Busy(Exception):
    """Another process is at this folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have a folder for this process alone. Raises Busy. The system lets go of the lock however the process ends."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise Busy(f"{folder} is in the hands of another process") from None
    try:
        yield
    finally:
        lock.release()


def busy(folder: Path) -> bool:
    """Whether a process has a folder locked. Where that cannot be told, none has."""
    if not (folder / LOCK).exists():
        return False
    try:
        with locked(folder):
            return False
    except Busy:
        return True
    except OSError:
        return False


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A file to write bytes to, which takes the place of `path` once it is whole and on the disk.

    Whatever is raised before that leaves the old file; an OSError then names `path`.
    """
    # random, for processes in containers that share the folder have the same ids
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, partial, str(partial)):
            error.filename = str(path)
        raise
    _keep_name(path)


def _keep_name(path: Path) -> None:
    """Have the new name of a file on the disk as well, where the system can: a crash then brings no old file back."""
    with suppress(OSError):  # the file is whole and in its place: nothing has failed that the caller asked for
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def clear_partial(folder: Path) -> None:
    """Remove what `replaced` left in a folder where its process was killed; only for who has the folder locked."""
    for file in folder.iterdir():
        if _PARTIAL.fullmatch(file.name):
            file.unlink()


def discard(folder: Path, scaffold: set[str]) -> None:
    """Remove a folder that holds nothing but what `scaffold` names, unless another process is at it."""
    with suppress(Busy, OSError):
        if {file.name for file in folder.iterdir()} <= {LOCK, *scaffold}:
            with locked(folder):
                shutil.rmtree(folder, ignore_errors=True)
            folder.rmdir()  # where an open lock, as on Windows, kept it
