"""A histogram of the normalized weights, to compare with the levels of the format."""

from collections.abc import Mapping

import torch
from torch import nn

from formats import QuantizedTensor
from formats.blockwise import block_count, normalize, reduce_blocks
from formats.scales import decode_scales
from qbench.model.selection import weight_of

BINS = 160
SAMPLE = 2**22  # weights to sample from the whole model


def normalized_weights(layers: Mapping[str, nn.Module], packed: dict[str, QuantizedTensor]) -> dict:
    """Histogram of (w − z)/s over all layers, over the range of the levels.

    Returns edges [BINS + 1], density [BINS], and levels: one sorted list, or, if each tensor has its own table, one for
    each of the first 16 layers. Without quantization s is the absmax of the block, and there are no levels.
    """
    total = sum(q.numel for q in packed.values())
    counts = torch.zeros(BINS, dtype=torch.float64)
    low, high = -1.0, 1.0
    for name, layer in layers.items():
        q = packed[name]
        keep = max(q.block, q.numel * SAMPLE // max(total, SAMPLE) // q.block * q.block)
        w = weight_of(layer).detach().reshape(-1)[:keep].float()
        blocks = block_count(w.numel(), q.block)
        scale = decode_scales(q.scale)[:blocks] if q.scale else reduce_blocks(w, q.block, lambda x: x.abs().amax(1))
        shift = decode_scales(q.shift)[:blocks] if q.shift else None
        high = 1.0 if q.levels is None else float(q.levels.abs().max())
        low = 0.0 if q.shift else -high
        counts += torch.histc(normalize(w, q.block, scale, shift).cpu(), BINS, low, high).double()
    tables = [q.levels.sort().values.tolist() for q in packed.values() if q.levels is not None]
    return {
        "edges": torch.linspace(low, high, BINS + 1).tolist(),
        "density": (counts / counts.sum() * BINS / (high - low)).tolist(),
        "levels": tables[:16] if next(iter(packed.values())).own_levels else tables[:1],
    }
