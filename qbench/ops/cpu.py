"""The CPU kernels: quantize, dequantize and the product with one row, compiled by numba, no compiler needed.

They walk the tensor in chunks that stay in cache, and the chunks run on a few threads, as many as
`torch.get_num_threads()`, with the interpreter's lock released. The results are those of the reference in
`formats.blockwise` to the last bit, whatever the number of threads.

Work a weight, 4 bits a code: quantize reads 4 bytes and asks 15 boundaries; dequantize looks one of 16 values up, which
were scaled and rounded once a block, and writes it. `avx512` has those two loops in fewer instructions.

Tried and left: `torch.bucketize`, as in the reference (70 times slower); `torch.compile` (asks for a C++ compiler);
numba's own `prange` (seconds more to compile, and its default thread pool ends the process when two threads enter it at
once); a chunk a call in dequantize (the interpreter's lock, 40 µs a call, was the limit).
"""

import math
import os
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch

from formats.blockwise import SMALLEST, block_count, library
from formats.packing import pack, packed_bytes, unpack
from formats.scales import NESTED_BLOCK, decode_scales, dynamic_map

from . import avx512
from .avx512 import kernel
from .linear import linear as decoded_linear

CHUNK = 1 << 16  # weights a chunk where each chunk takes several calls: a share of the L2 cache
ALONE = 1 << 20  # weights below which a thread has no help: PyTorch's own threads, still awake, would be in the way
GROUP = 1 << 12  # weights that go through the loops of quantize together: they stay in the L1 cache
AVX512 = avx512.available()
CELLS = 1 << 12  # of the grid that finds a rank among many levels

# Below, signed indices and bounds of a loop that are computed would keep numba from using vector registers: hence the
# two dimensions, blocks × weights, and the loops over a whole row.


