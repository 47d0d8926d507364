"""INT4: 16 evenly spaced levels.

Symmetric (`int4`): L = i/7 for i = −8 … 7 and the absmax as scale, so a weight becomes an integer within ±7 and −8 is
never used. This is the Int4 that QLoRA's Table 2 compares with (arXiv 2305.14314).

Asymmetric (`int4_asym`): L = i/15 for i = 0 … 15, the scale is the range of the block and the shift its minimum (GPTQ,
arXiv 2210.17323, section 4, and most group-wise INT4 since). It uses all 16 levels and follows skewed blocks,
but stores a second number per block: 5 bits per parameter at block 64, 4.25 with double quantization of both.
"""

from torch import Tensor

from . import register
from .blockwise import reduce_blocks
from .format import Format


@register("int4")
@register("int4_asym", symmetric=False)
class Int4(Format):
    bits = 4

    def __init__(self, block: int = 64, dq: bool = False, symmetric: bool = True):
        super().__init__(block, dq)
        self.name = "int4" if symmetric else "int4_asym"
        self.source = "QLoRA, arXiv 2305.14314, Table 2" if symmetric else "GPTQ, arXiv 2210.17323, section 4"
        self.shifted = not symmetric
        self.levels = tuple(i / 7 for i in range(-8, 8)) if symmetric else tuple(i / 15 for i in range(16))

    def scale_and_shift(self, w: Tensor) -> tuple[Tensor | None, Tensor | None]:
        if not self.shifted:
            return None, None
        low = reduce_blocks(w, self.block, lambda x: x.amin(1)).float()
        high = reduce_blocks(w, self.block, lambda x: x.amax(1)).float()
        return high - low, low
