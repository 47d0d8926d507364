"""LoRA on packed layers: what PEFT puts there, whoever calls it."""

from functools import wraps
from typing import Any

import peft
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraConfig, LoraModel
from torch import Tensor, nn

from .counting import not_counted
from .functions import add_low_rank, autocasting
from .layers import QuantLinear, packed_layers


class LoraQuantLinear(LoraLinear):
    """LoRA on a QuantLinear: PEFT's own layer, but one plain adapter, the usual case, is a single step of autograd, which
    keeps x in its own dtype. Under autocast PEFT's own steps round as its users know it, to the last bit."""

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether W is transposed: it is not, though it was in the `Conv1D` for which a user may have said that it is."""
        return False

    @fan_in_fan_out.setter
    def fan_in_fan_out(self, said: bool) -> None:
        pass

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        special = self.disable_adapters or self.lora_variant or self.merged or args or kwargs
        plain = not special and not autocasting(x)
        if not plain or len(active) != 1 or self.lora_B[active[0]].bias is not None:
            return super().forward(x, *args, **kwargs)
        name = active[0]
        a: Any = self.lora_A[name].weight
        b: Any = self.lora_B[name].weight
        return add_low_rank(self.base_layer(x), self.lora_dropout[name](x), a, b, self.scaling[name])


_create_new_module = LoraModel._create_new_module


def _knowing(lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module | None:
    # PEFT knows further layers from a config alone, so each is told as it is used
    lora_config._register_custom_module({QuantLinear: LoraQuantLinear})
    return _create_new_module(lora_config, adapter_name, target, **kwargs)


LoraModel._create_new_module = staticmethod(_knowing)  # type: ignore[method-assign]  # it has no other door


_prepare = peft.prepare_model_for_kbit_training


@wraps(_prepare)
def _prepared(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    # It makes all 16-bit weights fp32, and adapters begin in the dtype of the weight that they are on.
    model = _prepare(model, *args, **kwargs)
    for layer in packed_layers(model).values():
        layer.dtype = torch.promote_types(layer.dtype, torch.float32)
    return model


for _module in (peft, peft.utils, peft.utils.other):
    vars(_module)["prepare_model_for_kbit_training"] = _prepared


_count_parameters = PeftModel.get_nb_trainable_parameters


def _count_weights(model: PeftModel) -> tuple[int, int]:
    """Parameters that are trained, and all: of a packed layer the weights that it stands for, not its bytes."""
    trained, total = _count_parameters(model)
    return trained, total + not_counted(model)


# which print_trainable_parameters asks
PeftModel.get_nb_trainable_parameters = _count_weights  # type: ignore[method-assign, assignment]
