"""How AdamW's two moments are stored: as floats, or in 8 bits a number.

8 bits (Dettmers et al., arXiv 2110.02861): each moment is a tensor in a block-wise format, `m[i] = s[i // 256] · L[c[i]]`,
with bitsandbytes' tables. exp_avg uses the signed dynamic map; exp_avg_sq is never negative and uses the unsigned one.
Each number takes the nearest level. That is 2 · (8 + 32/256) = 16.25 bits a parameter instead of 64.

One thing differs from the paper: **a second moment that is not zero is never stored as zero.**

The problem: the smallest level above zero is 3.25e-7 of the block's maximum, so a v below half of that rounds to zero at
every step. The first moment of the same coordinate is about √v, large enough to survive. The update then divides by a √v
that holds only the last gradient. Coordinates whose gradients are 1e-4 of the largest in their block then move by 20 lr
a step. If one of those gradients is zero they move by thousands (measured: 20 000 lr; in fp32 never more than 1.3).

arXiv 2309.01507 calls this the zero-point problem and removes zero from the table. Here the table stays, but its first
threshold moves from half of the smallest level to zero. The remaining error makes a step too short, never too long.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from formats.blockwise import block_count, load_kernels
from formats.format import Codebook
from formats.modes import kept
from formats.scales import dynamic_map

BLOCK = 256
#: Tensors are cut at multiples of this many elements: at block ends, and at ends of vector registers. PyTorch computes the
#: elements that fill no vector register one by one, which on some machines (clang, ARM) rounds differently.
GRAIN = 256
ALIGN = 16  # bytes that a GPU loads at once
MIN_8BIT = 4096  #: the moments of a tensor with fewer elements stay fp32, as in bitsandbytes

Arrays = list[Tensor]  #: the arrays that hold the moments of one slice


class Moments:
    """Two moments, exp_avg and exp_avg_sq, stored as they are in a float dtype."""

    names = ("exp_avg", "exp_avg_sq")

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def array_specs(self, n: int) -> list[tuple[torch.dtype, int]]:
        """Dtype and length of each array that stores the moments of `n` elements."""
        return [(self.dtype, n), (self.dtype, n)]

    def nbytes(self, n: int) -> int:
        """Bytes that the moments of `n` elements take, with alignment."""
        return sum(_aligned(dtype.itemsize * count) for dtype, count in self.array_specs(n))

    def arrays(self, memory: Tensor, n: int) -> Arrays:
        """Views of the arrays for `n` elements at the start of uint8 `memory`."""
        views, start = [], 0
        for dtype, count in self.array_specs(n):
            nbytes = dtype.itemsize * count
            views.append(memory[start : start + nbytes].view(dtype))
            start += _aligned(nbytes)
        return views

    def load(self, arrays: Arrays) -> tuple[Tensor, Tensor]:
        """exp_avg and exp_avg_sq [n]; here the arrays themselves, not copies."""
        return arrays[0], arrays[1]

    def store(self, arrays: Arrays, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        """Write moments [n] into the arrays. Moments that `load` returned are already there."""
        for target, values in zip(arrays, (exp_avg, exp_avg_sq), strict=True):
            if target is not values:
                target.copy_(values)

    def to_entries(self, arrays: Arrays) -> dict[str, Tensor]:
        """Flat entries for a state_dict: the moments, and what is needed to store them again unchanged."""
        return dict(zip(self.names, self.load(arrays), strict=True))

    def from_entries(self, arrays: Arrays, entries: dict[str, Tensor], start: int, stop: int) -> None:
        """Store elements start … stop − 1 of a tensor's flat state_dict entries, whichever optimizer wrote them."""
        self.store(arrays, *(entries[name][start:stop].to(self.dtype) for name in self.names))


class QuantizedMoments(Moments):
    """Both moments in 8 bits: for each, codes uint8 [n] and absmax fp32 [ceil(n/256)]. dtype: of the decoded moments."""

    def array_specs(self, n: int) -> list[tuple[torch.dtype, int]]:
        return [(torch.uint8, n), (torch.float32, block_count(n, BLOCK))] * 2

    def load(self, arrays: Arrays) -> tuple[Tensor, Tensor]:
        return self._decode(*arrays[:2], signed=True), self._decode(*arrays[2:], signed=False)

    def store(
        self, arrays: Arrays, exp_avg: Tensor, exp_avg_sq: Tensor, *, scales: Sequence[Tensor | None] = (None, None)
    ) -> None:
        for moment, (values, scale) in enumerate(zip((exp_avg, exp_avg_sq), scales, strict=True)):
            book = codebook(values.device, moment == 0)
            codes, absmax = torch.ops.qbench.quantize(values, book.boundaries, book.order, 8, BLOCK, scale, None)
            arrays[2 * moment].copy_(codes)
            arrays[2 * moment + 1].copy_(absmax)

    def to_entries(self, arrays: Arrays) -> dict[str, Tensor]:
        # The signed map has no −1, so the scale of a block whose largest number is negative cannot be recomputed.
        absmax = {f"{name}_absmax": arrays[i] for name, i in zip(self.names, (1, 3), strict=True)}
        return super().to_entries(arrays) | absmax

    def from_entries(self, arrays: Arrays, entries: dict[str, Tensor], start: int, stop: int) -> None:
        blocks = slice(start // BLOCK, block_count(stop, BLOCK))
        absmax = [entries.get(f"{name}_absmax") for name in self.names]
        scales = [None if values is None else values[blocks] for values in absmax]
        self.store(arrays, *(entries[name][start:stop].float() for name in self.names), scales=scales)

    def _decode(self, codes: Tensor, absmax: Tensor, *, signed: bool) -> Tensor:
        levels = codebook(codes.device, signed).levels
        return torch.ops.qbench.dequantize(codes, levels, [absmax], [], 8, BLOCK, list(codes.shape), self.dtype)


@kept
def codebook(device: torch.device, signed: bool) -> Codebook:
    """Levels and thresholds of the first moment (signed) or the second."""
    load_kernels()
    book = Codebook.of(dynamic_map(signed=signed))
    if not signed:
        book.boundaries[0] = 0  # anything above zero becomes level 1 or more
    return book.to(device)


def _aligned(nbytes: int) -> int:
    return -(nbytes // -ALIGN) * ALIGN
