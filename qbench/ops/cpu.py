"""The CPU kernels: quantize, dequantize and the product, compiled by numba; no C compiler is needed.

Each kernel divides the blocks or rows of its arrays among threads (`threads`). Results do not depend on the number of
threads. Those of quantize and dequantize equal the reference in `formats.blockwise` to the last bit.

Work for each weight with 4-bit codes: quantize reads 4 bytes and compares with 15 boundaries. Dequantize looks up one of
16 values, which are scaled and rounded once a block, and writes it. `avx512` does both in fewer instructions. It also has
a product that reads the codes directly, half a byte a weight, which is faster when x has few rows.

Tried and rejected: `torch.bucketize`, as in the reference (70 times slower); `torch.compile` (needs a C++ compiler); a
thread pool of our own (its threads wait for cores on which PyTorch's spin: twice the time); a product with 256 levels that
looks each up where it is used (twice the time of decoding the weight first).
"""

import math
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numba import prange
from numpy import ndarray
from torch import Tensor

from formats.blockwise import SMALLEST, block_count, library
from formats.packing import pack, packed_bytes, unpack
from formats.scales import NESTED_BLOCK, decode_scales, dynamic_map

from . import avx512
from .linear import checked
from .linear import linear as decoded_linear
from .linear import linear_dx as decoded_linear_dx
from .threads import inner_kernel, thread_count, threaded_kernel

CHUNK = 1 << 20  # 16-bit weights that quantize converts to fp32 at once: they stay in the L2 cache
GROUP = 1 << 12  # weights that go through all loops of quantize together: they stay in the L1 cache
FEW_ROWS = 4  # up to this many rows of x, a product with the codes is faster than decoding the weight first
AVX512 = avx512.available()
AMX = torch.cpu._is_amx_tile_supported()
CELLS = 1 << 12  # of the grid that speeds up the search among many levels

# Signed indices and computed loop bounds keep numba from using vector registers. Hence the arrays below have two
# dimensions, blocks × weights, and their inner loops go over a whole row.


_free: list[ndarray] = []  #: holds at most one buffer, for reuse


def _reusable_array(n: int, dtype: type) -> ndarray:
    """An uninitialised array for a decoded weight. When its tensor is freed, the next weight gets the same memory.

    A model decodes layer after layer, and getting fresh memory pages takes longer than decoding a weight. At most one
    weight's memory is kept.
    """
    nbytes = n * np.dtype(dtype).itemsize
    if nbytes < 1 << 20:  # malloc reuses small blocks itself
        return np.empty(n, dtype)
    raw = _free.pop() if _free else None
    if raw is None or not nbytes <= raw.nbytes <= 2 * nbytes:
        raw = np.empty(nbytes, np.uint8)
    array: ndarray = raw[:nbytes].view(dtype)
    weakref.finalize(array, _give_back, raw).atexit = False
    return array


def _give_back(raw: ndarray) -> None:
    if not _free:
        _free.append(raw)


