"""Write files atomically, and lock folders so that one process at a time works in them."""

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
    """Another process works in this folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder for this process. The system releases the lock however the process ends. Raises Busy."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise Busy(f"{folder} is in use by another process") from None
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a process has locked a folder. False if that cannot be determined."""
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
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file for writing bytes. When the block ends, it is flushed to disk and replaces `path`.

    If anything is raised before that, the old file stays. An OSError then names `path`.
    """
    # a random name: in containers that share the folder, process ids are not unique
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
    _flush_folder(path)


def _flush_folder(path: Path) -> None:
    """Flush the folder of a file to disk, if the system can. Without it a crash may bring the old file back."""
    with suppress(OSError):  # the file itself is already on disk
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_partial(folder: Path) -> None:
    """Remove the temporary files of `atomic_write` after its process was killed. The caller must hold the lock."""
    for file in folder.iterdir():
        if _PARTIAL.fullmatch(file.name):
            file.unlink()


def remove_unused(folder: Path, scaffold: set[str]) -> None:
    """Remove a folder that holds nothing but the names in `scaffold`, unless another process has locked it."""
    with suppress(Busy, OSError):
        if {file.name for file in folder.iterdir()} <= {LOCK, *scaffold}:
            with locked(folder):
                shutil.rmtree(folder, ignore_errors=True)
            folder.rmdir()  # on Windows an open lock file kept it
