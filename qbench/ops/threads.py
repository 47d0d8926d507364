"""Compiling kernels by numba, for a team of threads or for one.

The team is OpenMP's and so PyTorch's own: its threads are awake from PyTorch's last operation, where those of another pool
would wait until they leave their cores: half of the time of a product with one row, measured on 2 cores.

**Forks.** A fork copies the thread that calls it and no other. GNU OpenMP does not notice: the child waits for a team that
is not there, for ever. So a thread lets its team go before it forks, and either process starts one when it needs it. numba
does notice: its loops end the child, by SIGTERM, once its threads were started in the parent. Such a child runs each
kernel's other version, which has no team; so does all work that is too small for one.
"""

import ctypes
import os
from collections.abc import Callable
from functools import lru_cache, wraps
from importlib import import_module
from pathlib import Path
from stat import S_ISDIR
from tempfile import TemporaryFile, gettempdir
from types import FunctionType
from typing import Any

import numba
import torch
from numba import njit

_config: Any = numba.config  # which has its names only once it runs

try:
    import_module("numba.np.ufunc.omppool")  # on Linux it finds the OpenMP that came with PyTorch
except ImportError:
    OPENMP = False  # one thread: numba's own pool ends the process when two threads enter it at once
else:
    OPENMP = True
    _config.THREADING_LAYER = "omp"

ALONE = 1 << 17  # weights below which a thread has no help

_options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}
_alone = not OPENMP  # whether this process has no team


@lru_cache
def _kept_elsewhere() -> bool:
    """Let numba keep what it compiles in the temporary folder; False where that cannot be, or would not be safe.

    What is kept is code that runs when it is loaded, so the folder is this user's alone.
    """
    try:
        folder = Path(gettempdir()) / f"qbench-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if not (S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077):
            return False
        TemporaryFile(dir=folder).close()
    except (OSError, AttributeError):  # Windows has no getuid, and a home for everybody
        return False
    _config.CACHE_DIR = str(folder)
    return True


def _compiled(function: Callable, **more: Any) -> Callable:
    try:
        return njit(cache=True, **_options, **more)(function)
    except RuntimeError:  # neither beside the code nor at home is a folder to keep it in
        # without one, each process compiles again
        return njit(cache=_kept_elsewhere(), **_options, **more)(function)


def kernel(function: Callable) -> Callable:
    """A part of another kernel."""
    return _compiled(function)


def shared(function: Callable) -> Callable:
    """A kernel whose first argument is the number of shares, over which it has a loop with `prange`."""
    team = _compiled(function, parallel=OPENMP)
    copy = FunctionType(function.__code__, function.__globals__, function.__name__)
    copy.__qualname__ = f"{function.__qualname__}_alone"  # by which numba's cache tells the two apart
    copy.__module__ = function.__module__
    alone = _compiled(copy)

    @wraps(function)
    def run(shares: int, *arguments: Any) -> None:
        (team if shares > 1 else alone)(shares, *arguments)

    return run


def shares_of(weights: int) -> int:
    """In how many shares to do the work on so many weights: one for each thread that PyTorch would take."""
    if _alone or weights < 2 * ALONE:
        return 1
    threads = torch.get_num_threads()
    shares = max(1, min(threads, _config.NUMBA_NUM_THREADS, weights // ALONE))
    if shares > 1:
        numba.set_num_threads(shares)
        if torch.get_num_threads() != threads:  # numba, as it starts, sets it to the number of cores
            torch.set_num_threads(threads)
    return shares


def _part() -> None:
    """End the team of this thread, if it has one."""
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    if pause:
        pause(2)  # omp_pause_hard


def _begin_child() -> None:
    global _alone
    _alone = _alone or getattr(numba.np.ufunc.parallel, "_is_initialized", True)


if OPENMP and hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_part, after_in_child=_begin_child)
