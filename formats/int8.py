"""INT8: 8-bit integers within ±127, scaled by the absmax of the block.

This is the block-wise form of the vector-wise quantization of LLM.int8() (Dettmers et al., arXiv 2208.07339, section 2.1),
without its 16-bit outlier columns. QLoRA's Table 3 calls it QLoRA Int8 (arXiv 2305.14314). L = i/127 for i = −128 … 127;
−128 is never used.
"""

from . import register
from .format import Format


@register("int8")
class Int8(Format):
    name = "int8"
    bits = 8
    source = "LLM.int8(), arXiv 2208.07339, section 2.1, block by block"
    levels = tuple(i / 127 for i in range(-128, 128))