class _ArrayInterface:
    """Exposes the memory of a tensor to numpy."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor  # keeps the memory alive as long as the array
        data = tensor.data_ptr(), False
        self.__array_interface__ = {
            "typestr": _TYPE_STRINGS[tensor.dtype],
            "shape": tensor.shape,
            "data": data,
            "version": 3,
        }


_TYPE_STRINGS = {torch.float32: "<f4", torch.uint8: "|u1"}


def _as_numpy(tensor: Tensor) -> ndarray:
    """A numpy view of a weight, unpacked or packed.

    After `Tensor.numpy()` the storage could not be resized, which FSDP does to free gathered weights.
    """
    return np.asarray(_ArrayInterface(tensor.contiguous()))


def _split_blocks(start: int, stop: int, block: int) -> Iterator[tuple[int, int, slice, int]]:
    """Split start … stop into whole blocks and a shorter tail. Yields (start, stop, blocks, block size) of each."""
    whole = start + (stop - start) // block * block
    if start < whole:
        yield start, whole, slice(start // block, whole // block), block
    if whole < stop:
        yield whole, stop, slice(whole // block, None), stop - whole


@inner_kernel
def _absmax(w: ndarray, scale: ndarray) -> None:
    """The absmax of each block. It compares bits as integers, so a NaN or Inf is larger than any number and shows."""
    bits, top_bits = w.view(np.uint32), scale.view(np.uint32)
    for b in range(bits.shape[0]):
        top = np.uint32(0)
        for i in range(bits.shape[1]):
            magnitude = bits[b, i] & np.uint32(0x7FFFFFFF)
            top = magnitude if magnitude > top else top
        top_bits[b] = top


@inner_kernel
def _normalize(w: ndarray, scale: ndarray, shift: ndarray, smallest: np.float32, tail: bool, x: ndarray) -> None:
    """x = (w − z) · (1/s); for the tail (w − z) / s."""
    for b in range(w.shape[0]):
        s = smallest if abs(scale[b]) < smallest else scale[b]
        z = shift[b] if len(shift) else np.float32(0)
        inverse = np.float32(1) / s
        if tail:
            for i in range(w.shape[1]):
                x[b, i] = (w[b, i] - z) / s
        else:
            for i in range(w.shape[1]):
                x[b, i] = (w[b, i] - z) * inverse


@inner_kernel
def _below(edge: np.float32, x: np.float32) -> np.uint32:
    """1 if edge < x, else 0. It reads the sign of a difference; unlike a comparison, that stays in vector registers."""
    return np.float32(edge - x).view(np.uint32) >> np.uint32(31)


@inner_kernel
def encode_few(x: ndarray, e: ndarray, order: ndarray, codes: ndarray) -> None:
    """codes[i] = order[rank], where rank is the number of boundaries e[:15] below x[i]. Compares with all of them."""
    e0, e1, e2, e3, e4, e5, e6, e7 = e[0], e[1], e[2], e[3], e[4], e[5], e[6], e[7]
    e8, e9, e10, e11, e12, e13, e14 = e[8], e[9], e[10], e[11], e[12], e[13], e[14]
    for i in range(len(x)):
        v = x[i]
        low = _below(e0, v) + _below(e1, v) + _below(e2, v) + _below(e3, v) + _below(e4, v) + _below(e5, v)
        middle = _below(e6, v) + _below(e7, v) + _below(e8, v) + _below(e9, v) + _below(e10, v) + _below(e11, v)
        codes[i] = np.uint8(low + middle + _below(e12, v) + _below(e13, v) + _below(e14, v))
    for i in range(len(x)):
        codes[i] = order[codes[i]]


@inner_kernel
def _density(e: ndarray, cells: int) -> np.float32:
    """Cells per unit of x, if `cells` equal cells span the boundaries from first to last."""
    return np.float32(cells) / max(e[-2] - e[0], np.float32(SMALLEST))


@inner_kernel
def _find_cell(x: np.float32, start: np.float32, density: np.float32, cells: int) -> np.uint32:
    """The cell that contains x. Values outside of the cells, and NaN, belong to the first or last."""
    t = (x - start) * density
    t = t if t < np.float32(cells - 1) else np.float32(cells - 1)
    t = t if t > np.float32(0) else np.float32(0)
    return np.uint32(t)


@inner_kernel
def encode_many(x: ndarray, e: ndarray, order: ndarray, first: ndarray, codes: ndarray) -> None:
    """As `encode_few` for any number of boundaries, ending in Inf. first[c]: how many lie in cells before c."""
    density = _density(e, len(first))
    for i in range(len(x)):
        rank = first[_find_cell(x[i], e[0], density, len(first))]
        rank += np.uint32(x[i] > e[rank])
        while x[i] > e[rank]:  # several boundaries in a cell: rare, unless levels are very close
            rank += np.uint32(1)
        codes[i] = order[rank]


@inner_kernel
def _first_in_cells(e: ndarray, first: ndarray) -> None:
    """Count into first[c], initially 0, the boundaries in cells before c."""
    density = _density(e, len(first))
    for k in range(len(e) - 1):
        for c in range(_find_cell(e[k], e[0], density, len(first)) + 1, len(first)):
            first[c] += 1


@threaded_kernel
def encode_rows(
    threads: int, w: ndarray, scale: ndarray, scale_given: bool, shift: ndarray, smallest: np.float32, tail: bool,
    edges: ndarray, order: ndarray, first: ndarray, pairs: bool, codes: ndarray,
) -> None:  # fmt: skip
    """Encode rows of w, one block each: compute the scales, unless given, and the codes, one or (`pairs`) two a byte.

    tail: w is the last, short block. As in bitsandbytes, it is divided by its scale, clamped to `smallest`.
    """
    size = w.shape[1]
    group = max(GROUP // size, 1) * 2
    for thread in prange(threads):
        start, stop = len(w) * thread // threads, len(w) * (thread + 1) // threads
        x = np.empty((group, size), np.float32)
        single = np.zeros(group * size + 1, np.uint8)
        for at in range(start, stop, group):
            end = min(at + group, stop)
            rows, n = w[at:end], (end - at) * size
            if not scale_given:
                _absmax(rows, scale[at:end])
                if tail:
                    scale[at] = max(scale[at], smallest)
            _normalize(rows, scale[at:end], shift[at:end], smallest, tail, x)
            flat = x.reshape(-1)[:n]
            target = single if pairs else codes[at * size : at * size + n]
            if len(first):
                encode_many(flat, edges, order, first, target)
            else:
                encode_few(flat, edges, order, target)
            if pairs:
                if n % 2:
                    single[n] = order[np.searchsorted(edges, np.float32(0))]
                target = codes[at * size // 2 : (at * size + n + 1) // 2]
                for i in range(len(target)):
                    target[i] = single[2 * i] << np.uint8(4) | single[2 * i + 1]


@inner_kernel
def _round_to_bf16(value: np.float32) -> np.uint16:
    """The upper 16 bits of an fp32, rounded to nearest even."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@threaded_kernel
