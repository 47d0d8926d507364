"""The inner loops of the CPU kernels for CPUs with AVX-512.

A table of 16 values fits in a register, and one permute looks up 16 or 32 codes at once. Quantize and dequantize give the
same bits as the loops in `cpu`, in a quarter of the time.

They are written as LLVM vector code, because numba cannot generate a permute by a vector of indices.
"""

from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic as _intrinsic

from .threads import threaded_kernel

intrinsic: Any = _intrinsic  # its type omits the first argument, which numba passes
I8, I16, I32, I64, F32 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()

AHEAD = 2048  # bytes of codes that a product prefetches


def available() -> bool:
    """Whether this CPU has the instructions and the operating system supports them."""
    try:
        features = llvm.get_host_cpu_features()
    except RuntimeError:  # LLVM does not know on this platform
        return False
    return all(features.get(name) for name in ("avx512f", "avx512bw", "avx512vl"))


def _vector(element: ir.Type, n: int) -> ir.VectorType:
    return ir.VectorType(element, n)


def _splat(builder, value, n: int):
    vector = ir.Constant(_vector(value.type, n), ir.Undefined)
    vector = builder.insert_element(vector, value, I32(0))
    return builder.shuffle_vector(vector, vector, ir.Constant(_vector(I32, n), [0] * n))


def _constant(element: ir.Type, n: int, value: float):
    return ir.Constant(_vector(element, n), [value] * n)


def _address(context, builder, array_type, array, index, vector: ir.VectorType):
    """The address of a vector that starts at array[index]."""
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _load(context, builder, array_type, array, index, vector: ir.VectorType):
    loaded = builder.load(_address(context, builder, array_type, array, index, vector))
    loaded.align = 1
    return loaded


def _store(context, builder, array_type, array, index, value) -> None:
    stored = builder.store(value, _address(context, builder, array_type, array, index, value.type))
    stored.align = 1


def _call_intrinsic(builder, name: str, result: ir.Type, arguments, fastmath=()):
    """Call an LLVM intrinsic by its full name."""
    declared = builder.module.globals.get(name)
    function = declared or ir.Function(builder.module, ir.FunctionType(result, [a.type for a in arguments]), name)
    return builder.call(function, arguments, fastmath=fastmath)


def _prefetch(context, builder, array_type, array, index) -> None:
    """Prefetch the cache line of array[index], which may be beyond the end."""
    address = _address(context, builder, array_type, array, index, _vector(I8, 1))
    address = builder.bitcast(address, I8.as_pointer())
    _call_intrinsic(builder, "llvm.prefetch.p0", ir.VoidType(), [address, I32(0), I32(3), I32(1)])


def _permute(builder, table, indices):
    """table[indices], element by element: vpermps, vpermd or vpermw."""
    kind = {F32: "sf", I32: "si", I16: "hi"}[table.type.element]
    return _call_intrinsic(builder, f"llvm.x86.avx512.permvar.{kind}.512", table.type, [table, indices])