@lru_cache
def _pool(pid: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: they do not survive a fork, hence the key."""
    return ThreadPoolExecutor(threads, thread_name_prefix="qbench")


def _in_chunks(n: int, block: int, work: Callable[[int, int], None], chunk: int = CHUNK) -> None:
    """Run work(start, stop) over 0 … n. A start is a multiple of 8 blocks, so a chunk owns whole bytes of codes."""
    unit = 8 * block
    step = max(chunk // unit, 1) * unit
    spans = [(start, min(start + step, n)) for start in range(0, n, step)]
    threads = min(torch.get_num_threads(), len(spans), n // ALONE)
    if threads <= 1:
        for span in spans:
            work(*span)
        return

    def share(which: int) -> None:
        for span in spans[which::threads]:
            work(*span)

    others = [_pool(os.getpid(), threads - 1).submit(share, which) for which in range(1, threads)]
    share(0)
    for other in others:
        other.result()


_kept: list[np.ndarray] = []


def _memory(n: int, dtype: type) -> np.ndarray:
    """An uninitialised array for one decoded weight; once the tensor made of it is gone, the next weight gets its memory.

    The pages of fresh memory take longer to come by than a weight takes to decode, and a model decodes layer after layer.
    No more than one weight's bytes are kept.
    """
    nbytes = n * np.dtype(dtype).itemsize
    if nbytes < 1 << 20:  # malloc keeps such by itself
        return np.empty(n, dtype)
    raw = _kept.pop() if _kept else None
    if raw is None or not nbytes <= raw.nbytes <= 2 * nbytes:
        raw = np.empty(nbytes, np.uint8)
    lent = raw[:nbytes].view(dtype)
    weakref.finalize(lent, _keep, raw).atexit = False
    return lent


def _keep(raw: np.ndarray) -> None:
    if not _kept:
        _kept.append(raw)


def _share(n: int) -> int:
    """Weights a chunk where a chunk needs no more than one call: two a thread, to even out their speeds."""
    return max(CHUNK, n // (2 * torch.get_num_threads()))


def _rows(start: int, stop: int, block: int) -> Iterator[tuple[slice, slice, int]]:
    """The weights, the blocks and the block size of the whole blocks in start … stop, then of a shorter tail."""
    whole = (stop - start) // block * block
    if whole:
        yield slice(0, whole), slice(start // block, (start + whole) // block), block
    if start + whole < stop:
        yield slice(whole, stop - start), slice((start + whole) // block, None), stop - start - whole


@kernel
def _absmax(w, scale):
    """By the order of the bits as integers: a NaN or an Inf is then larger than any number, and shows."""
    bits, top_bits = w.view(np.uint32), scale.view(np.uint32)
    for b in range(bits.shape[0]):
        top = np.uint32(0)
        for i in range(bits.shape[1]):
            magnitude = bits[b, i] & np.uint32(0x7FFFFFFF)
            top = magnitude if magnitude > top else top
        top_bits[b] = top


@kernel
def _normalize(w, scale, shift, smallest, tail, x):
    """x = (w − z) · (1/s), in the tail (w − z) / s."""
    for b in range(w.shape[0]):
        s = max(scale[b], smallest)
        z = shift[b] if len(shift) else np.float32(0)
        inverse = np.float32(1) / s
        if tail:
            for i in range(w.shape[1]):
                x[b, i] = (w[b, i] - z) / s
        else:
            for i in range(w.shape[1]):
                x[b, i] = (w[b, i] - z) * inverse


@kernel
def _below(edge, x):
    """1 if edge < x, else 0: the sign of a difference, which stays in vector registers where a comparison does not."""
    return np.float32(edge - x).view(np.uint32) >> np.uint32(31)


@kernel
def encode_few(x, e, order, codes):
    """codes[i] = order[rank], the rank how many of the boundaries e[:15] lie below x[i], by asking all of them."""
    e0, e1, e2, e3, e4, e5, e6, e7 = e[0], e[1], e[2], e[3], e[4], e[5], e[6], e[7]
    e8, e9, e10, e11, e12, e13, e14 = e[8], e[9], e[10], e[11], e[12], e[13], e[14]
    for i in range(len(x)):
        v = x[i]
        low = _below(e0, v) + _below(e1, v) + _below(e2, v) + _below(e3, v) + _below(e4, v) + _below(e5, v)
        middle = _below(e6, v) + _below(e7, v) + _below(e8, v) + _below(e9, v) + _below(e10, v) + _below(e11, v)
        codes[i] = np.uint8(low + middle + _below(e12, v) + _below(e13, v) + _below(e14, v))
    for i in range(len(x)):
        codes[i] = order[codes[i]]


@kernel
def _cell(x, cells):
    """Which of `cells` equal parts of [−1, 1] holds x; what lies outside, or is NaN, goes to an end."""
    t = (x + np.float32(1)) * np.float32(cells // 2)
    t = t if t < np.float32(cells - 1) else np.float32(cells - 1)
    t = t if t > np.float32(0) else np.float32(0)
    return np.uint32(t)


@kernel
def encode_many(x, e, order, first, codes):
    """As `encode_few` for any number of boundaries, an Inf at their end: first[c] of them lie in cells before c."""
    for i in range(len(x)):
        rank = first[_cell(x[i], len(first))]
        rank += np.uint32(x[i] > e[rank])
        while x[i] > e[rank]:  # two boundaries in a cell: rare, unless the levels crowd
            rank += np.uint32(1)
        codes[i] = order[rank]


@kernel
def _first_in_cells(e, first):
    for k in range(len(e)):
        for c in range(_cell(e[k], len(first)) + 1, len(first)):
            first[c] += 1


@kernel
def encode_rows(w, scale, scale_given, shift, smallest, tail, edges, order, first, pairs, codes):
    """Rows of w, a block each, to their scales, unless given, and their codes, a byte each or, as `pairs`, two to a byte.

    A `tail` is a row of its own, treated as bitsandbytes treats it: its scale is at least `smallest`, and divides.
    """
    size = w.shape[1]
    group = max(GROUP // size, 1) * 2
    x = np.empty((group, size), np.float32)
    single = np.zeros(group * size + 1, np.uint8)
    for start in range(0, w.shape[0], group):
        stop = min(start + group, w.shape[0])
        rows, n = w[start:stop], (stop - start) * size
        if not scale_given:
            _absmax(rows, scale[start:stop])
            if tail:
                scale[start] = max(scale[start], smallest)
        _normalize(rows, scale[start:stop], shift[start:stop], smallest, tail, x)
        flat = x.reshape(-1)[:n]
        target = single if pairs else codes[start * size : start * size + n]
        if len(first):
            encode_many(flat, edges, order, first, target)
        else:
            encode_few(flat, edges, order, target)
        if pairs:
            if n % 2:
                single[n] = order[np.searchsorted(edges, np.float32(0))]
            target = codes[start * size // 2 : (start * size + n + 1) // 2]
            for i in range(len(target)):
                target[i] = single[2 * i] << np.uint8(4) | single[2 * i + 1]


@kernel
def _bf16(value):
    """The upper half of an fp32, rounded to nearest even."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@kernel
def decode_pairs(codes, levels, scale, shift, bf16, out):
    """Bytes of two 4-bit codes to s · L[c] (+ z): the 16 values of a block are made once, then looked up."""
    table = np.empty(16, out.dtype)
    for b in range(codes.shape[0]):
        z = shift[b] if len(shift) else np.float32(-0.0)  # which leaves every number as it is
        for c in range(16):
            value = levels[c] * scale[b] + z
            table[c] = _bf16(value) if bf16 else value
        for i in range(codes.shape[1]):
            out[b, 2 * i] = table[codes[b, i] >> np.uint8(4)]
            out[b, 2 * i + 1] = table[codes[b, i] & np.uint8(15)]


@kernel
def decode_single(codes, levels, scale, shift, bf16, out):
    """Bytes of one code to s · L[c] (+ z)."""
    for b in range(codes.shape[0]):
        z = shift[b] if len(shift) else np.float32(-0.0)
        for i in range(codes.shape[1]):
            value = levels[codes[b, i]] * scale[b] + z
            out[b, i] = _bf16(value) if bf16 else value


@kernel
def _decode_nested(codes, levels, absmax, offset, block, out):
    for i in range(len(codes)):
        out[i] = levels[codes[i]] * absmax[i // block] + offset


def _decode_scales(stored: list[torch.Tensor]) -> np.ndarray:
    """See `formats.scales.decode_scales`."""
    if len(stored) != 3:
        return decode_scales(stored).numpy()
    codes, absmax, offset = (t.numpy() for t in stored)
    out = np.empty(len(codes), np.float32)
    _decode_nested(codes, dynamic_map().numpy(), absmax, offset[()], NESTED_BLOCK, out)
    return out


def quantize(w, boundaries, order, bits, block, scale=None, shift=None):
    """See `formats.blockwise.quantize_reference`."""
    w = w.detach().reshape(-1).contiguous()
    n = w.numel()
    given = scale is not None
    scales = scale.numpy().copy() if given else np.empty(block_count(n, block), np.float32)
    shifts = shift.numpy() if shift is not None else np.empty(0, np.float32)
    few = len(boundaries) <= 15
    edges = np.full(32 if few else len(boundaries) + 1, np.inf, np.float32)
    edges[: len(boundaries)] = boundaries.numpy() + np.float32(0)  # −0 becomes +0: `_below` reads signs
    ranked = np.zeros(max(16, len(order)), np.int32)
    ranked[: len(order)] = order.numpy()
    first = np.zeros(0 if few else CELLS, np.uint32)
    if not few:
        _first_in_cells(edges[:-1], first)
    smallest = np.float32(SMALLEST)
    pairs = bits == 4 and block % 2 == 0
    codes = np.empty(packed_bytes(n, bits) if pairs else n, np.uint8)

    def work(start: int, stop: int) -> None:
        chunk = w[start:stop].float().numpy()
        for weights, blocks, size in _rows(start, stop, block):
            rows, at = chunk[weights].reshape(-1, size), start + weights.start
            s, z = scales[blocks], shifts[blocks] if len(shifts) else shifts
            if AVX512 and pairs and size == block and size % 32 == 0:
                avx512.encode_pairs(rows, s, given, z, smallest, edges, ranked, codes[at // 2 :])
            else:
                target = codes[at // 2 :] if pairs else codes[at:]
                encode_rows(rows, s, given, z, smallest, size < block, edges, ranked, first, pairs, target)

    _in_chunks(n, block, work, _share(n) if w.dtype == torch.float32 else CHUNK)
    packed = torch.from_numpy(codes)
    if not pairs:
        packed = pack(packed, bits, fill=int(ranked[np.searchsorted(edges, np.float32(0))]))
    return packed, torch.from_numpy(scales)


def dequantize(codes, levels, scale, shift, bits, block, shape, dtype):
    """See `formats.blockwise.dequantize_reference`."""
    n = math.prod(shape)
    scales = _decode_scales(scale)
    shifts = _decode_scales(shift) if shift else np.empty(0, np.float32)
    table = levels.numpy()
    per_byte = 2 if bits == 4 and block % 2 == 0 else 1
    packed = (codes if per_byte == 2 else unpack(codes, bits, n)).numpy()
    decode = decode_pairs if per_byte == 2 else decode_single
    bf16 = dtype == torch.bfloat16
    out = _memory(n + n % per_byte, np.uint16 if bf16 else np.float32)  # with room for the pair of an odd end

    def work(start: int, stop: int) -> None:
        for weights, blocks, size in _rows(start, stop, block):
            first, last = start + weights.start, start + weights.stop
            last += last % per_byte
            source = packed[first // per_byte : last // per_byte].reshape(-1, -(size // -per_byte))
            z = shifts[blocks] if len(shifts) else shifts
            wide = AVX512 and per_byte == 2 and size % 32 == 0
            (avx512.decode_pairs if wide else decode)(
                source, table, scales[blocks], z, bf16, out[first:last].reshape(len(source), -1)
            )

    _in_chunks(n, block, work, _share(n))
    w = torch.from_numpy(out)[:n].view(shape)
    return w.view(torch.bfloat16) if bf16 else w.to(dtype)


def linear(x, codes, levels, scale, shift, bits, block, out_features, in_features):
    """See `qbench.ops.linear`: one row of x meets the codes as they are, more are worth decoding the weight for."""
    rows = x.numel() // in_features
    fused = (
        AVX512 and rows == 1 and x.dtype != torch.float64 and bits == 4 and block % 32 == 0 and in_features % block == 0
    )
    if not fused:
        return decoded_linear(x, codes, levels, scale, shift, bits, block, out_features, in_features)
    row = x.reshape(-1).float()
    even, odd = row[0::2].contiguous().numpy(), row[1::2].contiguous().numpy()
    sums = row.view(-1, block).sum(1).numpy() if shift else np.empty(0, np.float32)
    packed = codes.numpy().reshape(out_features, -1)
    scales = _decode_scales(scale).reshape(out_features, -1)
    shifts = _decode_scales(shift).reshape(out_features, -1) if shift else np.empty((0, 0), np.float32)
    y = np.empty(out_features, np.float32)

    def work(start: int, stop: int) -> None:
        mine = slice(start // in_features, stop // in_features)
        z = shifts[mine] if len(shifts) else shifts
        avx512.multiply_row(packed[mine], levels.numpy(), scales[mine], z, even, odd, sums, y[mine])

    _in_chunks(codes.numel() * 2, in_features, work, _share(codes.numel() * 2))
    return torch.from_numpy(y).to(x.dtype).view(*x.shape[:-1], out_features)


_registration = torch.library.Library(library.ns, "IMPL")
_registration.impl("quantize", quantize, "CPU")
_registration.impl("dequantize", dequantize, "CPU")
_registration.impl("linear", linear, "CPU")
