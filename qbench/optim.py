"""Optimizers by name."""

from collections.abc import Iterable

import torch
from torch import nn

OPTIMIZERS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}


def build(name: str, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return OPTIMIZERS[name](parameters, lr=lr, weight_decay=weight_decay)
