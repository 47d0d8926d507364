"""Puts packed layers into a model in place of linear ones, and linear layers back."""

import copy
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from formats import QuantizedTensor

from .quant_linear import QuantLinear
from .selection import packed_layers


def replace_layers(model: nn.Module, weights: dict[str, QuantizedTensor]) -> None:
    """Replace each named layer with a QuantLinear that holds the given weight. The bias stays; the 16-bit weight is freed.

    `checkpoint.save` writes such a model. The model's own `save_pretrained` does so only if it was loaded packed.
    """
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        conv1d = layer.conv1d if isinstance(layer, QuantLinear) else isinstance(layer, Conv1D)
        model.set_submodule(name, QuantLinear(weight, layer._parameters["bias"], conv1d))


def disable_weight_edits(model: nn.Module) -> None:
    """Stop a model from editing its own weights, which packed ones do not allow.

    RWKV halves some weights in place for inference, against overflow in fp16. Gemma 3n clips some in training.
    """
    rwkv: list[Any] = [module for module in model.modules() if hasattr(module, "layers_are_rescaled")]
    for module in rwkv:
        training = module.training
        module.train()
        module._rescale_layers()  # in training mode it undoes the halving
        module.config.rescale_every = 0
        module.train(training)
    gemma3n: list[Any] = [module for module in model.modules() if hasattr(module, "prediction_coefs")]
    for module in gemma3n:
        module.config = copy.copy(module.config)  # the model's own config is saved, and must not hold None
        vars(module.config)["altup_coef_clip"] = None


def unpack_layer(model: nn.Module, name: str, dtype: torch.dtype | None = None) -> None:
    """Replace the QuantLinear `name` with a Linear that holds the dequantized weight."""
    layer = model.get_submodule(name)
    assert isinstance(layer, QuantLinear)
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.packed.dequantize(dtype), requires_grad=False)
    linear.bias = layer.bias
    model.set_submodule(name, linear)


def convert_to_conv1d(model: nn.Module, name: str) -> None:
    """Replace the Linear `name` with transformers' `Conv1D`."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    with torch.device("meta"):
        conv = Conv1D(layer.out_features, layer.in_features)
    conv.weight = nn.Parameter(layer.weight.t().contiguous(), layer.weight.requires_grad)
    conv.bias = layer.bias
    model.set_submodule(name, conv)


def unpack_model(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace each QuantLinear with the Linear or `Conv1D` that stood there before, holding the dequantized weight."""
    for name, layer in packed_layers(model).items():
        unpack_layer(model, name, dtype)
        if layer.conv1d:
            convert_to_conv1d(model, name)
