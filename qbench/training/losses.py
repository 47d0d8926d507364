"""Steps of a training loop, two as functions of autograd that neither keep nor write what they can do without.

Left to autograd, these keep fp32 copies of what the model holds in 16 bit, and on a CPU, where each copy is fresh memory,
spend more time on the copies than on the arithmetic.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NOTHING = -100  #: in the place of a token where none follows: cross_entropy's mark for that
LOGITS = {"cpu": 2**20, "cuda": 2**24}  #: in fp32 at once: a share of the cache, enough for a GPU to fill itself


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits [n, seq, vocabulary] of a causal LM for tokens [n, seq]; those of virtual tokens before them are left out."""
    return model(input_ids=tokens, use_cache=False).logits[:, -tokens.shape[1] :]


def next_token_loss(logits: Tensor, tokens: Tensor, targets: int | None = None) -> Tensor:
    """Mean cross-entropy, nats, in fp32, of logits [n, seq, vocabulary] and the tokens [n, seq] that follow them.

    Of a part of a batch it is that part's share of the mean: `targets` are those of the whole. NOTHING among the tokens
    is no target.
    """
    following = F.pad(tokens[:, 1:], (0, 1), value=NOTHING)
    targets = tokens[:, 1:].numel() if targets is None else targets
    return _CrossEntropy.apply(logits.flatten(0, 1), following.flatten()) / targets


class _CrossEntropy(torch.autograd.Function):
    """The sum over rows of logits [n, vocabulary], a few at a time; a negative target counts nothing."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Any:
        ctx.save_for_backward(logits, targets)
        parts = _split(logits, logits, targets)
        return sum(F.cross_entropy(some.float(), target, reduction="sum") for some, target in parts)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        column, weight = targets.clamp(min=0)[:, None], (g * (targets >= 0))[:, None]
        if torch.is_grad_enabled():  # second derivatives are asked for, which what is written in place would not have
            p = logits.float().softmax(1)
            return ((p - torch.zeros_like(p).scatter(1, column, 1.0)) * weight).to(logits.dtype), None
        grad = torch.empty_like(logits)
        for some, at, share, out in _split(logits, logits, column, weight, grad):
            p = some.float().softmax(1)
            p.scatter_add_(1, at, p.new_full(at.shape, -1.0))
            out.copy_(p.mul_(share))
        return grad, None


def _split(logits: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    rows = max(1, LOGITS[logits.device.type] // logits.shape[1])
    return zip(*(t.split(rows) for t in tensors), strict=True)