@intrinsic
def _encode_32(typing, w, i, inverse, shift, edges, order, codes, at):
    """Write the codes of (w[i : i + 32] − shift) · inverse, two a byte, to codes[at : at + 16].

    A code is order[rank]. The rank is the number of edges[:15] below, from a binary search in four steps.
    """

    def generate(context, builder, signature, arguments):
        w, i, inverse, shift, edges, order, codes, at = arguments
        w_type, _, _, _, edges_type, order_type, codes_type, _ = signature.args

        def encode_16(i):
            x = _load(context, builder, w_type, w, i, _vector(F32, 16))
            x = builder.fmul(builder.fsub(x, _splat(builder, shift, 16)), _splat(builder, inverse, 16))
            rank = _constant(I32, 16, 0)
            for step in (8, 4, 2, 1):
                # the table begins at step − 1, so that the rank is the index of the permute
                table = _load(context, builder, edges_type, edges, I64(step - 1), _vector(F32, 16))
                above = builder.fcmp_ordered(">", x, _permute(builder, table, rank))
                rank = builder.select(above, builder.add(rank, _constant(I32, 16, step)), rank)
            table = _load(context, builder, order_type, order, I64(0), _vector(I32, 16))
            return builder.trunc(_permute(builder, table, rank), _vector(I8, 16))

        both = ir.Constant(_vector(I32, 32), list(range(32)))
        single = builder.shuffle_vector(encode_16(i), encode_16(builder.add(i, I64(16))), both)
        pairs = builder.bitcast(single, _vector(I16, 16))  # the first of two codes in the lower half
        packed = builder.or_(builder.shl(pairs, _constant(I16, 16, 4)), builder.lshr(pairs, _constant(I16, 16, 8)))
        _store(context, builder, codes_type, codes, at, builder.trunc(packed, _vector(I8, 16)))
        return context.get_dummy_value()

    arguments = w, types.int64, types.float32, types.float32, edges, order, codes, types.int64
    return types.void(*arguments), generate


def _scaled_table(context, builder, levels_type, levels, scale, shift):
    """The 16 values s · L (+ z), in fp32."""
    table = _load(context, builder, levels_type, levels, I64(0), _vector(F32, 16))
    table = builder.fmul(table, _splat(builder, scale, 16))
    return builder.fadd(table, _splat(builder, shift, 16))


@intrinsic
def _decode_block(typing, codes, start, count, levels, scale, shift, out, at):
    """Decode `count` bytes, a multiple of 16, of two codes each, to out[at …], fp32 or bf16."""
    bf16 = out.dtype == types.uint16

    def generate(context, builder, signature, arguments):
        codes, start, count, levels, scale, shift, out, at = arguments
        codes_type, _, _, levels_type, _, _, out_type, _ = signature.args
        table = _scaled_table(context, builder, levels_type, levels, scale, shift)
        # each byte is spread over a pair of lanes: the high code to the lower, which comes first in memory
        n, lane = (16, 16) if bf16 else (8, 32)
        pair, single = ir.IntType(2 * lane), ir.IntType(lane)
        if bf16:
            table = _round_to_bf16(builder, table)

        def look_up(step):
            raw = _load(context, builder, codes_type, codes, builder.add(start, step), _vector(I8, n))
            wide = builder.zext(raw, _vector(pair, n))
            high = builder.lshr(wide, _constant(pair, n, 4))
            low = builder.shl(builder.and_(wide, _constant(pair, n, 15)), _constant(pair, n, lane))
            indices = builder.bitcast(builder.or_(high, low), _vector(single, 2 * n))
            to = builder.add(at, builder.shl(step, I64(1)))
            _store(context, builder, out_type, out, to, _permute(builder, table, indices))

        with builder.if_else(builder.icmp_signed("==", count, I64(32))) as (usual, other):
            with usual:  # blocks of 64: no loop
                for step in range(0, 32, n):
                    look_up(I64(step))
            with other, _steps(builder, count, n) as step:
                look_up(step)
        return context.get_dummy_value()

    arguments = codes, types.int64, types.int64, levels, types.float32, types.float32, out, types.int64
    return types.void(*arguments), generate


def _round_to_bf16(builder, values):
    """Round 16 fp32 to bf16, nearest even. Returned twice, because a permute of 16-bit lanes needs 32."""
    bits = builder.bitcast(values, _vector(I32, 16))
    odd = builder.and_(builder.lshr(bits, _constant(I32, 16, 16)), _constant(I32, 16, 1))
    rounded = builder.add(bits, builder.add(odd, _constant(I32, 16, 0x7FFF)))
    halves = builder.trunc(builder.lshr(rounded, _constant(I32, 16, 16)), _vector(I16, 16))
    return builder.shuffle_vector(halves, halves, ir.Constant(_vector(I32, 32), list(range(32))))


