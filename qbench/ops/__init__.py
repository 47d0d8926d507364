"""Fast kernels for the ops of `formats.blockwise`, and the product with a quantized weight.

Importing this package registers them as PyTorch ops; `formats` imports it if qbench is installed. In go weights, codes,
levels and scales as tensors; out come tensors. Read linear.py first.

    linear    defines qbench::linear and qbench::linear_dx, for every device, with autograd and autocast
    cpu       the CPU kernels, compiled by numba
    avx512    inner loops of the CPU kernels for CPUs with AVX-512
    threads   compiles CPU kernels for several threads, and survives forks
    cuda      the ops on a GPU: picks a kernel and launches it
    kernels   the Triton kernels
    launches  the grid and the compile-time constants of a kernel launch
    choices   which kernel and tile sizes a product uses, by its number of rows
"""

import warnings

from . import cuda, linear

try:
    import numba  # noqa: F401
except ImportError as error:
    warnings.warn(
        f"qbench: numba cannot be imported ({error}); plain PyTorch computes instead, much slower, to the same bits;"
        " pip install numba",
        RuntimeWarning,
        stacklevel=2,
    )
    cpu = linear  # its products work on every device
else:
    from . import cpu  # type: ignore[no-redef]

__all__ = ["cpu", "cuda", "linear"]
