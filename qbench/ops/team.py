"""Compiling kernels by numba, for a team of threads.

The team is OpenMP's and so PyTorch's own: its threads are awake from PyTorch's last operation, where those of another pool
would wait until they leave their cores: half of the time of a product with one row, measured on 2 cores.
"""

from importlib import import_module
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

_options: dict[str, Any] = {"nogil": True, "cache": True, "error_model": "numpy", "boundscheck": False}
kernel = njit(**_options)  #: a part of another kernel
#: one whose first argument is the number of shares, over which it has a loop with `prange`
shared = njit(parallel=OPENMP, **_options)


def shares_of(weights: int) -> int:
    """In how many shares to do the work on so many weights: one for each thread that PyTorch would take."""
    shares = max(1, min(torch.get_num_threads(), _config.NUMBA_NUM_THREADS, weights // ALONE)) if OPENMP else 1
    numba.set_num_threads(shares)
    return shares
