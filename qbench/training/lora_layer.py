"""LoRA on packed layers: importing this module makes PEFT put `LoraQuantLinear` on every QuantLinear."""

from functools import wraps
from typing import Any

import peft
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraConfig, LoraModel
from torch import Tensor, nn

from qbench.model.parameter_count import count_hidden_weights
from qbench.model.quant_linear import QuantLinear
from qbench.model.selection import packed_layers


class LoraQuantLinear(LoraLinear):
    """LoRA on a QuantLinear: PEFT's layer, with one fast path.

    A single LoRA adapter without variants or bias, the usual case, is one autograd function that keeps x in its own dtype.
    Everything else runs PEFT's code; so does autocast, where results keep PEFT's rounding to the last bit.
    """

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether W is transposed: never here, even if the user set it for the `Conv1D` that this layer replaces."""
        return False

    @fan_in_fan_out.setter
    def fan_in_fan_out(self, value: bool) -> None:
        pass

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        special = self.disable_adapters or self.lora_variant or self.merged or args or kwargs or autocasting(x)
        if special or len(active) != 1 or self.lora_B[active[0]].bias is not None:
            return super().forward(x, *args, **kwargs)
        name = active[0]
        a: Any = self.lora_A[name].weight
        b: Any = self.lora_B[name].weight
        return add_low_rank(self.base_layer(x), self.lora_dropout[name](x), a, b, self.scaling[name])


_create_new_module = LoraModel._create_new_module


def _create_module_for_quant_linear(
    lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any
) -> nn.Module | None:
    # PEFT takes custom layers only from a config, so this is added to each config when it is used
    lora_config._register_custom_module({QuantLinear: LoraQuantLinear})
    return _create_new_module(lora_config, adapter_name, target, **kwargs)


LoraModel._create_new_module = staticmethod(_create_module_for_quant_linear)  # type: ignore[method-assign]  # PEFT offers no other hook


_prepare = peft.prepare_model_for_kbit_training


@wraps(_prepare)
def _prepare_packed(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    # PEFT makes all 16-bit weights fp32, and adapters take the dtype of their weight.
    model = _prepare(model, *args, **kwargs)
    for layer in packed_layers(model).values():
        layer.dtype = torch.promote_types(layer.dtype, torch.float32)
    return model


for _module in (peft, peft.utils, peft.utils.other):
    vars(_module)["prepare_model_for_kbit_training"] = _prepare_packed


_count_parameters = PeftModel.get_nb_trainable_parameters


def _count_weights(model: PeftModel) -> tuple[int, int]:
    """Counts of trainable and of all parameters; a packed layer counts its weights, not its bytes."""
    trained, total = _count_parameters(model)
    return trained, total + count_hidden_weights(model)


# print_trainable_parameters calls it
PeftModel.get_nb_trainable_parameters = _count_weights  # type: ignore[method-assign, assignment]


def add_low_rank(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """y + scale · (x·Aᵀ)·Bᵀ, computed in the dtype of A and B (or of autocast), and rounded once to the dtype of y.

    y: [..., out_features]. x: [..., in_features]. a: [rank, in_features]. b: [out_features, rank].
    """
    device = x.device.type
    if autocasting(x):
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):  # backward runs without autocast, in the same dtypes
            return add_low_rank(y, x, a.to(dtype), b.to(dtype), scale)
    # The function works on flat tensors, so that its result is no view: some models add to it in place.
    return _AddLowRank.apply(_flatten_rows(y), _flatten_rows(x), a, b, scale).view_as(y)


def autocasting(x: Tensor) -> bool:
    """Whether autocast is on for the device of x."""
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        inner = x.to(a.dtype) @ a.t() * scale
        ctx.save_for_backward(x, inner, a, b)
        ctx.scale = scale
        return torch.addmm(y.to(a.dtype), inner, b.t()).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, inner, a, b = ctx.saved_tensors
        _, for_x, for_a, for_b, _ = ctx.needs_input_grad
        if torch.is_grad_enabled():  # for second derivatives, for which the saved `inner` has no graph
            inner = x.to(a.dtype) @ a.t() * ctx.scale
        rows = g.to(a.dtype)
        g_inner = rows @ b * ctx.scale
        dx = (g_inner @ a).to(x.dtype) if for_x else None
        da = g_inner.t() @ x.to(a.dtype) if for_a else None
        return g, dx, da, rows.t() @ inner if for_b else None, None


def _flatten_rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
