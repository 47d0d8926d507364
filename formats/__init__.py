"""Weight quantization formats: one file each, one equation, one contract.

    f = formats.get("nf4", block=64, dq=True)
    q = f.quantize(w)
    q.dequantize(torch.bfloat16), q.nbytes, q.bits_per_parameter

A format of an installed package is found by an entry point of the group "qbench.formats". Any other is `module.Class`.
"""

from .contract import BrokenContract
from .format import Codebook, Format, QuantizedTensor
from .registry import find, get, names, problems, register

__all__ = [
    "BrokenContract", "Codebook", "Format", "QuantizedTensor", "find", "get", "names", "problems", "register",
]  # fmt: skip
