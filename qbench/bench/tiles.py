"""Finds the fastest path and tile sizes for each number of rows on the GPU at hand, for `ops.choices`."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product as pairs
from math import inf
from statistics import geometric_mean, median
from typing import Any

import torch

import formats
from qbench.ops import cuda
from qbench.results.provenance import environment

from .products import DTYPE, OPS, SHAPES
from .timing import copies_beyond_cache, time_calls

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
DECODE = {"path": "decode"}


def candidates(op: str, rows: int) -> Iterator[dict]:
    """The choices to time for a product with this number of rows."""
    yield DECODE
    if op == "linear" and rows <= 4:
        for tile_rows, columns, warps in (
            (4, 1024, 1),
            (4, 1024, 2),
            (8, 1024, 2),
            (8, 512, 1),
            (2, 2048, 2),
            (16, 1024, 4),
        ):
            yield {"path": "multiply_row", "rows": tile_rows, "columns": columns, "num_warps": warps}
    tokens = max(16, min(rows, 128))
    tiles = [(64, 128, 4), (128, 128, 8), (128, 64, 8)] if tokens > 16 else [(64, 128, 4), (64, 256, 4), (32, 128, 4)]
    for (tile_rows, columns, warps), stages, fill in pairs(tiles, (2, 3), (1, 4)):
        yield {
            "path": "matmul",
            "tokens": tokens,
            "rows": tile_rows,
            "columns": columns,
            "fill": fill,
            "num_warps": warps,
            "num_stages": stages,
        }


def tune(device: torch.device, models: tuple[str, ...], advance: Callable[[str], None], repeats: int = 5) -> dict:
    """Time every candidate for nf4 with double quantization on the layers of `models` (keys of `products.SHAPES`).

    The best choice has the smallest geometric mean of times over the layers. Returns {environment, choices,
    timings}, which `ops.choices` reads. advance: called len(OPS) · len(ROWS) times, with a description of what was timed.
    """
    torch.manual_seed(0)
    shapes = [shape for model in models for shape in SHAPES[model].values()]
    weights = [formats.get("nf4", dq=True).quantize(torch.randn(shape, device=device).to(DTYPE)) for shape in shapes]
    rules_by_op, timings = {}, []
    for op in OPS:
        rules: list[dict[str, Any]] = []
        for rows in ROWS:
            timed = [(_time_choice(op, rows, c, weights, device, repeats), c) for c in candidates(op, rows)]
            timings += [{"op": op, "rows": rows, "choice": choice, "seconds": time} for time, choice in timed]
            best = min(timed, key=lambda pair: pair[0])[1]
            if rules and rules[-1] == {**best, "up_to": rules[-1]["up_to"]}:
                rules.pop()
            rules.append({"up_to": rows, **best})
            advance(f"{op}, M = {rows}: {best['path']}")
        if rules[-1]["path"] == "decode":
            rules.pop()
        rules_by_op[op] = [*rules, {"up_to": None, **DECODE}]
    return {"environment": environment(device), "choices": rules_by_op, "timings": timings}


def _time_choice(op: str, rows: int, choice: dict, weights: list, device: torch.device, repeats: int) -> float:
    """The geometric mean over the weights of the median seconds; infinite if the tile does not fit the device."""
    from triton.runtime.errors import OutOfResources, PTXASError

    medians = []
    for q in weights:
        copies = [q] + [replace(q, codes=q.codes.clone()) for _ in range(copies_beyond_cache(device, q.nbytes) - 1)]
        x = torch.randn(rows, q.shape[1 if op == "linear" else 0], device=device).to(DTYPE)
        packed = [(c.codes, c.levels, list(c.scale), list(c.shift), c.bits, c.block, *c.shape) for c in copies]
        try:
            calls = [partial(cuda.product, op, x, *p, choice=choice) for p in packed]
            medians.append(median(time_calls(device, calls, repeats)))
        except (OutOfResources, PTXASError):
            return inf
    return geometric_mean(medians)
