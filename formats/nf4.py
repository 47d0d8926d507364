"""NF4, the 4-bit NormalFloat of QLoRA (Dettmers et al., arXiv 2305.14314, section 3).

What: 16 levels at the quantiles of a normal distribution, normalised to [−1, 1], with an exact zero: 8 levels on the
positive side, 7 on the negative. The scale is the absmax of the block.

Why: weights of a trained layer are close to normal, and a table whose bins are equally probable wastes no code. It is
not the table of least squared error, since after division by the absmax of a block a weight is no longer normal: see
AF4 (arXiv 2306.06965) and BOF4 (arXiv 2505.06653).

Rejected: computing the table. Equation 4 taken literally does not give it; the released construction does, to 1e-7, but
bit-exactness with bitsandbytes needs its very fp32 values.
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
