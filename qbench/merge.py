"""What becomes of trained adapters: kept apart, quantized themselves, or merged into the weights.

Merged into 16 bits nothing is lost but the rounding, and nothing is saved; merged and quantized again, the adapters' work
passes through the format once more.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from torch import nn

from formats import Format

from . import adapters, models
from .layers import QuantLinear, replace


@contextmanager
def quantized_adapters(model: PeftModel, fmt: Format) -> Iterator[int]:
    """The model with every A and B as the format has them, while inside; gives the bytes that they take."""
    trained = {name: p for name, p in model.named_parameters() if "lora_" in name}
    kept = {name: p.data for name, p in trained.items()}
    packed = {name: fmt.quantize(p.data, name) for name, p in trained.items()}
    try:
        for name, p in trained.items():
            p.data = packed[name].dequantize(p.dtype)
        yield sum(q.nbytes for q in packed.values())
    finally:
        for name, p in trained.items():
            p.data = kept[name]


def merged(model: PeftModel) -> nn.Module:
    """The model without its adapters, their product added to the weights, in the dtype that these had before they were
    quantized. `model` is used up."""
    inner = model.base_model.model
    for name in [n for n, layer in inner.named_modules() if isinstance(layer, QuantLinear)]:
        adapters.unpack(inner, name)
    return model.merge_and_unload()


def requantized(model: nn.Module, names: list[str], fmt: Format) -> nn.Module:
    """The merged model with the named layers in the format, in place."""
    replace(model, models.quantize({name: model.get_submodule(name) for name in names}, fmt))
    return model
