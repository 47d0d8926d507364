"""The one equation, as two torch.library ops: `qbench::quantize` and `qbench::dequantize`.

    w[i] = s[i // block] · L[c[i]] (+ z[i // block])

The plain PyTorch here is the definition. It runs on every device, and faster kernels are tested against it. Other
packages register kernels for a device on the same ops. `load_kernels` finds them by the entry-point group
"formats.kernels", so this package imports none of them by name.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.metadata import entry_points
from math import prod

import torch
from torch import Tensor

from .packing import pack, packed_bytes, unpack
from .scales import decode_scales

SMALLEST = 1e-38  # a scale below it is replaced by it before the division; bitsandbytes' value, so that codes match

library = torch.library.Library("qbench", "DEF")
library.define(
    "quantize(Tensor w, Tensor boundaries, Tensor order, int bits, int block, Tensor? scale, Tensor? shift)"
    " -> (Tensor codes, Tensor scale)"
)
library.define(
    "dequantize(Tensor codes, Tensor levels, Tensor[] scale, Tensor[] shift, int bits, int block, SymInt[] shape,"
    " ScalarType dtype) -> Tensor"
)


def block_count(n: int, block: int) -> int:
    return -(n // -block)


def reduce_blocks(w: Tensor, block: int, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply `reduce` ([m, b] -> [m]) to the blocks of flat `w` [n], and to the short tail. Returns [ceil(n/block)]."""
    full = w.numel() // block * block
    parts = [reduce(w[:full].view(-1, block))] if full else []
    if full < w.numel():
        parts.append(reduce(w[full:].view(1, -1)))
    return torch.cat(parts) if parts else w.new_empty(0)


def normalize(w: Tensor, block: int, scale: Tensor, shift: Tensor | None) -> Tensor:
    """Returns (w − z) · (1/s), flat fp32 [n].

    As in bitsandbytes, the tail is divided by s instead, which can give another last bit.
    """
    full = w.numel() // block * block
    spread = torch.where(scale.abs() < SMALLEST, SMALLEST, scale)
    if shift is not None:
        w = w - shift.repeat_interleave(block)[: w.numel()]
    head = w[:full].view(-1, block) * spread[: full // block].reciprocal()[:, None]
    return torch.cat([head.reshape(-1), w[full:] / spread[full // block :]])


def quantize_reference(
    w: Tensor, boundaries: Tensor, order: Tensor, bits: int, block: int, scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Quantize `w`: returns its codes and scales.

    w: any float dtype, any shape, n elements. boundaries: fp32 [2^bits − 1], ascending; the rank of
    a normalized value is the number of boundaries strictly below it. order: uint8 [2^bits], the code of each rank.
    scale, shift: fp32 [ceil(n/block)]; a scale may be negative, and without one it is the absmax of the block. Returns
    packed codes, uint8 [ceil(n·bits/8)], and the scale, fp32.
    """
    w = w.reshape(-1).float()
    n = w.numel()
    if scale is None:
        scale = reduce_blocks(w, block, lambda x: x.abs().amax(1))
        if n % block:
            scale[-1].clamp_(min=SMALLEST)  # as bitsandbytes stores an all-zero tail
    ranks = torch.bucketize(normalize(w, block, scale, shift), boundaries, out_int32=True)
    zero = order[torch.bucketize(w.new_zeros(()), boundaries)]
    return pack(order[ranks], bits, fill=int(zero)), scale.clone()


def dequantize_reference(
    codes: Tensor, levels: Tensor, scale: Sequence[Tensor], shift: Sequence[Tensor], bits: int, block: int,
    shape: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Returns s · L[c] (+ z), computed in fp32 and rounded once to `dtype`.

    scale, shift: stored scales (`scales`). `shift` is empty if the format has none.
    """
    n = prod(shape)
    w = levels[unpack(codes, bits, n).int()] * decode_scales(scale).repeat_interleave(block)[:n]
    if shift:
        w = w + decode_scales(shift).repeat_interleave(block)[:n]
    return w.to(dtype).view(shape)


library.impl("quantize", quantize_reference, "CompositeExplicitAutograd")
library.impl("dequantize", dequantize_reference, "CompositeExplicitAutograd")


@torch.library.register_fake("qbench::quantize", lib=library)
def _(
    w: Tensor, boundaries: Tensor, order: Tensor, bits: int, block: int, scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n = w.numel()
    return (
        w.new_empty(packed_bytes(n, bits), dtype=torch.uint8),
        w.new_empty(block_count(n, block), dtype=torch.float32),
    )


@torch.library.register_fake("qbench::dequantize", lib=library)
def _(
    codes: Tensor, levels: Tensor, scale: Sequence[Tensor], shift: Sequence[Tensor], bits: int, block: int,
    shape: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return codes.new_empty(shape, dtype=dtype)


@lru_cache
def load_kernels() -> None:
    """Import every module of the entry-point group "formats.kernels"; each registers faster kernels on the ops above.

    A module that cannot be imported is skipped with one warning that says why; the reference then computes instead.
    """
    for entry in entry_points(group="formats.kernels"):
        try:
            entry.load()
        except Exception as error:
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            message = f"formats: the kernels {entry.value} cannot be imported ({why}); plain PyTorch computes instead"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
