"""A `Format` turns a tensor into a `QuantizedTensor`, which decodes to a tensor again.

To write a format, subclass `Format` in a file of its own. Give it a name, a number of bits and its levels, and register
it. `nf4.py` is the shortest example. Further cases:

    the scale is not the absmax of the block            override `scale_and_shift`
    scales are not stored in fp32                       set `scale_dtype`
    boundaries are not halfway between levels           set `boundaries`
    the levels depend on the tensor                     override `codebook`
    other tensors are stored                            override `quantize` and `empty`
    the format has options                              add constructor arguments with defaults, as `fp4.py` does

`contract.py` has the properties that every format must keep.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, wraps
from typing import Any, ClassVar, Concatenate, ParamSpec

import torch
from torch import Tensor

from .blockwise import block_count, load_kernels
from .modes import aside, faking, is_fake, kept, normal
from .packing import packed_bytes
from .scales import Stored, empty_scales, encode_scales, largest, largest_stored


@dataclass(frozen=True)
class Codebook:
    """The table of levels L, and what is needed to round to it.

    levels: fp32 [2^bits], indexed by code, in any order. boundaries: fp32 [2^bits − 1], ascending, the
    thresholds between sorted levels. order: uint8 [2^bits], the code of each rank.
    """

    levels: Tensor
    boundaries: Tensor
    order: Tensor

    @classmethod
    def of(cls, levels: Tensor | Sequence[float], boundaries: Tensor | Sequence[float] | None = None) -> "Codebook":
        """Returns the codebook of 2^bits levels. boundaries: 2^bits − 1, ascending; by default halfway."""
        levels = levels if isinstance(levels, Tensor) else torch.tensor(levels, dtype=torch.float32, device="cpu")
        levels = levels.float()
        order = torch.argsort(levels, stable=True)
        ranked = levels[order]
        halfway = (ranked[:-1] + ranked[1:]) / 2
        if boundaries is None:
            boundaries = halfway
        elif not isinstance(boundaries, Tensor):
            boundaries = torch.tensor(boundaries, dtype=torch.float32, device=levels.device)
        return cls(levels, boundaries.float(), order.to(torch.uint8))

    def to(self, device: torch.device) -> "Codebook":
        return Codebook(self.levels.to(device), self.boundaries.to(device), self.order.to(device))

    @cached_property
    def top(self) -> float:
        """The largest magnitude among the levels."""
        return largest(self.levels)


@kept
def _shared(levels: tuple[float, ...], boundaries: tuple[float, ...] | None, device: torch.device) -> Codebook:
    return Codebook.of(levels, boundaries).to(device)


@dataclass(frozen=True)
class QuantizedTensor:
    """A quantized tensor: what is stored, and what is needed to decode it.

    codes: uint8 [ceil(n·bits/8)], packed. levels: fp32 [2^bits], or None if a code is the weight itself (`none`).
    scale, shift: stored scales (`scales.py`); `shift` is empty if there is none. shape, dtype: of the original.
    own_levels: whether the levels were made for this tensor alone, and so count towards its bytes. All tensors of a
    format with one fixed table share one tensor of levels.
    """

    format: str
    bits: int
    block: int
    shape: torch.Size
    dtype: torch.dtype
    codes: Tensor
    levels: Tensor | None
    scale: Stored = ()
    shift: Stored = ()
    own_levels: bool = False

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the tensor in `dtype` (the original's by default), computed in fp32 and rounded once."""
        dtype = dtype or self.dtype
        if self.levels is None:
            return self.codes.to(dtype)
        return torch.ops.qbench.dequantize(
            self.codes, self.levels, list(self.scale), list(self.shift), self.bits, self.block, self.shape, dtype
        )

    def is_finite(self, dtype: torch.dtype | None = None) -> bool:
        """Whether all weights decode to finite ones in `dtype` (the original's by default).

        A weight is at most |s|·|L| + |z|, so the levels, scales and shifts usually show it; else the weights are decoded.
        """
        dtype = dtype or self.dtype
        if self.levels is not None:
            most = largest(self.levels) * largest_stored(self.scale) + largest_stored(self.shift)
            if most <= _largest_safe(dtype):  # false for NaN
                return True
        return bool(self.dequantize(dtype).float().isfinite().all())

    @property
    def numel(self) -> int:
        """The number of weights."""
        return self.shape.numel()

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def stored(self) -> list[Tensor]:
        """Every tensor that must be stored for this one."""
        levels = [self.levels] if self.own_levels and self.levels is not None else []
        return [self.codes, *levels, *self.scale, *self.shift]

    @property
    def nbytes(self) -> int:
        """Bytes of `stored`: codes, scales, shifts, and levels of its own."""
        return sum(t.nbytes for t in self.stored)

    @property
    def bits_per_parameter(self) -> float:
        """Bits per weight, counted from `nbytes`."""
        return 8 * self.nbytes / self.numel if self.numel else 0.0


