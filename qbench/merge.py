"""What becomes of trained adapters: kept apart, quantized themselves, or merged into the weights.

Merged into 16 bits nothing is lost but the rounding, and nothing is saved; merged and quantized again, the adapters' work
passes through the format once more.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from transformers import PreTrainedModel

from formats import Format

from . import models
from .layers import QuantLinear, replace, to_conv1d, unpack


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


def merged(model: PeftModel) -> PreTrainedModel:
    """The model without its adapters, their product added to the weights, in the dtype that these had before they were
    quantized; it can be saved as any other. `model` is used up."""
    inner = model.get_base_model()
    packed = {name: layer.conv1d for name, layer in inner.named_modules() if isinstance(layer, QuantLinear)}
    for name in packed:
        unpack(inner, name)
    whole = model.merge_and_unload()
    for name in (name.removesuffix(".base_layer") for name, conv1d in packed.items() if conv1d):
        to_conv1d(whole, name)
    if quantizer := getattr(whole, "hf_quantizer", None):
        quantizer.remove_quantization_config(whole)
    return whole


def requantized(model: PreTrainedModel, names: list[str], fmt: Format) -> PreTrainedModel:
    """The merged model with the named layers in the format, in place."""
    replace(model, models.quantize({name: model.get_submodule(name) for name in names}, fmt))
    return model
