"""The launch of a kernel for an op: its grid, its compile-time constants and compiler options.

It uses neither tensors nor Triton, so launches can be inspected, and their kernels compiled, without a GPU.
"""

from importlib.metadata import PackageNotFoundError, version
from math import gcd
from typing import NamedTuple

from formats.blockwise import block_count


def _installed_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


LARGEST_BLOCK = 8192  #: the most weights that a quantize program can hold
#: whether a loop with assembly in it can be pipelined: Triton 3.7 fails on one
ASSEMBLY_PIPELINED = not _installed_version("triton").startswith("3.7.")
ANY_TILE = 1024  # elements of a program that handles them one by one


class Launch(NamedTuple):
    """How to launch a kernel.

    kernel: its name in `kernels`. constants: its constexpr arguments. options: for Triton's compiler.
    """

    kernel: str
    grid: tuple[int, ...]
    constants: dict[str, int | bool]
    options: dict[str, int | bool]


def unit(bits: int, block: int, *along: int) -> int:
    """The size of a unit (see `kernels`), which divides the block and all lengths `along`; 0 if there is none."""
    size = gcd(block, *along)
    size &= -size
    return size if bits in (4, 8) and size >= 16 else 0


def quantize(choice: dict, bits: int, blocks: int, size: int, given: bool, tail: bool, pairs: bool) -> Launch:
    """Quantize `blocks` blocks of `size` weights. given: scales are given. tail: short block. pairs: two codes a byte."""
    width = max(_next_power_of_two(size), 2)
    rows = min(max(choice["tile"] // width, 1), _next_power_of_two(blocks))
    even = width == size and blocks % rows == 0
    constants = {"BITS": bits, "WIDTH": width, "ROWS": rows, "EVEN": even, "GIVEN": given, "TAIL": tail, "PAIRS": pairs}
    options = {"num_warps": choice["num_warps"], "enable_fp_fusion": False}
    return Launch("quantize", (block_count(blocks, rows),), constants, options)


def dequantize(choice: dict, bits: int, block: int, n: int, lanes: bool) -> Launch:
    """Decode n weights. No fused multiply-add: the reference rounds s·L before it adds z."""
    options = {"num_warps": choice["num_warps"], "enable_fp_fusion": False}
    size = unit(bits, block, choice["tile"])
    if not size:
        grid = (block_count(n, ANY_TILE),)
        return Launch("dequantize_elements", grid, {"BITS": bits, "BLOCK": block, "TILE": ANY_TILE}, options)
    tile = choice["tile"]
    constants = {**_unit_constants(bits, block, size, lanes), "TILE": tile, "EVEN": n % tile == 0}
    return Launch("dequantize", (block_count(n, tile),), constants, options)


def product(
    op: str, choice: dict, m: int, n: int, k: int, bits: int, block: int, lanes: bool, processors: int
) -> Launch:
    """`linear` or `linear_dx` of m rows with a weight [n, k], as `choice` says, on `processors` multiprocessors."""
    rows, columns = choice["rows"], choice["columns"]
    constants = {
        **_unit_constants(bits, block, unit(bits, block, k, columns), lanes),
        "ROWS": rows,
        "COLUMNS": columns,
        "EVEN": n % rows == 0 and k % columns == 0,
    }
    stages = choice.get("num_stages", 1) if ASSEMBLY_PIPELINED else 1
    options = {"num_warps": choice["num_warps"], "num_stages": stages, "enable_fp_fusion": True}
    if choice["path"] == "multiply_row":
        return Launch("multiply_row", (block_count(n, rows), m), constants, options)
    kernel, side, steps = "matmul", block_count(n, rows), block_count(k, columns)
    if op == "linear_dx":
        kernel, side, steps = "matmul_dx", steps, side
    tiles = block_count(m, choice["tokens"]) * side
    split = max(min(choice["fill"] * processors // tiles, steps // 4), 1)
    constants["TOKENS"] = choice["tokens"]
    return Launch(kernel, (block_count(m, choice["tokens"]), side, split), constants, options)


def add_parts(n: int) -> Launch:
    """Sum the partial results of n elements."""
    return Launch("add_parts", (block_count(n, ANY_TILE),), {"TILE": ANY_TILE}, {"enable_fp_fusion": True})


def _unit_constants(bits: int, block: int, size: int, lanes: bool) -> dict[str, int | bool]:
    """Constants of all kernels that read units. lanes: whether the device has warp lanes, to hold a table of 16 levels."""
    return {"BITS": bits, "UNIT": size, "UNITS": block // size, "LANES": lanes and bits == 4}


def _next_power_of_two(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()
