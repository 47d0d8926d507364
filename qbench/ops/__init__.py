"""Fast kernels for the ops of `formats.blockwise`, and the product with a quantized weight.

One schema and one fake an op; a device's kernels are registered in a module of its own (`cpu`). Importing this package
is all it takes, and `formats` does so by itself where qbench is installed.
"""

from . import cpu, linear

__all__ = ["cpu", "linear"]
