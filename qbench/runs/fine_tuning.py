"""The steps of a run that fine-tune the quantized model: add adapters, train them, quantize or merge them."""

import shutil
from dataclasses import asdict

from peft import PeftModel
from transformers import PreTrainedModel

import formats
from qbench import checkpoint
from qbench.checkpoint import location
from qbench.measure import quality, throughput
from qbench.measure.statistics import nll_difference
from qbench.model import quantizing
from qbench.model.replacement import replace_layers
from qbench.report.run import card
from qbench.settings import FULL, TuneSettings
from qbench.training import adapters, merging
from qbench.training.loop import train

from .baseline import Baseline
from .context import ADAPTER, BASE, RunContext
from .inputs import Inputs
from .quantization import Quantized
from .trackers import Tracks


def add_adapters(
    context: RunContext,
    inputs: Inputs,
    model: PreTrainedModel,
    quantized: Quantized,
    reference: Baseline,
    tune: TuneSettings,
) -> PreTrainedModel | PeftModel:
    """Put adapters on the quantized layers. Empties `quantized.starts`, to free its memory before training.

    If LoRA does not start from zero, the model before the first step is scored too.
    """
    shutil.rmtree(context.folder / ADAPTER, ignore_errors=True)  # of an earlier run
    if not context.result["run"]["model"]["commit"]:  # a folder: its absolute path
        model.name_or_path = str(location.locate(context.settings.model.path).resolve())
    starts = quantized.starts
    if starts:
        _save_base(context, inputs, model, quantized)
    targets = [name for name in quantized.layers if name not in inputs.without_adapter]
    adapted = adapters.add(model, targets, tune, context.settings.seed, starts)
    if starts:
        starts.clear()
        with context.phases("eval_initial", "score the initial model", len(inputs.held_out)) as advance:
            scores = quality.evaluate(adapted, inputs.held_out, reference.logits, advance=advance)
        context.metrics["quality"]["initial"] = scores.metrics(reference.scores)
    return adapted


def _save_base(context: RunContext, inputs: Inputs, model: PreTrainedModel, quantized: Quantized) -> None:
    """Give `model` the weights Q = q(W − B·A) that belong to LoRA's initial A and B, and save it as their base."""
    replace_layers(model, {name: start.packed for name, start in quantized.starts.items()})
    base = context.folder / ADAPTER / BASE
    with context.phases("save_base", "save the base of the adapters"):
        checkpoint.save(model, base, inputs.tokenizer, context.settings.format.arguments)
    model.name_or_path = str(base.resolve())  # PEFT writes it into the adapters as their base


def train_adapters(
    context: RunContext, inputs: Inputs, model: PreTrainedModel | PeftModel, tune: TuneSettings, tracks: Tracks
) -> None:
    """Train the adapters, or with `tune.method=full` the whole model, and save the result in the run's folder."""
    assert inputs.training is not None
    with context.phases("tune", f"fine-tune {tune.method}", tune.steps) as advance:

        def report_step(step: int, loss: float, rate: float) -> None:
            advance(1, f"loss {loss:.3f}, {rate:,.0f} tokens/s")
            tracks.step(step, loss=loss, tokens_s=rate)

        log = train(model, inputs.training, tune, context.settings.seed, report_step)
    if tune.method == FULL:
        model.to(context.dtype).requires_grad_(False)  # type: ignore[arg-type]  # its stub is wrong
    context.metrics["tune"] = {**asdict(log), "left": inputs.without_adapter}
    context.metrics["throughput"]["tune_tokens_s"] = throughput.summarize(log.tokens_s)
    model.save_pretrained(str(context.folder / ADAPTER))


def write_card(context: RunContext) -> None:
    """Write a README beside the saved adapters: what they are for, what was measured, how to load them."""
    fmt = context.settings.format
    arguments = fmt.arguments or {"name": fmt.name, "block": fmt.block, "dq": fmt.dq}
    card.write(context.folder / ADAPTER, context.result, arguments)


def measure_merged(
    context: RunContext,
    inputs: Inputs,
    model: PreTrainedModel | PeftModel,
    quantized: Quantized,
    reference: Baseline,
    tuned: quality.Scores,
    tune: TuneSettings,
) -> None:
    """Measure the model with quantized adapters (`tune.adapter_format`) and with merged ones (`tune.merge`).

    reference, tuned: the scores to compare with, of the baseline and of the model with its adapters as trained.
    Merging changes `model` in place.
    """

    def measure(name: str, model: PreTrainedModel | PeftModel, held: int) -> dict:
        """Score a merged model that takes `held` bytes."""
        with context.phases(f"eval_merged_{name}", f"score merged: {name}", len(inputs.held_out)) as advance:
            scores = quality.evaluate(model, inputs.held_out, reference.logits, advance=advance)
        return {
            **scores.metrics(reference.scores),
            "against_unmerged": nll_difference(scores.nll, tuned.nll),
            "bits": {"model": 8 * held / quantized.parameters},
            "bytes": held,
        }

    measured = {}
    if tune.adapter_format:
        assert isinstance(model, PeftModel)
        fmt = formats.get(tune.adapter_format, block=tune.adapter_block)
        with merging.quantized_adapters(model, fmt) as adapter_bytes:
            trained = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
            measured["adapters"] = measure("adapters", model, quantizing.model_bytes(model) - trained + adapter_bytes)
    if tune.merge:
        assert isinstance(model, PeftModel)
        merged = merging.merged(model)
        measured["16bit"] = measure("16bit", merged, quantizing.model_bytes(merged))
        merged = merging.requantized(merged, quantized.layers, context.settings.format)
        measured["requantized"] = measure("requantized", merged, quantizing.model_bytes(merged))
    if measured:
        context.metrics["merged"] = measured
