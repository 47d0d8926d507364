"""The weights of layers in a format, and the bytes that a model holds."""

from collections.abc import Callable, Mapping

from torch import nn

from formats import Format, QuantizedTensor
from qbench.errors import InputError

from .selection import weight_of


def quantize(
    layers: Mapping[str, nn.Module], fmt: Format, advance: Callable[[int], None] = lambda n: None
) -> dict[str, QuantizedTensor]:
    """The weight of each layer in the format; `advance` is told the number of weights done. Raises InputError."""
    packed = {}
    for name, layer in layers.items():
        try:
            packed[name] = fmt.quantize(weight_of(layer), name=f"{name}.weight")
        except ValueError as error:
            raise InputError(str(error)) from error
        advance(packed[name].numel)
    return packed


def held_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())
