"""How the scales (and shifts) of a tensor are stored: one value per block, plain or double quantized.

Stored scales are a tuple of tensors, whose length says how to read it:

    (values,)                    one value per block, in the dtype of the format: fp32, or fp16, or any other float
    (codes, absmax, offset)      double quantization: uint8 codes [n] into the dynamic map, fp32 absmax [ceil(n/256)],
                                 fp32 offset []

Double quantization (QLoRA, arXiv 2305.14314, section 3): the mean is subtracted from the scales, and the rest is
quantized to 8 bits in blocks of 256. At block 64 the overhead falls from 32/64 = 0.5 to 8/64 + 32/(64·256) = 0.127 bits
per parameter. The paper speaks of an 8-bit float; the code released with it uses the *dynamic map* (Dettmers, arXiv
1511.04561). So does this module, to the same bits as bitsandbytes.

The mean is a sum of floats, so it depends on the order of the additions. bitsandbytes uses PyTorch's order, which depends
on the number of threads beyond 32,768 scales. Here the order is always that of two threads (`mean`).
"""

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from .modes import kept

NESTED_BLOCK = 256
GRAIN = 32768  # PyTorch adds up to this many numbers in one thread
CPU = torch.device("cpu")
Stored = tuple[Tensor, ...]

library = torch.library.Library("qbench", "FRAGMENT")
library.define("mean(Tensor values) -> Tensor")


def encode_scales(values: Tensor, dq: bool, dtype: torch.dtype = torch.float32) -> Stored:
    """Store fp32 `values` [n] in `dtype` or, if `dq`, double quantized."""
    if not dq or not values.numel():
        return (values.to(dtype),)
    offset = torch.ops.qbench.mean(values)
    if not isfinite(offset):  # the sum overflows fp32
        offset = torch.ops.qbench.mean(values.double()).float()
    blocks, absmax = _blocks(values - offset)
    # a block of zeros gives 0·∞ = NaN, which bitsandbytes stores as code 0
    normalized = (blocks * absmax.reciprocal()[:, None]).nan_to_num_(nan=-1.0, posinf=1.0, neginf=-1.0)
    boundaries = _dynamic_boundaries(values.device)
    codes = torch.bucketize(normalized.reshape(-1)[: values.numel()], boundaries, out_int32=True).to(torch.uint8)
    return codes, absmax, offset


def mean(values: Tensor) -> Tensor:
    """Returns the mean of `values` [n], n > 0, in their dtype: the same bits with any number of threads, on any device.

    On a CPU PyTorch adds up to `GRAIN` numbers in one thread. It splits more numbers evenly among threads and adds their
    sums. Here there are always two parts. So this equals `values.mean()` with any number of threads up to 32,768 numbers,
    with two or more up to 65,536, and with two beyond. It is an op because torch.compile would add in another order.
    """
    device, n, values = values.device, values.numel(), values.cpu()
    if n <= GRAIN:
        return values.mean().to(device)
    # PyTorch computes two sums at once in one thread each
    halves = [half.expand(2, -1).sum(1)[0] for half in values.split(-(n // -2))]
    return ((halves[0] + halves[1]) / n).to(device)


library.impl("mean", mean, "CompositeExplicitAutograd")
torch.library.register_fake("qbench::mean", lambda values: values.new_empty(()), lib=library)


def largest(values: Tensor) -> float:
    """Returns the largest magnitude among floats: NaN if one is NaN, 0 if there are none."""
    return float(torch.linalg.vector_norm(values.float(), torch.inf)) if values.numel() else 0.0


def largest_stored(stored: Sequence[Tensor]) -> float:
    """Returns an upper bound of the magnitudes of stored scales: NaN if one may be NaN.

    With double quantization a scale is a level of at most 1, times the absmax of its block, plus the offset.
    """
    return float(sum(map(largest, stored[-2:])))


def decode_scales(stored: Sequence[Tensor]) -> Tensor:
    """Returns the fp32 values [n] of `stored`."""
    if len(stored) == 1:
        return stored[0].float()
    codes, absmax, offset = stored
    levels = dynamic_map(codes.device).index_select(0, codes.int())
    blocks = torch.nn.functional.pad(levels, (0, -len(levels) % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    return (blocks * absmax[:, None]).view(-1)[: len(levels)] + offset


def empty_scales(n: int, dq: bool, device: torch.device, dtype: torch.dtype = torch.float32) -> Stored:
    """Returns uninitialized tensors like those that `encode_scales` gives for `n` values."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    if not dq or not n:
        return (empty(n, dtype=dtype),)
    return empty(n, dtype=torch.uint8), empty(-(n // -NESTED_BLOCK)), empty()


def _blocks(values: Tensor) -> tuple[Tensor, Tensor]:
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    return blocks, blocks.abs().amax(1)


@kept
def dynamic_map(device: torch.device = CPU, signed: bool = True) -> Tensor:
    """The 8-bit dynamic map, fp32 [256], ascending to 1 from −0.99296875 or, unsigned, from 0 (arXiv 1511.04561;
    bitsandbytes).

    Decade i = 0 … 6 holds ±10^(i−6) times the midpoints of 2^i equal steps from 0.1 to 1. 0 and 1 are added. The
    unsigned map has twice as many steps.
    """
    levels = [0.0, 1.0]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i + (not signed)) + 1, dtype=torch.float32, device=CPU)
        decade = 10 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        levels += decade.tolist() + ((-decade).tolist() if signed else [])
    return torch.tensor(sorted(levels), dtype=torch.float32, device=device)


@kept
def _dynamic_boundaries(device: torch.device) -> Tensor:
    """The fp32 thresholds [255] of the dynamic map: a value above threshold k takes a level beyond k.

    bitsandbytes (0.50, CPU) rounds the normalized value to a grid of 65536 points on [−1, 1] before it looks for the
    nearest level. So its thresholds are not the midpoints of the map but the edges of that grid's cells. They are found
    here by bisection over the fp32 numbers, with the grid's own arithmetic: fma(0.5·(x + 1), 65535, 0.5), in fp32.
    """
    levels = dynamic_map()
    grid = (-1.0 + (2.0 * torch.arange(65536, dtype=torch.float32, device=CPU)) / 65535.0).contiguous()
    first_cell = torch.searchsorted(grid, 0.5 * (levels[:-1] + levels[1:]), right=True)

    def cell(x: Tensor) -> Tensor:
        half = (0.5 * (x + 1.0)).double()  # exact in fp32; the fma's product and sum are then exact in fp64
        return (half * 65535.0 + 0.5).float().long()

    low, high = (torch.full((255,), end, dtype=torch.float32, device=CPU) for end in (-1.0, 1.0))
    while True:  # keep cell(low) < first_cell <= cell(high)
        middle = ((low.double() + high.double()) / 2).float()
        done = (middle == low) | (middle == high)
        if done.all():
            return low.to(device)
        below = cell(middle) < first_cell
        low, high = torch.where(below & ~done, middle, low), torch.where(below | done, high, middle)
