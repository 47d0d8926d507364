"""Fast kernels for the ops of `formats.blockwise`, and the product with a quantized weight.

One schema and one fake an op; a device's kernels are registered in a module of its own (`cpu`, `cuda`). Importing this
package is all it takes, and `formats` does so by itself where qbench is installed.
"""

from . import cpu, cuda, linear

__all__ = ["cpu", "cuda", "linear"]
