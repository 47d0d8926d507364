"""Q4_0, Q4_1 and Q8_0: block formats of GGUF files, as llama.cpp (ggml-quants.c) and the Python package `gguf` write them.

    q4_0   w = d·(q − 8)    d = −1/8 of the weight of largest magnitude, which is then exact; d may be negative
    q4_1   w = d·q + m      m = the least weight, d = 1/15 of the range
    q8_0   w = d·q          d = 1/127 of the absmax

In a file a block has 32 weights, and d and m are fp16: 4.5, 5 and 8.5 bits. With `block=32` the codes, scales and shifts
equal those of `gguf` (0.18 and later) to the last bit, if d is at least 1e-38 in magnitude. Three rules make them equal:

    d         codes are chosen with d in fp32; d is rounded to fp16 afterwards
    8 bits    a weight halfway between two levels is rounded away from zero
    4 bits    a code is the integer part of x + 8.5 (or x + 0.5); the sum is rounded to fp32, so the boundaries lie next to
              the halves, not on them

If llama.cpp is compiled to fuse w/d and that sum, it rounds once less. A q4_0 weight this close to halfway can then get
the next code (its pull request 8939).

Other block sizes and double quantization follow the same rules, for comparison. No GGUF file has them.
"""

from collections.abc import Iterable
from struct import pack, unpack

import torch
from torch import Tensor

from . import register
from .blockwise import reduce_blocks
from .format import Format


def _below(x: float) -> float:
    """Returns the largest fp32 number below `x`, which is not zero and need not be an fp32 number."""
    (nearest,), (bits,) = unpack("f", pack("f", x)), unpack("i", pack("f", x))
    return nearest if nearest < x else unpack("f", pack("i", bits - (1 if x > 0 else -1)))[0]


def _just_below(starts: Iterable[float]) -> tuple[float, ...]:
    """Returns the boundaries of ranks that begin at `starts`: the largest fp32 number below each."""
    return tuple(map(_below, starts))


def _truncating(offset: float) -> tuple[float, ...]:
    """Returns the boundaries of codes 0 … 15 that are the integer part of x + offset, a sum rounded to fp32."""
    return _just_below((code + _below(code)) / 2 - offset for code in range(1, 16))  # halfway rounds up


class GGUF(Format):
    scale_dtype = torch.float16
    source = "llama.cpp, ggml/src/ggml-quants.c"


@register("q4_0")
class Q4_0(GGUF):
    name = "q4_0"
    bits = 4
    levels = tuple(range(-8, 8))
    boundaries = _truncating(8.5)

    def scale_and_shift(self, w: Tensor) -> tuple[Tensor, None]:
        largest = reduce_blocks(w, self.block, lambda x: x.gather(1, x.abs().argmax(1, keepdim=True)).squeeze(1))
        return largest.float() / -8, None


@register("q4_1")
class Q4_1(GGUF):
    name = "q4_1"
    bits = 4
    levels = tuple(range(16))
    boundaries = _truncating(0.5)
    shifted = True

    def scale_and_shift(self, w: Tensor) -> tuple[Tensor, Tensor]:
        low = reduce_blocks(w, self.block, lambda x: x.amin(1)).float()
        high = reduce_blocks(w, self.block, lambda x: x.amax(1)).float()
        return (high - low) / low.new_tensor(15), low  # a GPU multiplies by 1/15 if 15 is no tensor


@register("q8_0")
class Q8_0(GGUF):
    name = "q8_0"
    bits = 8
    levels = (*range(128), *range(-128, 0))  # a code is the byte of a signed integer
    boundaries = (*(k - 0.5 for k in range(-127, 1)), *_just_below(k - 0.5 for k in range(1, 128)))

    def scale_and_shift(self, w: Tensor) -> tuple[Tensor, None]:
        top = reduce_blocks(w, self.block, lambda x: x.abs().amax(1)).float()
        return top / top.new_tensor(127), None
