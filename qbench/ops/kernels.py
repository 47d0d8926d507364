"""The Triton kernels: quantize, dequantize, and the products with a packed weight, all for w = s·L[c] (+ z).

All formats share them. A kernel gets a table of levels, a block size and stored scales (`formats.scales`), and does not
know the format. A weight is s·L (+ z) in fp32, rounded once. Products are computed in the dtype of x and summed in fp32.

A weight is read in *units*: the largest power of two, up to a tile, that divides both the block and the row. So a unit has
one scale, and a tile is made of whole units. With codes of 4 or 8 bits a unit is a run of bytes.

A byte of two 4-bit codes holds an even and an odd weight. The even weights form one tile and the odd ones another; these
are multiplied with the even and the odd elements of x, so nothing has to be interleaved:

    bytes    [ c0 c1 ] [ c2 c3 ] [ c4 c5 ] …
    byte >> 4, even:   c0  c2  c4 …   times   x0  x2  x4 …
    byte & 15, odd:    c1  c3  c5 …   times   x1  x3  x5 …

Other widths, and units below 16 (an odd row, a block of 100), are decoded element by element, which is slow, and then
multiplied by cuBLAS.

Work for each weight with 4 bits and one row of x: take its code from a byte, look up its level, multiply and add. An H100
starts some 6 instructions in the time that it takes to load half a byte. `reports/gpu/LOG.md` lists what was tried.
"""

import triton
import triton.language as tl

NESTED_BLOCK = tl.constexpr(256)  # scales that share one absmax, `formats.scales.NESTED_BLOCK`
NO_HINT = tl.constexpr("")


@triton.jit
def _load(pointer, mask, eviction: tl.constexpr = NO_HINT):
    """Load from `pointer`, with 0 where the mask is false. Loads without a mask can be wider."""
    if mask is None:
        return tl.load(pointer, eviction_policy=eviction)
    else:
        return tl.load(pointer, mask, other=0, eviction_policy=eviction)


