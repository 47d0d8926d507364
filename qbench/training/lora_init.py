"""How LoRA's A and B are initialized: B = 0, or A and B that compensate the quantization error, W ≈ Q + B·A.

default: B is zero and Q = q(W).
loftq: alternates between A, B from the singular vectors of W − Q, and Q = q(W − B·A) (Li et al. 2023, "LoftQ", arXiv
2310.08659, Algorithm 1).
pissa: A, B from the largest singular vectors of W itself, and Q = q(W − B·A) (Meng et al. 2024, "PiSSA", arXiv
2404.02948, section 3; QPiSSA).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from formats import Format, QuantizedTensor

INITS = ("default", "loftq", "pissa")
EXACT = 1024  #: matrices whose smaller side is larger get approximate singular vectors, by iteration


@dataclass
class LoraInit:
    """The start of one layer. packed: Q. a: fp32 [rank, in_features]. b: fp32 [out_features, rank]."""

    packed: QuantizedTensor
    a: Tensor
    b: Tensor

    def dequantize(self) -> Tensor:
        """Q + B·A, fp32."""
        return torch.addmm(self.packed.dequantize(torch.float32), self.b, self.a)


def initialize(w: Tensor, fmt: Format, rank: int, init: str, rounds: int, name: str = "tensor") -> LoraInit:
    """Quantize w [out_features, in_features], and compute the A and B that its fine-tune starts from.

    init: "loftq" or "pissa". rounds: alternations of LoftQ; the one with the least error is returned. PiSSA has one
    round by definition. Raises ValueError, naming the tensor, if it holds NaN or Inf.
    """
    dtype, w = w.dtype, w.detach().float()

    def quantize(residual: Tensor) -> QuantizedTensor:
        return replace(fmt.quantize(residual, name), dtype=dtype)

    if init == "pissa":
        b, a = low_rank(w, rank)
        return LoraInit(quantize(w - b @ a), a, b)
    packed, least_error = quantize(w), float("inf")
    best: LoraInit | None = None
    for _ in range(rounds):
        b, a = low_rank(w - packed.dequantize(torch.float32), rank)
        start = LoraInit(packed, a, b)
        error = float((w - start.dequantize()).double().square().sum())
        if error < least_error:
            best, least_error = start, error
        packed = quantize(w - b @ a)
    assert best, "rounds is at least 1"
    return best


def low_rank(m: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B [rows, rank] and A [rank, columns] whose product is nearest to m [rows, columns] (Eckart and Young 1936).

    Each has the square roots of the singular values as factors.
    """
    if min(m.shape) <= EXACT:
        u, s, vh = torch.linalg.svd(m, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[m.device] if m.device.type == "cuda" else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(m, min(rank + 16, *m.shape), niter=8)
        vh = v.t()
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]
