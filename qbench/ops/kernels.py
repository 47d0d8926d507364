"""The Triton kernels of the one equation, w = s·L[c] (+ z): quantize, decode, and the products with a packed weight.

One set for every format. A kernel sees a table of levels, a block size and stored scales (`formats.scales`), never a
format's name. Products are taken in the dtype of x and summed in fp32; a weight is s·L (+ z) in fp32, rounded once.

Two ways to read a weight. Where codes have 4 or 8 bits and a block is a power of two that divides the row, a tile is
whole blocks: bytes in runs, one scale a block. A byte of two 4-bit codes is an even and an odd weight, and these stay
two tiles of their own, which meet the even and the odd elements of x: nothing is interleaved. Every other width, block
or row length goes element by element, right and slow.

Operations a weight, 4 bits, one row of x: half a byte to extract two codes from, a level from the L1 cache, a multiply-
add; an H100 has some 6 instructions a weight for the time that half a byte takes to come. What was tried is in
`reports/gpu/LOG.md`.
"""

import triton
import triton.language as tl

NESTED_BLOCK = tl.constexpr(256)  # scales under one absmax, `formats.scales.NESTED_BLOCK`


@triton.jit
def _load(pointer, mask, eviction: tl.constexpr = ""):
    """What lies at `pointer`, 0 where the mask says no; a mask of None lets vectors be as wide as they can."""
    if mask is None:
        return tl.load(pointer, eviction_policy=eviction)
    else:
        return tl.load(pointer, mask, other=0, eviction_policy=eviction)


@triton.jit
def _stored(stored, at, mask):
    """The fp32 scales of the blocks `at`. stored: (values,), or (codes, absmax, offset, dynamic map)."""
    values = _load(stored[0] + at, mask)
    if len(stored) == 1:
        return values.to(tl.float32)
    else:
        level = tl.load(stored[3] + values.to(tl.uint32))
        return level * _load(stored[1] + at // NESTED_BLOCK, mask) + tl.load(stored[2])


@triton.jit
def _table(levels, BITS: tl.constexpr, LANES: tl.constexpr):
    """What `_scaled` looks levels up in: the pointer or, over the LANES of a warp, the level of each lane's number."""
    if LANES:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 lane; .reg .b64 at; mov.u32 lane, %laneid; and.b32 lane, lane, $2;"
            " mad.wide.u32 at, lane, 4, $1; ld.global.nc.f32 $0, [at]; }",
            "=f,l,n",
            [levels.to(tl.uint64), (1 << BITS) - 1],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return levels


@triton.jit
def _scaled(table, code, s, z, BITS: tl.constexpr, LANES: tl.constexpr):
    """s · L[code] (+ z), fp32. code: its lowest BITS count. z: None where there is no shift."""
    if LANES:  # a shuffle reads the lowest 5 bits, and the lanes repeat a shorter table
        w = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;",
            "=f,f,r",
            [table, code.to(tl.int32)],
            dtype=tl.float32,
            is_pure=False,
            pack=1,
        )
    else:
        w = tl.load(table + (code & ((1 << BITS) - 1)), eviction_policy="evict_last")
    w *= s
    if z is not None:
        w += z
    return w


