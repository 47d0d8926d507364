"""Where LoRA starts: at nothing, or at what makes up for the error of quantization, W ≈ Q + B·A.

default: B is zero and Q = q(W). loftq: alternately A, B from the singular vectors of W − Q, and Q = q(W − B·A) (Li et
al. 2023, "LoftQ", arXiv 2310.08659, Algorithm 1). pissa: A, B from the largest singular vectors of W itself, and
Q = q(W − B·A) (Meng et al. 2024, "PiSSA", arXiv 2404.02948, section 3; QPiSSA).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from formats import Format, QuantizedTensor

INITS = ("default", "loftq", "pissa")
EXACT = 1024  #: the smaller side of a matrix from which on its singular vectors are found by iteration


@dataclass
class Start:
    """packed: Q. a: fp32 [rank, in_features]. b: fp32 [out_features, rank]."""

    packed: QuantizedTensor
    a: Tensor
    b: Tensor

    def dequantize(self) -> Tensor:
        """Q + B·A, fp32."""
        return torch.addmm(self.packed.dequantize(torch.float32), self.b, self.a)


def find(w: Tensor, fmt: Format, rank: int, init: str, rounds: int, name: str = "tensor") -> Start:
    """Quantize w [out_features, in_features] together with the A and B that a fine-tune begins from.

    rounds: alternations of LoftQ, of which the best is kept; PiSSA, by its definition, has one. Raises ValueError, naming
    the tensor, if it holds NaN or Inf.
    """
    dtype, w = w.dtype, w.detach().float()

    def quantize(rest: Tensor) -> QuantizedTensor:
        return replace(fmt.quantize(rest, name), dtype=dtype)

    if init == "pissa":
        b, a = low_rank(w, rank)
        return Start(quantize(w - b @ a), a, b)
    packed, least = quantize(w), float("inf")
    best: Start | None = None
    for _ in range(rounds):
        b, a = low_rank(w - packed.dequantize(torch.float32), rank)
        start = Start(packed, a, b)
        error = float((w - start.dequantize()).double().square().sum())
        if error < least:
            best, least = start, error
        packed = quantize(w - b @ a)
    assert best, "there is one round at least"
    return best


def low_rank(m: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B [rows, rank] and A [rank, columns] whose product is nearest to m [rows, columns] (Eckart and Young 1936), the
    singular values shared between them equally."""
    if min(m.shape) <= EXACT:
        u, s, vh = torch.linalg.svd(m, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[m.device] if m.device.type == "cuda" else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(m, min(rank + 16, *m.shape), niter=8)
        vh = v.t()
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]
