"""The next-token loss, as a custom autograd function that avoids fp32 copies of the logits.

PyTorch's own loss keeps fp32 copies of 16-bit logits. On a CPU, where each copy is fresh memory, the copies take longer
than the arithmetic.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IGNORED = -100  #: cross_entropy's target for a position without a next token
CHUNK = {"cpu": 2**20, "cuda": 2**24}  #: logits in fp32 at once: they fit in a CPU's cache, or fill a GPU


def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits [n, seq, vocabulary] of a causal LM for tokens [n, seq], without those of virtual prompt tokens."""
    return model(input_ids=tokens, use_cache=False).logits[:, -tokens.shape[1] :]


def next_token_loss(logits: Tensor, tokens: Tensor, targets: int | None = None) -> Tensor:
    """Mean cross-entropy, nats, fp32, of logits [n, seq, vocabulary] against the next of the tokens [n, seq].

    targets: the number to divide by. For a part of a batch it is the whole batch's, so that the parts add up to the mean.
    Tokens that are IGNORED are no targets.
    """
    following = F.pad(tokens[:, 1:], (0, 1), value=IGNORED)
    targets = tokens[:, 1:].numel() if targets is None else targets
    return _CrossEntropy.apply(logits.flatten(0, 1), following.flatten()) / targets


class _CrossEntropy(torch.autograd.Function):
    """The sum of the cross-entropies of logits [n, vocabulary], in chunks. Rows with a negative target are ignored."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Any:
        ctx.save_for_backward(logits, targets)
        chunks = _split_chunks(logits, logits, targets)
        return sum(F.cross_entropy(rows.float(), target, reduction="sum") for rows, target in chunks)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        logits, targets = ctx.saved_tensors
        column, weight = targets.clamp(min=0)[:, None], (g * (targets >= 0))[:, None]
        if torch.is_grad_enabled():  # for second derivatives, which in-place writes do not have
            p = logits.float().softmax(1)
            return ((p - torch.zeros_like(p).scatter(1, column, 1.0)) * weight).to(logits.dtype), None
        grad = torch.empty_like(logits)
        for rows, row_column, row_weight, out in _split_chunks(logits, logits, column, weight, grad):
            p = rows.float().softmax(1)
            p.scatter_add_(1, row_column, p.new_full(row_column.shape, -1.0))
            out.copy_(p.mul_(row_weight))
        return grad, None


def _split_chunks(logits: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors into chunks of as many rows as hold CHUNK logits."""
    rows = max(1, CHUNK[logits.device.type] // logits.shape[1])
    return zip(*(t.split(rows) for t in tensors), strict=True)
