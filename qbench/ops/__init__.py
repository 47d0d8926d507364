"""Fast kernels for the ops of `formats.blockwise`, and the product with a quantized weight.

One schema and one fake an op; a device's kernels are registered in a module of its own (`cpu`, `cuda`). Importing this
package is all it takes, and `formats` does so by itself where qbench is installed.
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
    cpu = linear  # whose products are for every device
else:
    from . import cpu  # type: ignore[no-redef]

__all__ = ["cpu", "cuda", "linear"]
