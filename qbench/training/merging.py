"""What becomes of trained adapters: kept apart, quantized themselves, or merged into the weights.

Merged into 16 bits nothing is lost but the rounding, and nothing is saved; merged and quantized again, the adapters' work
passes through the format once more.
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
from qbench.model.replacement import replace, to_conv1d, unpack


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
    quantized; it can be saved as any other. A head that is tied to the embeddings is tied no longer if one of them has
    adapters. `model` is used up."""
    inner = model.get_base_model()
    untied = _untie(model)
    packed = {name: layer.conv1d for name, layer in inner.named_modules() if isinstance(layer, QuantLinear)}
    for name in packed:
        unpack(inner, name)
    whole = model.merge_and_unload()
    for name in (name.removesuffix(".base_layer") for name, conv1d in packed.items() if conv1d):
        to_conv1d(whole, name)
    if untied:
        whole.config.tie_word_embeddings = whole.config.get_text_config().tie_word_embeddings = False
    if quantizer := getattr(whole, "hf_quantizer", None):
        quantizer.remove_quantization_config(whole)
    return whole


def _untie(model: PeftModel) -> bool:
    """Give each layer with adapters a weight of its own, as what is merged into it is not for those that share it.

    Returns whether there was one that was shared."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    layers = [BaseTunerLayer.get_base_layer(m) for m in model.modules() if isinstance(m, BaseTunerLayer)]
    shared = [layer for layer in layers if owners[id(layer._parameters.get("weight"))] > 1]
    for layer in shared:
        layer.weight = nn.Parameter(layer.get_parameter("weight").detach().clone(), requires_grad=False)
    return bool(shared)


def requantized(model: PreTrainedModel, names: list[str], fmt: Format) -> PreTrainedModel:
    """The merged model with the named layers in the format, in place."""
    replace(model, quantizing.quantize({name: model.get_submodule(name) for name in names}, fmt))
    return model