@triton.jit
def _decode_scales(stored, at, mask):
    """The fp32 scales of the blocks `at`. stored: (values,), or (codes, absmax, offset, dynamic map)."""
    values = _load(stored[0] + at, mask)
    if len(stored) == 1:
        return values.to(tl.float32)
    else:
        level = tl.load(stored[3] + values.to(tl.uint32))
        return level * _load(stored[1] + at // NESTED_BLOCK, mask) + tl.load(stored[2])


@triton.jit
def _lookup_table(levels, BITS: tl.constexpr, LANES: tl.constexpr):
    """The table for `_look_up`: the pointer, or with LANES a register, which holds level i in lane i of the warp."""
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
def _look_up(table, code, s, z, BITS: tl.constexpr, LANES: tl.constexpr):
    """s · L[code] (+ z), fp32. code: only its lowest BITS are used. z: None if there is no shift."""
    if LANES:  # a shuffle uses the lowest 5 bits of the code; a table shorter than a warp is repeated over the lanes
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
def _spread(values, WIDTH: tl.constexpr):
    """[rows, blocks] to [rows, blocks · WIDTH]: repeat the value of each block WIDTH times."""
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
    """Encode blocks of w and, unless GIVEN, compute their absmax; see `formats.blockwise.quantize_reference`.

    w: [blocks, size]. scale: fp32 [blocks], read if GIVEN, else written. shift: () or (fp32 [blocks],). codes: uint8, one
    code a byte, or with PAIRS two, the first in the high half. WIDTH: size, rounded up to a power of two. EVEN: ROWS
    divides the blocks and WIDTH is size, so no mask is needed. TAIL: the last, short block. It is divided by its scale,
    clamped to `smallest`.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    at = row[:, None] * size + column[None, :]
    if not EVEN:
        there = first + row < blocks
        mask = there[:, None] & (column < size)[None, :]
    else:
        mask, there = None, None
    x = _load(w + first * size + at, mask).to(tl.float32)
    if GIVEN:
        s = _load(scale + first + row, there)
    else:  # compared as integers, a NaN is above all numbers, so it shows in the scale
        s = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1).to(tl.float32, bitcast=True)
        if TAIL:
            s = tl.where(s < smallest, smallest, s)
        tl.store(scale + first + row, s, there)
    s = tl.where(tl.abs(s) < smallest, smallest, s)
    if len(shift) > 0:
        x -= _load(shift[0] + first + row, there)[:, None]
    if TAIL:
        x = tl.div_rn(x, tl.broadcast_to(s[:, None], ROWS, WIDTH))
    else:
        x *= tl.div_rn(tl.full((ROWS,), 1.0, tl.float32), s)[:, None]
    if not EVEN:
        x = tl.where(mask, x, 0.0)  # an unused half byte holds the code of zero
    rank = tl.zeros((ROWS, WIDTH), tl.int32)  # the number of boundaries below x, by binary search
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
    BITS: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, TILE: tl.constexpr, EVEN: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Decode weights 0 … n − 1 to out, any float dtype, TILE weights a program. EVEN: TILE divides n. UNITS: units
    in a block."""
    first = tl.program_id(0).to(tl.int64) * TILE
    WIDTH: tl.constexpr = UNIT * BITS // 8
    left = tl.minimum(n - first, TILE).to(tl.int32)
    unit = tl.arange(0, TILE // UNIT)
    at = unit[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    place = unit[:, None] * UNIT + tl.arange(0, UNIT)[None, :]
    if EVEN:
        units_left, bytes_left, places_left = None, None, None
    else:
        units_left, bytes_left, places_left = unit * UNIT < left, at * (8 // BITS) < left, place < left
    byte = _load(codes + first * BITS // 8 + at, bytes_left, "evict_first").to(tl.uint32)
    block = (first // UNIT + unit) // UNITS
    s, z = _decode_scales(scale, block, units_left)[:, None], None
    if len(shift) > 0:
        z = _decode_scales(shift, block, units_left)[:, None]
    table = _lookup_table(levels, BITS, LANES)
    if BITS == 4:
        pair = tl.join(_look_up(table, byte >> 4, s, z, BITS, LANES), _look_up(table, byte, s, z, BITS, LANES))
        w = tl.reshape(pair, TILE // UNIT, UNIT)
    else:
        w = _look_up(table, byte, s, z, BITS, LANES)
    tl.store(out + first + place, w.to(out.dtype.element_ty), places_left)


@triton.jit
def dequantize_elements(
    codes, levels, scale, shift, out, n, BITS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """As `dequantize`, for codes of any width from 1 to 8 bits and blocks of any size."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    mask = i < n
    bit = i * BITS
    word = _load(codes + bit // 8, mask).to(tl.int32) << 8
    if 8 % BITS != 0:  # a code may reach into the next byte
        word |= _load(codes + bit // 8 + 1, mask & (bit % 8 + BITS > 8)).to(tl.int32)
    code = (word >> (16 - BITS - bit % 8).to(tl.int32)) & ((1 << BITS) - 1)
    z = None
    if len(shift) > 0:
        z = _decode_scales(shift, i // BLOCK, mask)
    w = _look_up(levels, code, _decode_scales(scale, i // BLOCK, mask), z, BITS, False)
    tl.store(out + i, w.to(out.dtype.element_ty), mask)


@triton.jit
def multiply_row(
    x, y, codes, levels, scale, shift, N, K, stride,
    BITS: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """y [M, N] = x [M, K] · Wᵀ. A program multiplies one row of x with ROWS rows of W, COLUMNS of them at a time.

    x: rows are `stride` apart. EVEN: ROWS divides N and COLUMNS divides K. UNITS: units in a block. The sum of
    L[c]·x over a unit is scaled as a whole, so there is one multiplication a unit instead of one a weight.
    """
    WIDTH: tl.constexpr = UNIT * BITS // 8
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m = tl.program_id(1).to(tl.int64)
    units = K // UNIT
    start = row.to(tl.int64) * units
    table = _lookup_table(levels, BITS, LANES)
    total = tl.zeros((ROWS, COLUMNS // UNIT), tl.float32)
    for first in range(0, units, COLUMNS // UNIT):
        u = first + tl.arange(0, COLUMNS // UNIT)
        unit = start[:, None] + u[None, :]
        if EVEN:
            there, bytes_there, x_there = None, None, None
        else:
            there = (row < N)[:, None] & (u < units)[None, :]
            bytes_there, x_there = there[:, :, None], (u < units)[:, None]
        at = unit[:, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
        byte = _load(codes + at, bytes_there, "evict_first").to(tl.uint32)
        s = _decode_scales(scale, unit // UNITS, there)
        x_tile = _load(x + m * stride + u[:, None] * UNIT + tl.arange(0, UNIT)[None, :], x_there).to(tl.float32)
        if BITS == 4:
            even, odd = tl.split(tl.reshape(x_tile, COLUMNS // UNIT, WIDTH, 2))
            product = _look_up(table, byte >> 4, even[None], None, BITS, LANES)
            product += _look_up(table, byte, odd[None], None, BITS, LANES)
        else:
            product = _look_up(table, byte, x_tile[None], None, BITS, LANES)
        total += tl.sum(product, 2) * s
        if len(shift) > 0:
            total += _decode_scales(shift, unit // UNITS, there) * tl.sum(x_tile, 1)[None, :]
    tl.store(y + m * N + row, tl.sum(total, 1).to(y.dtype.element_ty), row < N)


@triton.jit
def _decode_tile(
    codes, table, scale, shift, row, column, N, K,
    BITS: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """The tile of W [N, K], fp32, at rows `row` (int64) and COLUMNS columns from `column` on.

    It is a tuple: with 4 bits the even and the odd columns, with 8 bits the whole tile. Rows beyond N and columns beyond K
    are 0.
    """
    WIDTH: tl.constexpr = UNIT * BITS // 8
    u = column // UNIT + tl.arange(0, COLUMNS // UNIT)
    j = tl.arange(0, COLUMNS // UNIT * WIDTH)
    byte_at = row[:, None] * (K * BITS // 8) + (column * BITS // 8 + j)[None, :]
    block = (row[:, None] * (K // UNIT) + u[None, :]) // UNITS
    if EVEN:
        bytes_there, there = None, None
    else:
        bytes_there = (row < N)[:, None] & (column + j * (8 // BITS) < K)[None, :]
        there = (row < N)[:, None] & (u * UNIT < K)[None, :]
    byte = _load(codes + byte_at, bytes_there, "evict_first").to(tl.uint32)
    s, z = _spread(_decode_scales(scale, block, there), WIDTH), None
    if len(shift) > 0:
        z = _spread(_decode_scales(shift, block, there), WIDTH)
    if BITS == 4:
        return _look_up(table, byte >> 4, s, z, BITS, LANES), _look_up(table, byte, s, z, BITS, LANES)
    else:
        return (_look_up(table, byte, s, z, BITS, LANES),)


@triton.jit
def matmul(
    x, y, codes, levels, scale, shift, M, N, K, stride,
    BITS: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, EVEN: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """y [parts, M, N]: x [M, K] · Wᵀ, summed over each part of K. A program computes TOKENS × ROWS of it.

    EVEN: ROWS divides N and COLUMNS divides K. UNITS: units in a block. W is the left operand, which Hopper's matrix
    unit can take from registers. Then tokens are the short side of the tile, and few of them fill it.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    part = tl.cdiv(tl.cdiv(K, COLUMNS), tl.num_programs(2)) * COLUMNS
    start = tl.program_id(2) * part
    table = _lookup_table(levels, BITS, LANES)
    x_rows = x + token.to(tl.int64)[:, None] * stride
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for column in range(start, tl.minimum(start + part, K), COLUMNS):
        k = column + tl.arange(0, COLUMNS)
        mask = (token < M)[:, None]
        if not EVEN:
            mask = mask & (k < K)[None, :]
        tile = tl.load(x_rows + k[None, :], mask, other=0)
        w = _decode_tile(codes, table, scale, shift, row, column, N, K, BITS, UNIT, UNITS, COLUMNS, EVEN, LANES)
        if len(w) == 2:
            tile, odd = tl.split(tl.reshape(tile, TOKENS, COLUMNS // 2, 2))
            total = tl.dot(w[1].to(x.dtype.element_ty), tl.trans(odd), total, input_precision="ieee")
        total = tl.dot(w[0].to(x.dtype.element_ty), tl.trans(tile), total, input_precision="ieee")
    at = (tl.program_id(2).to(tl.int64) * M + token)[:, None] * N + row[None, :]
    tl.store(y + at, tl.trans(total).to(y.dtype.element_ty), (token < M)[:, None] & (row < N)[None, :])


@triton.jit
def matmul_dx(
    g, dx, codes, levels, scale, shift, M, N, K, stride,
    BITS: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, EVEN: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """dx [parts, M, K]: g [M, N] · W, summed over each part of N. A program computes TOKENS × COLUMNS of it.

    Otherwise as `matmul`.
    """
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * COLUMNS
    part = tl.cdiv(tl.cdiv(N, ROWS), tl.num_programs(2)) * ROWS
    start = tl.program_id(2) * part
    table = _lookup_table(levels, BITS, LANES)
    g_rows = g + token.to(tl.int64)[:, None] * stride
    HALVES: tl.constexpr = 2 if BITS == 4 else 1
    total = tl.zeros((TOKENS, COLUMNS // HALVES), tl.float32)
    total_odd = tl.zeros((TOKENS, COLUMNS // HALVES), tl.float32)
    for first in range(start, tl.minimum(start + part, N), ROWS):
        row = first + tl.arange(0, ROWS)
        tile = tl.load(g_rows + row[None, :], (token < M)[:, None] & (row < N)[None, :], other=0)
        row_at = row.to(tl.int64)
        w = _decode_tile(codes, table, scale, shift, row_at, column, N, K, BITS, UNIT, UNITS, COLUMNS, EVEN, LANES)
        if len(w) == 2:
            total_odd = tl.dot(tile, w[1].to(g.dtype.element_ty), total_odd, input_precision="ieee")
        total = tl.dot(tile, w[0].to(g.dtype.element_ty), total, input_precision="ieee")
    if HALVES == 2:
        total = tl.reshape(tl.join(total, total_odd), TOKENS, COLUMNS)
    k = column + tl.arange(0, COLUMNS)
    at = (tl.program_id(2).to(tl.int64) * M + token)[:, None] * K + k[None, :]
    tl.store(dx + at, total.to(dx.dtype.element_ty), (token < M)[:, None] & (k < K)[None, :])


@triton.jit
def add_parts(parts, y, n, count, TILE: tl.constexpr):
    """y [n] = Σ parts [count, n], in a fixed order."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    total = tl.zeros((TILE,), tl.float32)
    for _ in range(count):
        total += tl.load(parts + i, i < n, other=0)
        parts += n
    tl.store(y + i, total.to(y.dtype.element_ty), i < n)
