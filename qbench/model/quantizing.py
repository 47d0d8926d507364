"""Quantizes the weights of layers, and counts the bytes of a model."""

from collections.abc import Callable, Mapping

from torch import nn

from formats import Format, QuantizedTensor
from qbench.errors import InputError

from .selection import weight_of


def quantize(
    layers: Mapping[str, nn.Module], fmt: Format, advance: Callable[[int], None] = lambda n: None
) -> dict[str, QuantizedTensor]:
    """Quantize the weight of each layer. Returns the quantized weights by layer name.

    advance: called with the number of weights after each layer, for a progress bar. Raises InputError naming the weight
    that the format refuses, such as one with NaN or Inf.
    """
    weights = {}
    for name, layer in layers.items():
        try:
            weights[name] = fmt.quantize(weight_of(layer), name=f"{name}.weight")
        except ValueError as error:
            raise InputError(str(error)) from error
        advance(weights[name].numel)
    return weights


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers of a model. A tensor that is shared counts once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())
