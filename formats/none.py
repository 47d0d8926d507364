"""No quantization: 16 bits per weight. It is the baseline of every other format, and runs through the same code.

A code is the weight itself in bf16 (fp16 if the checkpoint is fp16), so there are no levels and no scales. Block size and
double quantization have no effect, so they are fixed.
"""

from typing import ClassVar

import torch
from torch import Tensor

from . import register
from .format import Format, QuantizedTensor, anywhere, refusal
from .modes import normal


@register("none")
class Unquantized(Format):
    name = "none"
    bits = 16
    source = "IEEE 754 binary16; bfloat16"
    fixed: ClassVar = {"block": 64, "dq": False}

    @anywhere
    def quantize(self, w: Tensor, name: str = "tensor") -> QuantizedTensor:
        codes = w.detach().to(_kept_as(w.dtype))
        if not codes.isfinite().all():
            raise refusal(w, name, codes.dtype)
        codes = codes.clone() if codes.is_inference() else codes  # autograd cannot save an inference tensor
        return QuantizedTensor(self.name, self.bits, self.block, w.shape, w.dtype, codes.contiguous(), levels=None)

    @normal
    def empty(self, shape: torch.Size, dtype: torch.dtype, device: torch.device | str = "meta") -> QuantizedTensor:
        codes = torch.empty(shape, dtype=_kept_as(dtype), device=device)
        return QuantizedTensor(self.name, self.bits, self.block, shape, dtype, codes, levels=None)


def _kept_as(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
