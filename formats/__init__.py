"""Weight quantization formats: a page each, one equation, one contract.

    f = formats.get("nf4", block=64, dq=True)
    q = f.quantize(w)
    q.dequantize(torch.bfloat16), q.nbytes, q.bits_per_parameter

A format of another package is found by an entry point of the group "qbench.formats", one of none as `module.Class`.
"""

from .contract import BrokenContract
from .format import Codebook, Format, QuantizedTensor
from .registry import find, get, names, problems, register

__all__ = [
    "BrokenContract", "Codebook", "Format", "QuantizedTensor", "find", "get", "names", "problems", "register",
]  # fmt: skip
