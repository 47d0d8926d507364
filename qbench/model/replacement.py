"""Putting packed layers into a model in the place of linear ones, and linear ones back."""

import copy
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from formats import QuantizedTensor

from .quant_linear import QuantLinear
from .selection import packed_layers


def replace(model: nn.Module, packed: dict[str, QuantizedTensor]) -> None:
    """Put a QuantLinear in the place of each named layer, keeping its bias; the 16-bit weight is let go.

    `checkpoint.save` writes such a model; its own `save_pretrained` does where it was loaded packed.
    """
    for name, weight in packed.items():
        layer = model.get_submodule(name)
        conv1d = layer.conv1d if isinstance(layer, QuantLinear) else isinstance(layer, Conv1D)
        model.set_submodule(name, QuantLinear(weight, layer._parameters["bias"], conv1d))


def hold_still(model: nn.Module) -> None:
    """Have a model leave its weights as they are, as those that are packed take up no change: RWKV halves some in place
    once it is not trained, against overflow in fp16; Gemma 3n clips some while it is."""
    rescaling: list[Any] = [module for module in model.modules() if hasattr(module, "layers_are_rescaled")]
    for module in rescaling:
        trained = module.training
        module.train()
        module._rescale_layers()  # undoes it
        module.config.rescale_every = 0
        module.train(trained)
    clipping: list[Any] = [module for module in model.modules() if hasattr(module, "prediction_coefs")]
    for module in clipping:
        module.config = copy.copy(module.config)  # that of the model is saved, and takes no None
        vars(module.config)["altup_coef_clip"] = None


def unpack(model: nn.Module, name: str, dtype: torch.dtype | None = None) -> None:
    """Put a Linear with the dequantized weight in the place of the QuantLinear `name`."""
    layer = model.get_submodule(name)
    assert isinstance(layer, QuantLinear)
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(layer.packed.dequantize(dtype), requires_grad=False)
    plain.bias = layer.bias
    model.set_submodule(name, plain)


def to_conv1d(model: nn.Module, name: str) -> None:
    """Put transformers' `Conv1D` in the place of the Linear `name`."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    with torch.device("meta"):
        conv = Conv1D(layer.out_features, layer.in_features)
    conv.weight = nn.Parameter(layer.weight.t().contiguous(), layer.weight.requires_grad)
    conv.bias = layer.bias
    model.set_submodule(name, conv)


def unpack_all(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put in the place of each QuantLinear what stood there before it, with the dequantized weight."""
    for name, layer in packed_layers(model).items():
        unpack(model, name, dtype)
        if layer.conv1d:
            to_conv1d(model, name)
