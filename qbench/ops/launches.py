"""How a kernel is launched for an op: over which grid, and what is compiled into it.

Free of tensors and of Triton, so that a launch can be looked at, and compiled, where there is no GPU.
"""

from typing import NamedTuple

from formats.blockwise import block_count

LARGEST_BLOCK = 8192  #: weights that a quantize program can hold at once
ANY_TILE = 1024  # weights a program of dequantize takes where blocks are not whole in a tile


class Launch(NamedTuple):
    """kernel: its name in `kernels`. constants: what is compiled into it. options: what the compiler is told."""

    kernel: str
    grid: tuple[int, ...]
    constants: dict[str, int | bool]
    options: dict[str, int | bool]


def is_whole(bits: int, block: int, columns: int) -> bool:
    """Whether rows of so many columns are read block by block (see `kernels`)."""
    return bits in (4, 8) and block >= 16 and _is_power_of_two(block) and columns % block == 0


def quantize(choice: dict, bits: int, blocks: int, size: int, given: bool, tail: bool, pairs: bool) -> Launch:
    """`blocks` blocks of `size` weights each. pairs: two codes to a byte."""
    width = max(_ceiling(size), 2)
    rows = min(max(choice["tile"] // width, 1), _ceiling(blocks))
    even = width == size and blocks % rows == 0
    constants = {"BITS": bits, "WIDTH": width, "ROWS": rows, "EVEN": even, "GIVEN": given, "TAIL": tail, "PAIRS": pairs}
    options = {"num_warps": choice["num_warps"], "enable_fp_fusion": False}
    return Launch("quantize", (block_count(blocks, rows),), constants, options)


def dequantize(choice: dict, bits: int, block: int, n: int, lanes: bool) -> Launch:
    """n weights. No fused multiply-add: the reference rounds s·L before it adds z."""
    whole = is_whole(bits, block, block) and block <= choice["tile"]
    tile = choice["tile"] if whole else ANY_TILE
    constants = {"BITS": bits, "BLOCK": block, "TILE": tile, "EVEN": n % tile == 0, "WHOLE": whole}
    constants["LANES"] = _lanes(lanes, bits, whole)
    options = {"num_warps": choice["num_warps"], "enable_fp_fusion": False}
    return Launch("dequantize", (block_count(n, tile),), constants, options)


def product(op: str, choice: dict, m: int, n: int, k: int, bits: int, block: int, lanes: bool, processors: int) -> Launch:
    """`linear` or `linear_dx` of m rows with a weight [n, k], along the path of the choice, on so many processors."""
    whole = is_whole(bits, block, k)
    rows, columns = choice["rows"], choice["columns"]
    constants = {"BITS": bits, "BLOCK": block, "LANES": _lanes(lanes, bits, whole)}
    options = {"num_warps": choice["num_warps"], "num_stages": choice.get("num_stages", 1), "enable_fp_fusion": True}
    if choice["path"] == "multiply_row":
        rows, columns = max(rows * columns // max(columns, block), 1), max(columns, block)
        constants |= {"ROWS": rows, "BLOCKS": columns // block, "EVEN": n % rows == 0 and k % columns == 0}
        return Launch("multiply_row", (block_count(n, rows), m), constants, options)
    tokens = choice["tokens"]
    side, steps = block_count(n, rows), block_count(k, columns)
    kernel = "matmul"
    if op == "linear_dx":
        kernel, side, steps = "matmul_dx", steps, side
    tiles = block_count(m, tokens) * side
    split = max(min(choice["fill"] * processors // tiles, steps // 4), 1)
    constants |= {"TOKENS": tokens, "ROWS": rows, "COLUMNS": columns, "SPLIT": split, "WHOLE": whole}
    constants["EVEN"] = n % rows == 0 and k % columns == 0
    return Launch(kernel, (block_count(m, tokens), side, split), constants, options)


def add_parts(split: int, n: int) -> Launch:
    return Launch("add_parts", (block_count(n, 1024),), {"SPLIT": split, "TILE": 1024}, {"enable_fp_fusion": True})


def _lanes(there: bool, bits: int, whole: bool) -> bool:
    """Whether the lanes of a warp hold the table: 16 levels fit. There are none in the interpreter."""
    return there and whole and bits == 4


def _is_power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def _ceiling(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()