@intrinsic
def _dot_row(typing, codes, at, levels, scale, scale_at, blocks, count, even, odd, x_at):
    """Σ over blocks of scale · Σ L[c]·x, for one row of W and one of x, as fp32.

    The row begins at codes[at] and scale[scale_at]; each block has `count` bytes, a multiple of 16. even, odd: elements of
    x at even and odd positions, from x_at on. They are multiplied with the high and low codes of the bytes.
    """

    def generate(context, builder, signature, arguments):
        codes, at, levels, scale, scale_at, blocks, count, even, odd, x_at = arguments
        codes_type, _, levels_type, scale_type, _, _, _, even_type, odd_type, _ = signature.args
        lanes = _vector(F32, 16)
        zero = _constant(F32, 16, 0.0)
        table = _load(context, builder, levels_type, levels, I64(0), lanes)

        def multiply_add(a, b, place):
            builder.store(_call_intrinsic(builder, "llvm.fma.v16f32", lanes, [a, b, builder.load(place)]), place)

        total, part = (cgutils.alloca_once_value(builder, zero) for _ in range(2))
        with _steps(builder, blocks, 1) as block:
            builder.store(zero, part)
            first = builder.mul(block, count)
            with _steps(builder, count, 16) as step:
                place = builder.add(first, step)
                here = builder.add(at, place)
                _prefetch(context, builder, codes_type, codes, builder.add(here, I64(AHEAD)))
                raw = _load(context, builder, codes_type, codes, here, _vector(I8, 16))
                wide = builder.zext(raw, _vector(I32, 16))
                high, low = builder.lshr(wide, _constant(I32, 16, 4)), wide  # a permute reads the lowest 4 bits
                for code, array_type, array in ((high, even_type, even), (low, odd_type, odd)):
                    x = _load(context, builder, array_type, array, builder.add(x_at, place), lanes)
                    multiply_add(_permute(builder, table, code), x, part)
            data = context.make_array(scale_type)(context, builder, scale).data
            s = _splat(builder, builder.load(builder.gep(data, [builder.add(scale_at, block)])), 16)
            multiply_add(builder.load(part), s, total)
        arguments = [F32(-0.0), builder.load(total)]
        return _call_intrinsic(builder, "llvm.vector.reduce.fadd.v16f32", F32, arguments, fastmath=("reassoc",))

    integers = types.int64, types.int64, types.int64
    return types.float32(codes, types.int64, levels, scale, *integers, even, odd, types.int64), generate


@intrinsic
def _decode_16(typing, codes, at, levels, scale, offset, out):
    """out[at : at + 16] = levels[codes[at : at + 16]] · scale + offset, of 256 levels."""

    def generate(context, builder, signature, arguments):
        codes, at, levels, scale, offset, out = arguments
        codes_type, _, levels_type, _, _, out_type = signature.args
        indices = builder.zext(_load(context, builder, codes_type, codes, at, _vector(I8, 16)), _vector(I32, 16))
        table = builder.bitcast(context.make_array(levels_type)(context, builder, levels).data, I8.as_pointer())
        all_lanes = _constant(ir.IntType(1), 16, 1)
        gather = [_constant(F32, 16, 0.0), table, indices, all_lanes, I32(4)]
        values = _call_intrinsic(builder, "llvm.x86.avx512.mask.gather.dps.512", _vector(F32, 16), gather)
        values = builder.fadd(builder.fmul(values, _splat(builder, scale, 16)), _splat(builder, offset, 16))
        _store(context, builder, out_type, out, at, values)
        return context.get_dummy_value()

    return types.void(codes, types.int64, levels, types.float32, types.float32, out), generate


