"""Compiles CPU kernels with numba, each for several threads and for one.

The threads are OpenMP's, and so the same as PyTorch's: they are still awake after PyTorch's last operation. Threads of
another pool would wait for cores on which these spin. That costs half of the time of a product with one row (measured
on 2 cores).

**Forks.** A fork copies only the calling thread. GNU OpenMP does not notice: a child would wait forever for threads that
do not exist. So a thread releases its OpenMP threads before it forks, and both processes start new ones on demand. numba
does notice: if its threads were started in the parent, its parallel loops end the child with SIGTERM. Such a child runs
the single-threaded version of each kernel, as does all work that is too small for several threads.
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

_config: Any = numba.config  # its attributes exist only at run time

try:
    import_module("numba.np.ufunc.omppool")  # on Linux it uses the OpenMP of PyTorch
except ImportError:
    OPENMP = False  # one thread: numba's own pool ends the process if two threads enter it at once
else:
    OPENMP = True
    _config.THREADING_LAYER = "omp"

WEIGHTS_PER_THREAD = 1 << 17  # at least; less work is not worth another thread

_options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False}
_single_threaded = not OPENMP  # whether this process must not start threads


@lru_cache
def _cache_in_temporary_folder() -> bool:
    """Let numba cache compiled code in the temporary folder; False if that is impossible or unsafe.

    Cached code runs when it is loaded, so only this user may have access to the folder.
    """
    try:
        folder = Path(gettempdir()) / f"qbench-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if not (S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and not status.st_mode & 0o077):
            return False
        TemporaryFile(dir=folder).close()
    except (OSError, AttributeError):  # Windows has no getuid, but always a home folder
        return False
    _config.CACHE_DIR = str(folder)
    return True


def _compile(function: Callable, **more: Any) -> Callable:
    try:
        return njit(cache=True, **_options, **more)(function)
    except RuntimeError:  # neither the code's folder nor the home folder can hold numba's cache
        # without a cache, each process compiles again
        return njit(cache=_cache_in_temporary_folder(), **_options, **more)(function)


def inner_kernel(function: Callable) -> Callable:
    """Compile a function that kernels call."""
    return _compile(function)


def threaded_kernel(function: Callable) -> Callable:
    """Compile a kernel, with threads and without. Its first argument is the number of threads, for a `prange` loop."""
    threaded = _compile(function, parallel=OPENMP)
    copy = FunctionType(function.__code__, function.__globals__, function.__name__)
    copy.__qualname__ = f"{function.__qualname__}_alone"  # so that numba caches both
    copy.__module__ = function.__module__
    single = _compile(copy)

    @wraps(function)
    def run(threads: int, *arguments: Any) -> None:
        (threaded if threads > 1 else single)(threads, *arguments)

    return run


def thread_count(weights: int) -> int:
    """The number of threads for work on this many weights: at most PyTorch's number."""
    if _single_threaded or weights < 2 * WEIGHTS_PER_THREAD:
        return 1
    torch_threads = torch.get_num_threads()
    threads = max(1, min(torch_threads, _config.NUMBA_NUM_THREADS, weights // WEIGHTS_PER_THREAD))
    if threads > 1:
        numba.set_num_threads(threads)
        if torch.get_num_threads() != torch_threads:  # numba sets it to the number of cores when it starts
            torch.set_num_threads(torch_threads)
    return threads


def _release_threads() -> None:
    """End the OpenMP threads of this thread, if it has any."""
    pause = getattr(ctypes.CDLL(None), "omp_pause_resource_all", None)
    if pause:
        pause(2)  # omp_pause_hard


def _start_child() -> None:
    """In a forked child: use no threads if numba had started its own in the parent."""
    global _single_threaded
    _single_threaded = _single_threaded or getattr(numba.np.ufunc.parallel, "_is_initialized", True)


if OPENMP and hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_release_threads, after_in_child=_start_child)
