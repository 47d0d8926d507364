"""How the two moments of AdamW are stored: as they are, or in 8 bits a number.

8 bits (Dettmers et al., arXiv 2110.02861): each moment is a tensor in a block-wise format, `m[i] = s[i // 256] · L[c[i]]`,
the one equation of `formats`, with bitsandbytes' tables: exp_avg in the signed dynamic map, exp_avg_sq, never negative, in
the unsigned one, each number to the level nearest to it. That is 2 · (8 + 32/256) = 16.25 bits a parameter, not 64.

One thing is not as in the paper: **a second moment that is not zero is not stored as zero.** The smallest level but zero
is 3.25e-7 of the largest number in the block, and what is below half of it would become zero, step after step, while its
first moment, as small as the root of it, is still told from zero. The update then divides by a √v that knows of the last
gradient only. Coordinates whose gradients are 1e-4 of the largest in their block move by 20 lr a step then, and where one
of those gradients is zero by thousands (measured: 20 000 lr; in fp32 never more than 1.3). arXiv 2309.01507 calls it the
zero-point problem and takes zero out of the table. Here the table stays and its first threshold moves, from half of the
smallest level to zero: the error is then a step too short.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from formats.blockwise import block_count, load_kernels
from formats.format import Codebook
from formats.modes import kept
from formats.scales import dynamic_map

BLOCK = 256
#: a tensor is cut at multiples of so many elements: at the ends of blocks; and of vector registers too, for PyTorch's
#: loops take the elements that fill none one by one, which on some machines (clang, ARM) rounds otherwise
GRAIN = 256
ALIGN = 16  # bytes that a GPU loads at once
MIN_8BIT = 4096  #: elements below which a tensor's moments stay fp32, as bitsandbytes has it

Stored = list[Tensor]


class Plain:
    """Two moments as they are, of any float dtype."""

    names = ("exp_avg", "exp_avg_sq")

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def arrays(self, n: int) -> list[tuple[torch.dtype, int]]:
        """Dtype and length of each of the arrays `names` for `n` elements."""
        return [(self.dtype, n), (self.dtype, n)]

    def nbytes(self, n: int) -> int:
        return sum(_aligned(dtype.itemsize * count) for dtype, count in self.arrays(n))

    def views(self, memory: Tensor, n: int) -> Stored:
        """The arrays, for `n` elements, in the first bytes of uint8 `memory`."""
        found, start = [], 0
        for dtype, count in self.arrays(n):
            nbytes = dtype.itemsize * count
            found.append(memory[start : start + nbytes].view(dtype))
            start += _aligned(nbytes)
        return found

    def moments(self, stored: Stored) -> tuple[Tensor, Tensor]:
        """exp_avg and exp_avg_sq [n]: here the memory itself."""
        return stored[0], stored[1]

    def store(self, stored: Stored, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        """Store moments [n], those that `moments` gave or others."""
        for to, values in zip(stored, (exp_avg, exp_avg_sq), strict=True):
            if to is not values:
                to.copy_(values)

    def told(self, stored: Stored) -> dict[str, Tensor]:
        """The entries of a state_dict, flat: the moments, and what else it takes to store the same again."""
        return dict(zip(self.names, self.moments(stored), strict=True))

    def retell(self, stored: Stored, told: dict[str, Tensor], start: int, stop: int) -> None:
        """Store elements start … stop − 1 of what `told` once told of a tensor, or of another optimizer's moments."""
        self.store(stored, *(told[name][start:stop].to(self.dtype) for name in self.names))


class Dynamic8(Plain):
    """Both moments in 8 bits: codes uint8 [n] and absmax fp32 [ceil(n/256)] of the first, then of the second.

    dtype: what they are decoded to.
    """

    def arrays(self, n: int) -> list[tuple[torch.dtype, int]]:
        return [(torch.uint8, n), (torch.float32, block_count(n, BLOCK))] * 2

    def moments(self, stored: Stored) -> tuple[Tensor, Tensor]:
        return self._decode(*stored[:2], signed=True), self._decode(*stored[2:], signed=False)

    def store(
        self, stored: Stored, exp_avg: Tensor, exp_avg_sq: Tensor, *, scales: Sequence[Tensor | None] = (None, None)
    ) -> None:
        for moment, (values, scale) in enumerate(zip((exp_avg, exp_avg_sq), scales, strict=True)):
            book = codebook(values.device, moment == 0)
            found = torch.ops.qbench.quantize(values, book.boundaries, book.order, 8, BLOCK, scale, None)
            for to, part in zip(stored[2 * moment :], found, strict=False):
                to.copy_(part)

    def told(self, stored: Stored) -> dict[str, Tensor]:
        # the signed map has no −1: a block whose largest number is negative would not find its scale again
        return super().told(stored) | {f"{name}_absmax": stored[i] for name, i in zip(self.names, (1, 3), strict=True)}

    def retell(self, stored: Stored, told: dict[str, Tensor], start: int, stop: int) -> None:
        blocks = slice(start // BLOCK, block_count(stop, BLOCK))
        scales = [told[f"{name}_absmax"][blocks] if f"{name}_absmax" in told else None for name in self.names]
        self.store(stored, *(told[name][start:stop].float() for name in self.names), scales=scales)

    def _decode(self, codes: Tensor, absmax: Tensor, *, signed: bool) -> Tensor:
        levels = codebook(codes.device, signed).levels
        return torch.ops.qbench.dequantize(codes, levels, [absmax], [], 8, BLOCK, list(codes.shape), self.dtype)


States = Plain  #: either of the two


@kept
def codebook(device: torch.device, signed: bool) -> Codebook:
    """Table and thresholds of the first moment, signed, or of the second."""
    load_kernels()
    book = Codebook.of(dynamic_map(signed=signed))
    if not signed:
        book.boundaries[0] = 0  # what is above is level 1 or more
    return book.to(device)


def _aligned(nbytes: int) -> int:
    return -(nbytes // -ALIGN) * ALIGN