class _steps:
    """A loop over 0, step, 2·step … below count."""

    def __init__(self, builder, count, step: int):
        self.builder, self.count, self.step = builder, count, step

    def __enter__(self):
        builder = self.builder
        before = builder.block
        self.head, self.body = builder.append_basic_block("head"), builder.append_basic_block("body")
        self.end = builder.append_basic_block("end")
        builder.branch(self.head)
        builder.position_at_end(self.head)
        self.index = builder.phi(I64)
        self.index.add_incoming(I64(0), before)
        builder.cbranch(builder.icmp_signed("<", self.index, self.count), self.body, self.end)
        builder.position_at_end(self.body)
        return self.index

    def __exit__(self, *_):
        builder = self.builder
        self.index.add_incoming(builder.add(self.index, I64(self.step)), builder.block)
        builder.branch(self.head)
        builder.position_at_end(self.end)


@threaded_kernel
def encode_pairs(threads, w, scale, scale_given, shift, smallest, edges, order, codes):
    """As `cpu.encode_rows` for 4-bit codes, two a byte, in whole blocks of a multiple of 32 weights."""
    size = w.shape[1]
    flat, bits, scale_bits = w.reshape(-1), w.view(np.uint32), scale.view(np.uint32)
    for thread in prange(threads):
        start, stop = len(w) * thread // threads, len(w) * (thread + 1) // threads
        for b in range(start, stop):
            if not scale_given:
                top = np.uint32(0)
                for i in range(size):
                    magnitude = bits[b, i] & np.uint32(0x7FFFFFFF)
                    top = magnitude if magnitude > top else top
                scale_bits[b] = top
            inverse = np.float32(1) / (smallest if abs(scale[b]) < smallest else scale[b])
            z = shift[b] if len(shift) else np.float32(0)
            for i in range(b * size, (b + 1) * size, 32):
                _encode_32(flat, i, inverse, z, edges, order, codes, i // 2)


@threaded_kernel
def decode_pairs(threads, codes, levels, scale, shift, bf16, out):
    """As `cpu.decode_pairs`, for rows of a multiple of 16 bytes."""
    count = codes.shape[1]
    source, target = codes.reshape(-1), out.reshape(-1)
    for thread in prange(threads):
        start, stop = len(codes) * thread // threads, len(codes) * (thread + 1) // threads
        for b in range(start, stop):
            z = shift[b] if len(shift) else np.float32(-0.0)
            _decode_block(source, b * count, count, levels, scale[b], z, target, 2 * b * count)


@threaded_kernel
def multiply_pairs(threads, codes, levels, scale, shift, even, odd, block_sums, y):
    """y[m, n] = Σ_k x[m, k]·W[n, k] for rows of W of whole blocks of a multiple of 32 weights.

    codes: [N, K/2]. scale, shift: [N, K/block]. even, odd: x[:, 0::2], x[:, 1::2]. block_sums: Σ x of each block
    [M, K/block].
    """
    blocks = scale.shape[1]
    width = codes.shape[1]
    source, scales, evens, odds = codes.reshape(-1), scale.reshape(-1), even.reshape(-1), odd.reshape(-1)
    for thread in prange(threads):
        start, stop = len(codes) * thread // threads, len(codes) * (thread + 1) // threads
        for n in range(start, stop):
            for m in range(len(even)):
                size = width // blocks
                y[m, n] = _dot_row(source, n * width, levels, scales, n * blocks, blocks, size, evens, odds, m * width)
                if len(shift):
                    for b in range(blocks):
                        y[m, n] += shift[n, b] * block_sums[m, b]


@threaded_kernel
def decode_nested(threads, codes, levels, absmax, offset, block, out):
    """As `cpu.decode_nested`, for blocks of a multiple of 16."""
    for thread in prange(threads):
        start, stop = len(absmax) * thread // threads, len(absmax) * (thread + 1) // threads
        for b in range(start, stop):
            first, last = b * block, min((b + 1) * block, len(codes))
            whole = last - (last - first) % 16
            for i in range(first, whole, 16):
                _decode_16(codes, i, levels, absmax[b], offset, out)
            for i in range(whole, last):
                out[i] = levels[codes[i]] * absmax[b] + offset