@triton.jit
def _code(codes, i, mask, BITS: tl.constexpr):
    """Code i of the bit stream (`formats.packing`), any width from 1 to 8 bits."""
    bit = i * BITS
    word = _load(codes + bit // 8, mask).to(tl.int32) << 8
    if 8 % BITS != 0:  # a code may reach into the next byte
        reaches = mask & (bit % 8 + BITS > 8)
        word |= _load(codes + bit // 8 + 1, reaches).to(tl.int32)
    return (word >> (16 - BITS - bit % 8).to(tl.int32)) & ((1 << BITS) - 1)


@triton.jit
def _element(codes, levels, scale, shift, i, mask, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Weight i of the flattened tensor, whatever the width of its code and the size of its block."""
    z = None
    if len(shift) > 0:
        z = _stored(shift, i // BLOCK, mask)
    return _scaled(levels, _code(codes, i, mask, BITS), _stored(scale, i // BLOCK, mask), z, BITS, False)


@triton.jit
def _spread(values, WIDTH: tl.constexpr):
    """[rows, blocks] to [rows, blocks · WIDTH]: what belongs to a block, at each of its places."""
    rows: tl.constexpr = values.shape[0]
    blocks: tl.constexpr = values.shape[1]
    if blocks == 1:
        return tl.broadcast_to(values, rows, WIDTH)
    else:
        return tl.reshape(tl.broadcast_to(values[:, :, None], rows, blocks, WIDTH), rows, blocks * WIDTH)


@triton.jit
def quantize(
    w, boundaries, order, scale, shift, codes, blocks, size, smallest,
    BITS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr, GIVEN: tl.constexpr,
    TAIL: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Blocks of w to codes and, unless GIVEN, to their absmax; see `formats.blockwise.quantize_reference`.

    w: [blocks, size]. scale: fp32 [blocks], read or written. shift: () or (fp32 [blocks],). codes: uint8, one a byte, or
    two as PAIRS, the first in the high half. WIDTH: the power of two that holds size. EVEN: no block of ROWS, no place
    of WIDTH is spare. TAIL: the one short block, whose scale is at least `smallest` and divides.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = row[:, None] * size + column[None, :]
    if EVEN:
        mask, there = None, None
    else:
        there = first + row < blocks
        mask = there[:, None] & (column < size)[None, :]
    x = _load(w + first * size + at, mask).to(tl.float32)
    if GIVEN:
        s = _load(scale + first + row, there)
    else:  # the order of the bits as integers puts a NaN above all numbers: it shows in the scale
        s = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
        if TAIL:
            s = tl.where(s < smallest, smallest, s)
        tl.store(scale + first + row, s, there)
    s = tl.where(s < smallest, smallest, s)
    if len(shift) > 0:
        x -= _load(shift[0] + first + row, there)[:, None]
    if TAIL:
        x = tl.div_rn(x, tl.broadcast_to(s[:, None], ROWS, WIDTH))
    else:
        x *= tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), s)[:, None]
    if not EVEN:
        x = tl.where(mask, x, 0.0)  # a spare half byte holds the code of zero
    rank = tl.zeros((ROWS, WIDTH), tl.int32)  # how many boundaries lie below x: a binary search
    for i in tl.static_range(BITS):
        step = 1 << (BITS - 1 - i)
        edge = tl.load(boundaries + rank + (step - 1), eviction_policy="evict_last")
        rank = tl.where(x > edge, rank + step, rank)
    code = tl.load(order + rank, eviction_policy="evict_last")
    if PAIRS:
        high, low = tl.split(tl.reshape(code, ROWS, WIDTH // 2, 2))
        half = tl.arange(0, WIDTH // 2)
        mask = None if EVEN else there[:, None] & (2 * half < size)[None, :]
        at = row[:, None] * (size // 2) + half[None, :]
        tl.store(codes + first * (size // 2) + at, (high << 4) | low, mask)
    else:
        tl.store(codes + first * size + at, code, mask)


@triton.jit
def dequantize(
    codes, levels, scale, shift, out, n,
    BITS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, EVEN: tl.constexpr, WHOLE: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Weights 0 … n − 1 to out, any float dtype, TILE a program. EVEN: TILE divides n.

    WHOLE: 4 or 8 bits, and a BLOCK that is a power of two and divides TILE.
    """
    first = tl.program_id(0).to(tl.int64) * TILE
    if WHOLE:
        BLOCKS: tl.constexpr = TILE // BLOCK
        WIDTH: tl.constexpr = BLOCK * BITS // 8
        left = tl.minimum(n - first, TILE).to(tl.int32)
        block = tl.arange(0, BLOCKS)
        at = block[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        place = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        if EVEN:
            blocks_left, bytes_left, places_left = None, None, None
        else:
            blocks_left, bytes_left, places_left = block * BLOCK < left, at * (8 // BITS) < left, place < left
        byte = _load(codes + first * BITS // 8 + at, bytes_left, "evict_first").to(tl.uint32)
        s, z = _stored(scale, first // BLOCK + block, blocks_left)[:, None], None
        if len(shift) > 0:
            z = _stored(shift, first // BLOCK + block, blocks_left)[:, None]
        table = _table(levels, BITS, LANES)
        if BITS == 4:
            pair = tl.join(_scaled(table, byte >> 4, s, z, BITS, LANES), _scaled(table, byte, s, z, BITS, LANES))
            w = tl.reshape(pair, BLOCKS, BLOCK)
        else:
            w = _scaled(table, byte, s, z, BITS, LANES)
        tl.store(out + first + place, w.to(out.dtype.element_ty), places_left)
    else:
        i = first + tl.arange(0, TILE)
        w = _element(codes, levels, scale, shift, i, i < n, BITS, BLOCK)
        tl.store(out + i, w.to(out.dtype.element_ty), i < n)


@triton.jit
def multiply_row(
    x, y, codes, levels, scale, shift, N, K, stride,
    BITS: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] · Wᵀ, a row of x and ROWS rows of W a program, BLOCKS blocks of each at a time.

    For 4 or 8 bits and a BLOCK that is a power of two and divides K. x: rows `stride` apart. EVEN: ROWS divides N and
    BLOCKS the blocks of a row. A block's Σ L[c]·x is taken first and then scaled: exact in fp32, and a multiplication a
    block instead of one a weight.
    """
    WIDTH: tl.constexpr = BLOCK * BITS // 8
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1).to(tl.int64)
    blocks = K // BLOCK
    start = row.to(tl.int64) * blocks
    table = _table(levels, BITS, LANES)
    total = tl.zeros((ROWS, BLOCKS), tl.float32)
    for first in range(0, blocks, BLOCKS):
        b = first + tl.arange(0, BLOCKS)
        block = start[:, None] + b[None, :]
        if EVEN:
            there, bytes_there, x_there = None, None, None
        else:
            there = (row < N)[:, None] & (b < blocks)[None, :]
            bytes_there, x_there = there[:, :, None], (b < blocks)[:, None]
        at = block[:, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
        byte = _load(codes + at, bytes_there, "evict_first").to(tl.uint32)
        s = _stored(scale, block, there)
        some_x = _load(x + m * stride + b[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], x_there).to(tl.float32)
        if BITS == 4:
            even, odd = tl.split(tl.reshape(some_x, BLOCKS, WIDTH, 2))
            product = _scaled(table, byte >> 4, even[None], None, BITS, LANES)
            product += _scaled(table, byte, odd[None], None, BITS, LANES)
        else:
            product = _scaled(table, byte, some_x[None], None, BITS, LANES)
        total += tl.sum(product, 2) * s
        if len(shift) > 0:
            total += _stored(shift, block, there) * tl.sum(some_x, 1)[None, :]
    tl.store(y + m * N + row, tl.sum(total, 1).to(y.dtype.element_ty), row < N)


@triton.jit
def _weights(
    codes, table, scale, shift, row, column, N, K,
    BITS: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """The tile of W [N, K] at rows `row`, int64, and COLUMNS columns from `column` on, fp32: its even and its odd columns.

    Where they do not come apart, the tile and None. Rows beyond N and columns beyond K are 0. WHOLE: as in `matmul`.
    """
    if WHOLE:
        WIDTH: tl.constexpr = COLUMNS * BITS // 8
        BLOCKS: tl.constexpr = COLUMNS // BLOCK if COLUMNS > BLOCK else 1
        j = tl.arange(0, WIDTH)[None, :]
        byte_at = row[:, None] * (K * BITS // 8) + (column * BITS // 8 + j)
        block = row[:, None] * (K // BLOCK) + (column // BLOCK + tl.arange(0, BLOCKS))[None, :]
        if EVEN:
            bytes_there, there = None, None
        else:
            bytes_there = (row < N)[:, None] & (column + j * (8 // BITS) < K)
            there = (row < N)[:, None] & (column + tl.arange(0, BLOCKS) * BLOCK < K)[None, :]
        byte = _load(codes + byte_at, bytes_there, "evict_first").to(tl.uint32)
        s, z = _spread(_stored(scale, block, there), WIDTH // BLOCKS), None
        if len(shift) > 0:
            z = _spread(_stored(shift, block, there), WIDTH // BLOCKS)
        if BITS == 4:
            return _scaled(table, byte >> 4, s, z, BITS, LANES), _scaled(table, byte, s, z, BITS, LANES)
        else:
            return _scaled(table, byte, s, z, BITS, LANES), None
    else:
        k = (column + tl.arange(0, COLUMNS))[None, :]
        mask = (row < N)[:, None] & (k < K)
        return tl.where(mask, _element(codes, table, scale, shift, row[:, None] * K + k, mask, BITS, BLOCK), 0.0), None


@triton.jit
def matmul(
    x, y, codes, levels, scale, shift, M, N, K, stride,
    BITS: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """y [SPLIT, M, N]: the products x [M, K] · Wᵀ over each of SPLIT parts of K, TOKENS × ROWS a program.

    WHOLE: 4 or 8 bits, a BLOCK that is a power of two, and divides K; of BLOCK and COLUMNS one divides the other. EVEN:
    ROWS divides N and COLUMNS divides K. W stands on the left, as the operand that a Hopper's matrix unit takes from
    registers, so a few tokens fill a tile whose other side is rows of W.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    part = tl.cdiv(tl.cdiv(K, COLUMNS), SPLIT) * COLUMNS
    start = tl.program_id(2) * part
    table = _table(levels, BITS, LANES)
    some_x = x + token.to(tl.int64)[:, None] * stride
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for column in range(start, tl.minimum(start + part, K), COLUMNS):
        k = column + tl.arange(0, COLUMNS)
        mask = (token < M)[:, None]
        if not EVEN:
            mask = mask & (k < K)[None, :]
        these = tl.load(some_x + k[None, :], mask, other=0)
        w, odd = _weights(codes, table, scale, shift, row, column, N, K, BITS, BLOCK, COLUMNS, WHOLE, EVEN, LANES)
        if odd is not None:
            these, odd_x = tl.split(tl.reshape(these, TOKENS, COLUMNS // 2, 2))
            total = tl.dot(odd.to(x.dtype.element_ty), tl.trans(odd_x), total, input_precision="ieee")
        total = tl.dot(w.to(x.dtype.element_ty), tl.trans(these), total, input_precision="ieee")
    at = (tl.program_id(2).to(tl.int64) * M + token)[:, None] * N + row[None, :]
    tl.store(y + at, tl.trans(total).to(y.dtype.element_ty), (token < M)[:, None] & (row < N)[None, :])


@triton.jit
def matmul_dx(
    g, dx, codes, levels, scale, shift, M, N, K, stride,
    BITS: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """dx [SPLIT, M, K]: the products g [M, N] · W over each of SPLIT parts of N, TOKENS × COLUMNS a program.

    As `matmul` otherwise.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS
    part = tl.cdiv(tl.cdiv(N, ROWS), SPLIT) * ROWS
    start = tl.program_id(2) * part
    table = _table(levels, BITS, LANES)
    some_g = g + token.to(tl.int64)[:, None] * stride
    HALVES: tl.constexpr = 2 if WHOLE and BITS == 4 else 1
    total = tl.zeros((TOKENS, COLUMNS // HALVES), tl.float32)
    total_odd = tl.zeros((TOKENS, COLUMNS // HALVES), tl.float32)
    for first in range(start, tl.minimum(start + part, N), ROWS):
        row = first + tl.arange(0, ROWS)
        these = tl.load(some_g + row[None, :], (token < M)[:, None] & (row < N)[None, :], other=0)
        row_at = row.to(tl.int64)
        w, odd = _weights(codes, table, scale, shift, row_at, column, N, K, BITS, BLOCK, COLUMNS, WHOLE, EVEN, LANES)
        if odd is not None:
            total_odd = tl.dot(these, odd.to(g.dtype.element_ty), total_odd, input_precision="ieee")
        total = tl.dot(these, w.to(g.dtype.element_ty), total, input_precision="ieee")
    if HALVES == 2:
        total = tl.reshape(tl.join(total, total_odd), TOKENS, COLUMNS)
    k = column + tl.arange(0, COLUMNS)
    at = (tl.program_id(2).to(tl.int64) * M + token)[:, None] * K + k[None, :]
    tl.store(dx + at, total.to(dx.dtype.element_ty), (token < M)[:, None] & (k < K)[None, :])


@triton.jit
def add_parts(parts, y, n, SPLIT: tl.constexpr, TILE: tl.constexpr):
    """y [n] = Σ parts [SPLIT, n], always in the same order."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + part * n + i, i < n, other=0)
    tl.store(y + i, total.to(y.dtype.element_ty), i < n)