def decode_pairs(
    threads: int, codes: ndarray, levels: ndarray, scale: ndarray, shift: ndarray, bf16: bool, out: ndarray
) -> None:
    """Decode bytes of two 4-bit codes to s · L[c] (+ z). The 16 values of a block are computed once, then looked up."""
    for thread in prange(threads):
        start, stop = len(codes) * thread // threads, len(codes) * (thread + 1) // threads
        table = np.empty(16, out.dtype)
        for b in range(start, stop):
            z = shift[b] if len(shift) else np.float32(-0.0)  # adding it changes no number
            for c in range(16):
                value = levels[c] * scale[b] + z
                table[c] = _round_to_bf16(value) if bf16 else value
            for i in range(codes.shape[1]):
                out[b, 2 * i] = table[codes[b, i] >> np.uint8(4)]
                out[b, 2 * i + 1] = table[codes[b, i] & np.uint8(15)]


@threaded_kernel
def decode_single(
    threads: int, codes: ndarray, levels: ndarray, scale: ndarray, shift: ndarray, bf16: bool, out: ndarray
) -> None:
    """Decode bytes of one code to s · L[c] (+ z)."""
    for thread in prange(threads):
        start, stop = len(codes) * thread // threads, len(codes) * (thread + 1) // threads
        for b in range(start, stop):
            z = shift[b] if len(shift) else np.float32(-0.0)
            for i in range(codes.shape[1]):
                value = levels[codes[b, i]] * scale[b] + z
                out[b, i] = _round_to_bf16(value) if bf16 else value


@threaded_kernel
def decode_nested(
    threads: int, codes: ndarray, levels: ndarray, absmax: ndarray, offset: np.float32, block: int, out: ndarray
) -> None:
    """Decode double-quantized scales; see `formats.scales.decode_scales`."""
    for thread in prange(threads):
        start, stop = len(absmax) * thread // threads, len(absmax) * (thread + 1) // threads
        for b in range(start, stop):
            for i in range(b * block, min((b + 1) * block, len(codes))):
                out[i] = levels[codes[i]] * absmax[b] + offset


def _decode_scales(stored: Sequence[Tensor]) -> ndarray:
    """The fp32 scales of `stored`; empty if there are none."""
    if not stored:
        return np.empty(0, np.float32)
    if len(stored) == 1:
        return _as_numpy(decode_scales(stored))
    codes, absmax, offset = map(_as_numpy, stored)
    out = np.empty(len(codes), np.float32)
    decode = avx512.decode_nested if AVX512 else decode_nested
    decode(thread_count(len(codes)), codes, _as_numpy(dynamic_map()), absmax, offset[()], NESTED_BLOCK, out)
    return out


