"""Q4_0, Q4_1 and Q8_0: the plain block formats of GGUF files, as llama.cpp writes them (ggml-quants.c) and the package
`gguf` does, its Python twin.

    q4_0   w = d·(q − 8)    d = −1/8 of the weight that is largest in magnitude: signed, and met exactly
    q4_1   w = d·q + m      m = the least weight, d = 1/15 of the range
    q8_0   w = d·q          d = 1/127 of the absmax

In a file a block is 32 weights, and d and m are fp16: 4.5, 5 and 8.5 bits. With `block=32` the codes, scales and shifts
are those of `gguf` (0.18 and later), to the last bit, wherever d is at least 1e-38 in magnitude. Two things make them so.
Codes are chosen by d as it is in fp32, and d is rounded after that. And a weight halfway between two levels goes up, in
q8_0 away from zero, while 4-bit codes are found by cutting off x + 8.5 (or x + 0.5): that sum is rounded, so the
boundaries lie next to the halves, not on them. If llama.cpp is compiled to fuse w/d and that sum, it rounds once less. A
q4_0 weight this close to halfway can then get the next code (its pull request 8939).

Another block, and double quantization in the place of fp16, are for comparison: the same rules, which no file has.
"""

from collections.abc import Iterable
from struct import pack, unpack

import torch
from torch import Tensor

from . import register
from .blockwise import reduce_blocks
from .format import Format


def _below(x: float) -> float:
    """The largest fp32 number below a positive or a negative one, which need not be fp32 itself."""
    (nearest,), (bits,) = unpack("f", pack("f", x)), unpack("i", pack("f", x))
    return nearest if nearest < x else unpack("f", pack("i", bits - (1 if x > 0 else -1)))[0]


def _parting(starts: Iterable[float]) -> tuple[float, ...]:
    """Of ranks that begin with these values: the largest fp32 numbers that do not belong to them."""
    return tuple(map(_below, starts))


def _cut_off(offset: float) -> tuple[float, ...]:
    """Of codes 0 … 15 that are the integer part of x + offset, where the sum is rounded to fp32."""
    return _parting((code + _below(code)) / 2 - offset for code in range(1, 16))  # halfway there is rounded to the code


class GGUF(Format):
    scale_dtype = torch.float16
    source = "llama.cpp, ggml/src/ggml-quants.c"


@register("q4_0")
class Q4_0(GGUF):
    name = "q4_0"
    bits = 4
    levels = tuple(range(-8, 8))
    boundaries = _cut_off(8.5)

    def scale_and_shift(self, w: Tensor) -> tuple[Tensor, None]:
        largest = reduce_blocks(w, self.block, lambda x: x.gather(1, x.abs().argmax(1, keepdim=True)).squeeze(1))
        return largest.float() / -8, None


@register("q4_1")
class Q4_1(GGUF):
    name = "q4_1"
    bits = 4
    levels = tuple(range(16))
    boundaries = _cut_off(0.5)
    shifted = True

    def scale_and_shift(self, w: Tensor) -> tuple[Tensor, Tensor]:
        low = reduce_blocks(w, self.block, lambda x: x.amin(1)).float()
        high = reduce_blocks(w, self.block, lambda x: x.amax(1)).float()
        return (high - low) / low.new_tensor(15), low  # a number for a divisor would be a reciprocal on a GPU


@register("q8_0")
class Q8_0(GGUF):
    name = "q8_0"
    bits = 8
    levels = (*range(128), *range(-128, 0))  # a code is the byte of a signed integer
    boundaries = (*(k - 0.5 for k in range(-127, 1)), *_parting(k - 0.5 for k in range(1, 128)))

    def scale_and_shift(self, w: Tensor) -> tuple[Tensor, None]:
        top = reduce_blocks(w, self.block, lambda x: x.abs().amax(1)).float()
        return top / top.new_tensor(127), None
