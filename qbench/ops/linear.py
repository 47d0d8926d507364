"""The product with a quantized weight: `qbench::linear` (y = x·Wᵀ) and its gradient `qbench::linear_dx` (dx = g·W).

W is decoded for each use, in the dtype of x, and then freed. Autograd saves only the packed weight, so the backward of a
frozen layer needs no copy of it. The implementations here work on every device and define the ops: decode, then PyTorch's
own product. Each op is the gradient of the other, so derivatives of any order are right.

Under autocast both act as `torch.nn.Linear` does: x is cast to autocast's dtype, which is also that of the result. Scales
and levels are never cast.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from formats.blockwise import library
from formats.packing import packed_bytes

_WEIGHT = (
    "Tensor codes, Tensor levels, Tensor[] scale, Tensor[] shift, int bits, int block, SymInt out_features,"
    " SymInt in_features"
)
library.define(f"linear(Tensor x, {_WEIGHT}) -> Tensor")
library.define(f"linear_dx(Tensor g, {_WEIGHT}) -> Tensor")


def checked(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a device's `linear` or `linear_dx` so that it checks its arguments first.

    It then raises ValueError for sizes or devices that do not match, and TypeError for an x that is not floating-point.
    """

    @wraps(product)
    def call(
        x: Tensor, codes: Tensor, levels: Tensor, scale: Sequence[Tensor], shift: Sequence[Tensor], bits: int,
        block: int, out_features: int, in_features: int,
    ) -> Tensor:  # fmt: skip
        name, features = product.__name__, out_features if product.__name__ == "linear_dx" else in_features
        if x.dim() == 0 or x.shape[-1] != features:
            raise ValueError(f"{name}: {list(x.shape)} ends in another size than the {features} features of the weight")
        if not x.is_floating_point():
            raise TypeError(f"{name}: {x.dtype} is not accepted; a floating-point tensor is")
        if codes.dtype != torch.uint8:
            raise TypeError(f"{name}: codes are uint8, not {codes.dtype}")
        if codes.numel() != packed_bytes(out_features * in_features, bits):
            raise ValueError(
                f"{name}: {codes.numel()} bytes do not hold {out_features} × {in_features} codes of {bits} bits"
            )
        _same_device(name, x, codes, levels, *scale, *shift)
        return product(x, codes, levels, scale, shift, bits, block, out_features, in_features)

    return call


def _same_device(name: str, x: Tensor, *weight: Tensor) -> None:
    for tensor in weight:
        if tensor.device != x.device:
            raise ValueError(f"{name}: a tensor on {x.device} meets a weight on {tensor.device}")


def _decode_weight(
    x: Tensor, codes: Tensor, levels: Tensor, scale: Sequence[Tensor], shift: Sequence[Tensor], bits: int, block: int,
    out_features: int, in_features: int,
) -> Tensor:  # fmt: skip
    shape = [out_features, in_features]
    return torch.ops.qbench.dequantize(codes, levels, scale, shift, bits, block, shape, x.dtype)


def linear(x: Tensor, *weight: Any) -> Tensor:
    """y = x·Wᵀ, for x [..., in_features] of any float dtype and W [out_features, in_features]."""
    return torch.nn.functional.linear(x, _decode_weight(x, *weight))


def linear_dx(g: Tensor, *weight: Any) -> Tensor:
    """dx = g·W, the gradient of `linear` for x, from g [..., out_features]."""
    return g @ _decode_weight(g, *weight)


library.impl("linear", checked(linear), "CompositeExplicitAutograd")
library.impl("linear_dx", checked(linear_dx), "CompositeExplicitAutograd")


@torch.library.register_fake("qbench::linear", lib=library)
def _(
    x: Tensor, codes: Tensor, levels: Tensor, scale: Sequence[Tensor], shift: Sequence[Tensor], bits: int, block: int,
    out_features: int, in_features: int,
) -> Tensor:  # fmt: skip
    _same_device("linear", x, codes, levels, *scale, *shift)  # with some tensors on meta, only this runs
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("qbench::linear_dx", lib=library)
def _(
    g: Tensor, codes: Tensor, levels: Tensor, scale: Sequence[Tensor], shift: Sequence[Tensor], bits: int, block: int,
    out_features: int, in_features: int,
) -> Tensor:  # fmt: skip
    _same_device("linear_dx", g, codes, levels, *scale, *shift)
    return g.new_empty(*g.shape[:-1], in_features)


def _save_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, levels, scale, shift, ctx.bits, ctx.block, ctx.out_features, ctx.in_features = inputs
    if any(tensor.requires_grad for tensor in (levels, *scale, *shift)):
        raise TypeError("a packed weight cannot be trained: its levels and scales take no gradient; x takes one")
    ctx.scales = len(scale)
    ctx.save_for_backward(codes, levels, *scale, *shift)


def _gradient(op: str) -> Callable[..., tuple[Any, ...]]:
    """The backward of one product, which calls the other, `op`."""

    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        codes, levels, *rest = ctx.saved_tensors
        scale, shift = rest[: ctx.scales], rest[ctx.scales :]
        product = getattr(torch.ops.qbench, op)
        dx = product(g, codes, levels, scale, shift, ctx.bits, ctx.block, ctx.out_features, ctx.in_features)
        return dx, None, None, [None] * len(scale), [None] * len(shift), None, None, None, None

    return backward


torch.library.register_autograd("qbench::linear", _gradient("linear_dx"), setup_context=_save_weight, lib=library)
torch.library.register_autograd("qbench::linear_dx", _gradient("linear"), setup_context=_save_weight, lib=library)


def _autocast(op: str, device: str) -> Callable[..., Tensor]:
    """The product `op` under autocast on a kind of device."""
    key = getattr(torch._C.DispatchKey, f"Autocast{device.upper()}")

    def product(x: Tensor, *weight: Any) -> Tensor:
        cast = x.is_floating_point() and x.dtype != torch.float64 and x.device.type == device  # as PyTorch's own ops do
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
            return getattr(torch.ops.qbench, op)(x.to(torch.get_autocast_dtype(device)) if cast else x, *weight)

    return product


for _op in ("linear", "linear_dx"):
    library.impl(_op, _autocast(_op, "cpu"), "AutocastCPU")
    library.impl(_op, _autocast(_op, "cuda"), "AutocastCUDA")
