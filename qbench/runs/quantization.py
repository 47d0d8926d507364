"""The step of a run that quantizes the model, and measures the error, the speed and the size."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from formats import QuantizedTensor
from qbench.measure import distribution, error, throughput
from qbench.model import quantizing
from qbench.model.replacement import replace_layers
from qbench.model.selection import linear_layers, weight_of
from qbench.report import wording
from qbench.settings import TuneSettings
from qbench.training import lora_init

from .context import ADAPTER, BASE, RunContext
from .inputs import Inputs

ERROR_WINDOWS = 4  #: windows of held-out text whose activations give the error of a layer's output


@dataclass(frozen=True)
class Quantized:
    """What later steps need from the quantized model.

    layers: names of the quantized layers. parameters: of the whole model, before it was quantized.
    starts: LoRA's initial A and B of each layer; empty with `tune.init=default`, where LoRA starts from zero.
    """

    layers: list[str]
    parameters: int
    starts: dict[str, lora_init.LoraInit]


def quantize_model(context: RunContext, inputs: Inputs, model: PreTrainedModel) -> Quantized:
    """Quantize the linear layers of `model` in place, and measure the error, the speed and the size."""
    settings, metrics = context.settings, context.metrics
    layers = linear_layers(model)
    parameters = sum(p.numel() for p in model.parameters())
    weights = sum(weight_of(layer).numel() for layer in layers.values())
    bytes_before = sum(weight_of(layer).nbytes for layer in layers.values())
    with context.phases("quantize", f"quantize to {wording.recipe_name(context.result['config'])}", weights) as advance:
        packed = quantizing.quantize(layers, settings.format, advance)
    with context.phases("error", "measure the error", len(layers)) as advance:
        metrics["error"] = error.layer_errors(model, layers, packed, inputs.held_out[:ERROR_WINDOWS], advance)
        metrics["weights"] = distribution.normalized_weights(layers, packed)
    with context.phases("time_format", "time the format"):
        metrics["throughput"] |= throughput.quantize_rates(layers, packed, settings.format, context.dtype)
    starts: dict[str, lora_init.LoraInit] = {}
    if settings.tune and settings.tune.init != "default":
        trained = {name: layer for name, layer in layers.items() if name not in inputs.without_adapter}
        starts = _start_lora(context, settings.tune, trained, packed)
    replace_layers(model, packed)
    stored = sum(q.nbytes for q in packed.values())
    metrics["memory"]["weights_bytes"] = stored
    metrics["bits"] = {
        "per_parameter": 8 * stored / weights,
        "baseline": 8 * bytes_before / weights,
        "model": 8 * quantizing.model_bytes(model) / parameters,
        "compression": 16 * weights / (8 * stored),
        "quantized_parameters": weights,
        "parameters": parameters,
        "eligible_parameters": inputs.coverage.eligible,
        "left": inputs.coverage.left,
    }
    return Quantized(list(packed), parameters, starts)


def _start_lora(
    context: RunContext, tune: TuneSettings, layers: Mapping[str, nn.Module], packed: Mapping[str, QuantizedTensor]
) -> dict[str, lora_init.LoraInit]:
    """Compute LoRA's initial A and B of each layer. Measures the error with them, and that of `packed` alone."""
    starts: dict[str, lora_init.LoraInit] = {}
    quantized: dict[str, error.Sums] = {}
    initial: dict[str, error.Sums] = {}
    with context.phases("init", f"initialise by {tune.init}", len(layers)) as advance:
        for name, layer in layers.items():
            w = weight_of(layer)
            start = lora_init.initialize(
                w, context.settings.format, tune.rank, tune.init, tune.init_rounds, f"{name}.weight"
            )
            starts[name] = start
            quantized[name] = error.compare_weights(w, packed[name].dequantize())
            initial[name] = error.compare_weights(w, start.dequantize())
            advance()
    context.metrics["init"] = {
        "method": tune.init,
        "base": f"{ADAPTER}/{BASE}",
        "quantized": sum(quantized.values(), error.Sums()).weight_metrics(),
        "initial": sum(initial.values(), error.Sums()).weight_metrics(),
        "layers": [
            {"name": name, "quantized": quantized[name].weight_metrics(), "initial": initial[name].weight_metrics()}
            for name in starts
        ],
    }
    return starts
