"""Quantizes trained adapters, merges them into the weights, or merges and quantizes again.

Merging into 16 bits loses only the rounding, but saves no memory. Quantizing again saves memory, at the cost of a second
quantization error.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel

from formats import Format
from qbench.model import quantizing
from qbench.model.quant_linear import QuantLinear
from qbench.model.replacement import convert_to_conv1d, replace_layers, unpack_layer


@contextmanager
def quantized_adapters(model: PeftModel, fmt: Format) -> Iterator[int]:
    """Round every A and B of the model to the format, inside this context. Yields the bytes that they then take."""
    trained = {name: p for name, p in model.named_parameters() if "lora_" in name}
    originals = {name: p.data for name, p in trained.items()}
    packed = {name: fmt.quantize(p.data, name) for name, p in trained.items()}
    try:
        for name, p in trained.items():
            p.data = packed[name].dequantize(p.dtype)
        yield sum(q.nbytes for q in packed.values())
    finally:
        for name, p in trained.items():
            p.data = originals[name]


def merged(model: PeftModel) -> PreTrainedModel:
    """Merge the adapters into the weights, in the dtype that these had before they were quantized.

    The result is an ordinary model and can be saved as such; do not use `model` afterwards. A head that is tied to the
    embeddings is untied if one of the two has adapters.
    """
    inner = model.get_base_model()
    untied = _untie(model)
    packed = {name: layer.conv1d for name, layer in inner.named_modules() if isinstance(layer, QuantLinear)}
    for name in packed:
        unpack_layer(inner, name)
    merged_model = model.merge_and_unload()
    for name in (name.removesuffix(".base_layer") for name, conv1d in packed.items() if conv1d):
        convert_to_conv1d(merged_model, name)
    if untied:
        merged_model.config.tie_word_embeddings = merged_model.config.get_text_config().tie_word_embeddings = False
    if quantizer := getattr(merged_model, "hf_quantizer", None):
        quantizer.remove_quantization_config(merged_model)
    return merged_model


def _untie(model: PeftModel) -> bool:
    """Give each layer with adapters a weight of its own, so that merging does not change layers that share it.

    Returns whether a weight was shared.
    """
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    layers = [BaseTunerLayer.get_base_layer(m) for m in model.modules() if isinstance(m, BaseTunerLayer)]
    shared = [layer for layer in layers if owners[id(layer._parameters.get("weight"))] > 1]
    for layer in shared:
        layer.weight = nn.Parameter(layer.get_parameter("weight").detach().clone(), requires_grad=False)
    return bool(shared)


def requantized(model: PreTrainedModel, names: list[str], fmt: Format) -> PreTrainedModel:
    """Quantize the named layers of a merged model, in place."""
    replace_layers(model, quantizing.quantize({name: model.get_submodule(name) for name in names}, fmt))
    return model
