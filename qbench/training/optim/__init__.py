"""Optimizers by name: PyTorch's, and AdamW with paged and 8-bit states, as in QLoRA. Read adamw.py first.

adamw    PagedAdamW, the optimizer
paging   moves pages of states between device and host memory
states   how the moments are stored: as floats or in 8 bits
streams  the CUDA streams that copy pages
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial

import torch
from torch import nn

from .adamw import PagedAdamW
from .paging import PAGE

__all__ = ["OPTIMIZERS", "PAGE", "PAGED", "PYTORCH", "PagedAdamW", "build", "footprint"]

Optimizers = dict[str, Callable[..., torch.optim.Optimizer]]

PYTORCH: Optimizers = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
#: the ones with a memory budget
PAGED: Optimizers = {"paged_adamw": PagedAdamW, "paged_adamw_8bit": partial(PagedAdamW, bits=8)}
OPTIMIZERS: Optimizers = {**PYTORCH, "adamw_8bit": partial(PagedAdamW, bits=8), **PAGED}


def build(
    name: str,
    parameters: Iterable[nn.Parameter],
    lr: float,
    weight_decay: float,
    budget: int | str | None = None,
    page: int | str = PAGE,
) -> torch.optim.Optimizer:
    """Build an optimizer. For paged ones, budget: bytes of states on each device; page: bytes that move at once."""
    paging = {"budget": budget, "page": page} if name in PAGED else {}
    return OPTIMIZERS[name](parameters, lr=lr, weight_decay=weight_decay, **paging)


def footprint(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Memory of the states: `peak_bytes`, the most on the device; for a PagedAdamW, all fields of `PagingStats`."""
    if isinstance(optimizer, PagedAdamW):
        return asdict(optimizer.paging)
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    return {"peak_bytes": sum(value.nbytes for value in states if torch.is_tensor(value))}