def quantize(
    w: Tensor, boundaries: Tensor, order: Tensor, bits: int, block: int, scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `formats.blockwise.quantize_reference`."""
    w = w.detach().reshape(-1).contiguous()
    n = w.numel()
    given = scale is not None
    scales = np.empty(block_count(n, block), np.float32) if scale is None else scale.numpy().copy()
    shifts = shift.numpy() if shift is not None else np.empty(0, np.float32)
    thresholds, codes_by_rank = boundaries.numpy(), order.numpy()
    few = len(thresholds) <= 15
    edges = np.full(32 if few else len(thresholds) + 1, np.inf, np.float32)
    edges[: len(thresholds)] = thresholds + np.float32(0)  # −0 becomes +0, because `_below` reads signs
    padded_order = np.zeros(max(16, len(codes_by_rank)), np.int32)
    padded_order[: len(codes_by_rank)] = codes_by_rank
    first = np.zeros(0 if few else CELLS, np.uint32)
    if not few:
        _first_in_cells(edges, first)
    smallest = np.float32(SMALLEST)
    pairs = bits == 4 and block % 2 == 0
    codes = np.empty(packed_bytes(n, bits) if pairs else n, np.uint8)
    step = n if w.dtype == torch.float32 else max(CHUNK // (2 * block), 1) * 2 * block
    for chunk in range(0, n, max(step, 1)):
        values = _as_numpy(w[chunk : chunk + step].float())
        for start, stop, blocks, size in _split_blocks(chunk, min(chunk + step, n), block):
            rows = values[start - chunk : stop - chunk].reshape(-1, size)
            target = codes[start // 2 :] if pairs else codes[start:]
            common = rows, scales[blocks], given, shifts[blocks], smallest
            if AVX512 and pairs and size == block and size % 32 == 0:
                avx512.encode_pairs(thread_count(rows.size), *common, edges, padded_order, target)
            else:
                encode_rows(thread_count(rows.size), *common, size < block, edges, padded_order, first, pairs, target)
    packed = torch.from_numpy(codes)
    if not pairs:
        packed = pack(packed, bits, fill=int(padded_order[np.searchsorted(edges, np.float32(0))]))
    return packed, torch.from_numpy(scales)


def dequantize(
    codes: Tensor, levels: Tensor, scale: Sequence[Tensor], shift: Sequence[Tensor], bits: int, block: int,
    shape: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `formats.blockwise.dequantize_reference`."""
    n = math.prod(shape)
    scales, shifts = _decode_scales(scale), _decode_scales(shift)
    per_byte = 2 if bits == 4 and block % 2 == 0 else 1
    packed = _as_numpy(codes if per_byte == 2 else unpack(codes, bits, n))
    bf16 = dtype == torch.bfloat16
    out = _reusable_array(n + n % per_byte, np.uint16 if bf16 else np.float32)  # an odd end needs room for a pair
    for start, stop, blocks, size in _split_blocks(0, n, block):
        stop += stop % per_byte
        source = packed[start // per_byte : stop // per_byte].reshape(-1, -(size // -per_byte))
        pairs = avx512.decode_pairs if AVX512 and size % 32 == 0 else decode_pairs
        decode = pairs if per_byte == 2 else decode_single
        values = out[start:stop].reshape(len(source), -1)
        decode(thread_count(values.size), source, _as_numpy(levels), scales[blocks], shifts[blocks], bf16, values)
    w = torch.from_numpy(out)[:n].view(shape)
    return w.view(torch.bfloat16) if bf16 else w.to(dtype)


def linear(
    x: Tensor, codes: Tensor, levels: Tensor, scale: Sequence[Tensor], shift: Sequence[Tensor], bits: int, block: int,
    out_features: int, in_features: int,
) -> Tensor:  # fmt: skip
    """See `qbench.ops.linear`. A few rows of x are multiplied with the codes; for more the weight is decoded first."""
    rows = x.numel() // max(in_features, 1)
    few = 0 < rows <= FEW_ROWS and x.dtype != torch.float64
    if not (AVX512 and few and bits == 4 and block % 32 == 0 and in_features % block == 0):
        wider = x.to(_product_dtype(x))
        return decoded_linear(wider, codes, levels, scale, shift, bits, block, out_features, in_features).to(x.dtype)
    flat = x.reshape(rows, in_features).float()
    even, odd = (flat[:, which::2].contiguous().numpy() for which in (0, 1))
    sums = flat.view(rows, -1, block).sum(2).numpy() if shift else np.empty((0, 0), np.float32)
    scales, shifts = (_decode_scales(stored).reshape(-1, in_features // block) for stored in (scale, shift))
    packed = _as_numpy(codes).reshape(out_features, -1)
    y = np.empty((rows, out_features), np.float32)
    threads = thread_count(y.size * in_features)
    avx512.multiply_pairs(threads, packed, _as_numpy(levels), scales, shifts, even, odd, sums, y)
    return torch.from_numpy(y).to(x.dtype).view(*x.shape[:-1], out_features)


def linear_dx(g: Tensor, *weight: Any) -> Tensor:
    """See `qbench.ops.linear`."""
    return decoded_linear_dx(g.to(_product_dtype(g)), *weight).to(g.dtype)


def _product_dtype(x: Tensor) -> torch.dtype:
    """fp32 for a 16-bit product with many rows on a CPU without AMX: it is half faster there, and at least as accurate.

    With fewer rows, decoding the larger fp32 weight takes longer than the product gains.
    """
    many = x.numel() >= 64 * x.shape[-1]
    return torch.float32 if x.dtype in (torch.bfloat16, torch.float16) and many and not AMX else x.dtype


_registration = torch.library.Library(library.ns, "IMPL")
_registration.impl("quantize", quantize, "CPU")
_registration.impl("dequantize", dequantize, "CPU")
_registration.impl("linear", checked(linear), "CPU")
_registration.impl("linear_dx", checked(linear_dx), "CPU")
