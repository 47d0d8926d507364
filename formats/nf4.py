"""NF4, the 4-bit NormalFloat of QLoRA (Dettmers et al., arXiv 2305.14314, section 3).

It has 16 levels at the quantiles of a normal distribution, normalised to [−1, 1]: 8 positive, 7 negative, and an exact
zero. The scale is the absmax of the block.

Weights of a trained layer are close to normal, and a table whose bins are equally probable wastes no code. It is not the
table of least squared error, because a weight divided by the absmax of its block is no longer normal: see AF4 (arXiv
2306.06965) and BOF4 (arXiv 2505.06653).

The table is copied, not computed. Equation 4 taken literally does not give it. The released construction gives it to 1e-7,
but the same bits as bitsandbytes need exactly these fp32 values.
"""

from . import register
from .format import Format


@register("nf4")
class NF4(Format):
    name = "nf4"
    bits = 4
    source = "QLoRA, arXiv 2305.14314, section 3; table of bitsandbytes"
    levels = (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    )  # fmt: skip