_Args = ParamSpec("_Args")
_Quantize = Callable[Concatenate[Any, Tensor, _Args], QuantizedTensor]


def anywhere(quantize: _Quantize[_Args]) -> _Quantize[_Args]:
    """Decorate a `quantize` so that it works in every mode of PyTorch.

    A tensor without numbers, on the device "meta" or of a fake mode, gives what `empty` returns. A tensor with numbers
    gives the usual result, in inference mode and in a fake mode as well. Raises TypeError for a tensor of integers.
    """

    usual = normal(quantize)

    @wraps(quantize)
    def call(self: "Format", w: Tensor, *args: _Args.args, **kwargs: _Args.kwargs) -> QuantizedTensor:
        if not w.is_floating_point():
            name = kwargs.get("name", args[0] if args else "tensor")
            raise TypeError(f"{name}: expected a floating-point tensor, got {w.dtype}")
        if is_fake(w):
            with w.fake_mode:  # type: ignore[attr-defined]  # a fake tensor has one
                return self.empty(w.shape, w.dtype, w.device)
        if w.is_meta:
            return self.empty(w.shape, w.dtype, w.device)
        return aside(quantize, self, w, *args, **kwargs) if faking() else usual(self, w, *args, **kwargs)

    return call


class Format:
    """A format: levels, block size, scales, and how the scales are stored.

    block: number of weights of the flattened tensor that share a scale. dq: double quantization of the scales.
    Raises ValueError for a block that is not a positive integer.
    """

    name: str  #: appears in tables and folder names
    bits: int  #: bits of a code, 1 to 8; 16 if a code is the weight itself
    source: str  #: where the format is defined: paper and equation, or the code that is its definition
    levels: tuple[float, ...]  #: the fixed table L, indexed by code
    boundaries: tuple[float, ...] | None = None  #: thresholds between sorted levels, fp32; None: halfway
    scale_dtype: torch.dtype = torch.float32  #: of stored scales and shifts, unless double quantized
    shifted: bool = False  #: whether each block has a shift z
    own_levels: bool = False  #: whether each tensor has levels of its own
    fixed: ClassVar[dict[str, object]] = {}  #: block or dq, if only one value works; a sweep runs it once
    arguments: dict[str, Any] | None = None  #: the arguments of `formats.get` that made it

    def __init__(self, block: int = 64, dq: bool = False):
        if isinstance(block, bool) or not isinstance(block, int) or block < 1:
            raise ValueError(f"block must be a positive integer, got {block!r}")
        if not isinstance(dq, bool):
            raise ValueError(f"dq must be true or false, got {dq!r}")
        self.block, self.dq = block, dq

    def __repr__(self) -> str:
        return f"{self.name}(block={self.block}, dq={self.dq})"

    def codebook(self, w: Tensor) -> Codebook:
        """Returns the levels for flat `w` [n], which is fp32, bf16 or fp16."""
        return self._fixed(w.device)

    def _fixed(self, device: torch.device) -> Codebook:
        boundaries = None if self.boundaries is None else tuple(self.boundaries)
        return _shared(tuple(self.levels), boundaries, device)

    def scale_and_shift(self, w: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Returns the fp32 scale and shift, [ceil(n/block)] each, of flat `w` [n], which is fp32, bf16 or fp16.

        A scale of None means the absmax of each block. A shift of None means that there is none.
        """
        return None, None

    @anywhere
    def quantize(self, w: Tensor, name: str = "tensor") -> QuantizedTensor:
        """Quantize a float tensor of any shape.

        Blocks run over the flattened tensor, so they may span rows, and the last may be short. The decoded
        weights are finite in fp32 and in the dtype of `w`. Raises TypeError if `w` is not floating point. Raises
        ValueError, with the `name` of the tensor, if it holds NaN, Inf, or numbers too large for finite scales or weights.
        """
        load_kernels()
        flat = w.detach().reshape(-1)
        if flat.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            flat = flat.float()
        scale, shift = self.scale_and_shift(flat)
        book = self.codebook(flat)
        codes, scale = torch.ops.qbench.quantize(flat, book.boundaries, book.order, self.bits, self.block, scale, shift)
        tops = [largest(values) for values in (scale, shift) if values is not None]
        if not all(top <= torch.finfo(self.scale_dtype).max for top in tops):  # false for NaN
            raise refusal(w, name, torch.float32, f"whose scale or shift overflows {self.scale_dtype}")
        q = QuantizedTensor(
            format=self.name,
            bits=self.bits,
            block=self.block,
            shape=w.shape,
            dtype=w.dtype,
            codes=codes,
            levels=book.levels,
            scale=encode_scales(scale, self.dq, self.scale_dtype),
            shift=() if shift is None else encode_scales(shift, self.dq, self.scale_dtype),
            own_levels=self.own_levels,
        )
        # A double-quantized scale s decodes to a level (at most 1) times an absmax (at most 2 |s|) plus a mean (at most
        # |s|), so to at most 3 |s|. If even that keeps all weights finite, there is no need to decode them.
        if not 3 * (book.top * tops[0] + sum(tops[1:])) <= _largest_safe(w.dtype):
            for dtype in (torch.float32, w.dtype):
                if not q.is_finite(dtype):
                    raise refusal(w, name, dtype, f"which as {self.name} decode beyond {dtype}")
        return q

    @normal
    def empty(self, shape: torch.Size, dtype: torch.dtype, device: torch.device | str = "meta") -> QuantizedTensor:
        """Returns what `quantize` gives for a tensor of this shape and dtype, with uninitialized tensors to fill in."""
        n, device = shape.numel(), torch.device(device)
        codes = torch.empty(packed_bytes(n, self.bits), dtype=torch.uint8, device=device)
        if self.own_levels or is_fake(codes):
            levels = torch.empty(2**self.bits, dtype=torch.float32, device=device)
        else:
            levels = self._fixed(codes.device).levels
        scale = empty_scales(block_count(n, self.block), self.dq, device, self.scale_dtype)
        return QuantizedTensor(
            format=self.name,
            bits=self.bits,
            block=self.block,
            shape=shape,
            dtype=dtype,
            codes=codes,
            levels=levels,
            scale=scale,
            shift=tuple(torch.empty_like(tensor) for tensor in scale) if self.shifted else (),
            own_levels=self.own_levels,
        )

    def count_bytes(self, n: int) -> int:
        """Returns the `nbytes` of a quantized tensor of `n` weights, without quantizing one."""
        return self.empty(torch.Size([n]), torch.bfloat16).nbytes


def refusal(w: Tensor, name: str, dtype: torch.dtype, why: str = "") -> ValueError:
    """Returns the error for a tensor that cannot be quantized. why: the reason, if `dtype` can hold its numbers."""
    w = w.detach().double()
    nan, inf = int(w.isnan().sum()), int(w.isinf().sum())
    content = " and ".join(f"{count} {word}" for count, word in ((nan, "NaN"), (inf, "Inf")) if count)
    if not content:
        top = float(w.abs().amax())
        content = f"numbers up to {top:.6g}, {why if why and top <= torch.finfo(dtype).max else f'beyond {dtype}'}"
    return ValueError(f"{name}: holds {content}; a quantized tensor cannot")


@lru_cache
def _largest_safe(dtype: torch.dtype) -> float:
    """A magnitude that fp32 and `dtype` both hold, with a margin for rounding."""
    return min(torch.finfo(kind).max for kind in (torch.float32, dtype)) * (1 - 2**-20)
