"""Quantile quantization: a table of the tensor's own quantiles (QLoRA, arXiv 2305.14314, Eq. 4; from "8-bit Optimizers
via Block-wise Quantization", arXiv 2110.02861).

    q_i = ½ (Q(i / (2^k + 1)) + Q((i + 1) / (2^k + 1)))

Q is the quantile function of the tensor itself. i runs over 1 … 2^k − 1. This leaves out the minimum and the maximum,
where an estimate of Q errs most, and frees a code for an exact zero. As in QLoRA's NF4, the table is then normalised to
[−1, 1], and each block by its absmax.

Every code is used about equally often. This keeps the most entropy, but is not the least squared error. Each tensor has
its own table, which adds 64 bytes.
"""

import torch
from torch import Tensor

from . import register
from .format import Codebook, Format
from .scales import largest

SAMPLE = 2**20  # weights to sort at most; the rank of a quantile then has a sampling error below 0.0005


@register("quantile")
class Quantile(Format):
    name = "quantile"
    bits = 4
    source = "QLoRA, arXiv 2305.14314, Eq. 4"
    own_levels = True

    def codebook(self, w: Tensor) -> Codebook:
        stride = -(w.numel() // -SAMPLE) or 1
        ordered = w[::stride].float().sort().values
        n, count = 2**self.bits, ordered.numel()
        levels = torch.zeros(n, dtype=torch.float32, device=w.device)
        if count:
            ranks = torch.arange(1, n + 1, dtype=torch.float64, device=w.device) / (n + 1) * (count - 1)
            below = ranks.floor().long()
            ends = ordered[below], ordered[(below + 1).clamp(max=count - 1)]
            if largest(ordered[:: count - 1 or 1]) > 2.0**125:  # their differences could overflow
                ends = ends[0] / 8, ends[1] / 8
            quantiles = torch.lerp(*ends, (ranks - below).float())
            levels[1:] = quantiles[:-1] / 2 + quantiles[1:] / 2
        top = levels.abs().max()
        if top > 0:
            levels /= top
        else:  # all quantiles are zero: keep the largest weights
            levels[0], levels[-1] = -1.0, 1.0
        return Codebook.of(levels.sort().values)
