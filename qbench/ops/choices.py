"""Which kernel and tile sizes a product uses on a GPU, depending on the number of rows M of x.

A choice is a dict of a `path` and its kernel's parameters. A product with M rows takes the first choice with M ≤ `up_to`.
The paths:

    multiply_row  one row of x at a time, with multiply-adds in fp32; {rows, columns, num_warps}
    matmul        decoded tiles and x in the matrix units; {tokens, rows, columns, fill, num_warps, num_stages}; the sum is
                  split until there are `fill` programs for each multiprocessor
    decode        decodes the whole weight to the dtype of x, then calls cuBLAS; {}

`python -m qbench bench tune` measures the best choices on a device and writes them to a file in `tuned/`. The environment
variable QBENCH_TUNED names another file. A device without a file uses `default`.
"""

import json
import os
from functools import lru_cache
from pathlib import Path

TUNED = Path(__file__).parent / "tuned"

# Why these defaults: arithmetic for 4 bits on an H100 (3 TB/s, 132 multiprocessors that start 128 operations a cycle),
# and the instructions a weight that `python -m qbench bench compile` counts. They are not measured yet.
#   M = 1     half a byte arrives in the time of 6 instructions. `multiply_row` has 5.0 a weight; `matmul` has 5.7, and
#             moves x, padded to 16 rows, through shared memory.
#   M ≤ 128   each weight is decoded once, in 6 to 8 instructions. Decoding to memory first would write 2 bytes and read
#             them again: 9 times the bytes of the packed weight.
#   beyond    each tile of tokens would decode every weight again. Decoding once costs 1 ps a weight, and the product
#             2.9 ps at M = 1024.
_TILE = {"path": "matmul", "tokens": 16, "rows": 64, "columns": 128, "fill": 4, "num_warps": 4, "num_stages": 2}
_REST = {"up_to": None, "path": "decode"}
_ROW = {"up_to": 1, "path": "multiply_row", "rows": 4, "columns": 1024, "num_warps": 2}
_ELEMENTWISE = {"quantize": {"tile": 2048, "num_warps": 4}, "dequantize": {"tile": 4096, "num_warps": 4}}


def default(capability: int) -> dict:
    """The choices for an untuned device of this major compute capability.

    The matrix units of Hopper and of data-centre Blackwell can hold tiles that would spill registers on other devices.
    """
    tiles = [{"up_to": 16, **_TILE}, {"up_to": 32, **_TILE, "tokens": 32, "num_stages": 3}]
    if capability in (9, 10):
        tiles.append({"up_to": 64, **_TILE, "tokens": 64})
        tiles.append({"up_to": 128, **_TILE, "tokens": 128, "rows": 128, "num_warps": 8, "fill": 1})
    else:
        tiles.append({"up_to": 128, **_TILE, "tokens": 64, "rows": 128, "columns": 64, "num_warps": 8})
    return _ELEMENTWISE | {"linear": [_ROW, *tiles, _REST], "linear_dx": [*tiles, _REST]}


def tuned_file(device_name: str) -> Path:
    """The file with the choices for a device, by the name that its driver reports."""
    return TUNED / f"{device_name.replace(' ', '_')}.json"


@lru_cache
def choices(device_name: str, capability: int) -> dict:
    """The choices for a device: {quantize, dequantize: dict; linear, linear_dx: list of dict}.

    Raises RuntimeError, naming the file, if it cannot be read.
    """
    named = os.environ.get("QBENCH_TUNED")
    file = Path(named) if named else tuned_file(device_name)
    if not named and not file.exists():
        return default(capability)
    try:
        return default(capability) | json.loads(file.read_text("utf-8"))["choices"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RuntimeError(f"{file}: {error}; accepted is a file that `python -m qbench bench tune` wrote") from error


def choose(rules: list[dict], m: int, usable: set[str]) -> dict:
    """The first choice for a product with `m` rows among the `usable` paths."""
    return next(rule for rule in rules if rule["path"] in usable and (rule["up_to"] is None or m <= rule["up_to"]))
