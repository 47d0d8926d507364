"""The measuring steps of a run: quality, memory and speed of the 16-bit, the quantized and the fine-tuned model."""

from pathlib import Path

from torch import nn
from transformers import PreTrainedModel

from qbench.measure import quality, throughput
from qbench.model import quantizing
from qbench.results import provenance

from .baseline import Baseline, obtain
from .context import RunContext
from .inputs import Inputs
from .task_stages import TaskStages


def load_tasks(context: RunContext, inputs: Inputs) -> TaskStages | None:
    """Load the lm-eval tasks of `eval.tasks`, if there are any. Raises InputError."""
    return TaskStages(context, inputs.tokenizer) if context.settings.eval.tasks else None


def measure_baseline(
    context: RunContext, inputs: Inputs, model: PreTrainedModel, tasks: TaskStages | None, store: Path | None
) -> Baseline:
    """Measure the 16-bit model, or read what an earlier run measured from the folder `store`."""

    def measure(logits: quality.BaselineLogits, folder: Path) -> tuple[quality.Scores, dict]:
        scores, rates = _score_and_time(context, inputs, model, "baseline", "eval_baseline", logits)
        if tasks:
            tasks.score_baseline(model, folder)
        peaks = {name: peak for name, peak in context.phases.peak_bytes.items() if name.endswith("_baseline")}
        return scores, {"throughput": rates, "peak_bytes": peaks}

    result, metrics = context.result, context.metrics
    config = {key: result["config"][key] for key in ("device", "model", "data", "eval")}
    machine = {key: result["environment"][key] for key in ("device", "threads", "versions")}
    key = provenance.run_id(config | machine, **inputs.digests)
    measured = obtain(key, store, context.folder, measure)
    result["run"]["baseline"] = {"id": key, "reused": measured.reused}
    metrics["memory"]["baseline_bytes"] = quantizing.model_bytes(model)
    metrics["quality"]["baseline"] = measured.scores.metrics()
    metrics["throughput"]["baseline"] = measured.costs["throughput"]
    context.phases.peak_bytes |= measured.costs["peak_bytes"]
    if tasks:
        tasks.take_baseline(measured.folder)
    return measured


def measure_quantized(context: RunContext, inputs: Inputs, model: nn.Module, reference: Baseline) -> None:
    """Measure the quantized model before it is fine-tuned, against the baseline `reference`."""
    metrics = context.metrics
    metrics["memory"]["model_bytes"] = quantizing.model_bytes(model)
    scores, rates = _score_and_time(context, inputs, model, "quantized", "eval", reference.logits)
    metrics["quality"]["quantized"] = scores.metrics(reference.scores)
    metrics["throughput"] |= rates


def measure_tuned(context: RunContext, inputs: Inputs, model: nn.Module, reference: Baseline) -> quality.Scores:
    """Measure the fine-tuned model. Returns its scores: those of the merged models are compared with them."""
    metrics = context.metrics
    metrics["memory"]["tuned_bytes"] = quantizing.model_bytes(model)
    scores, rates = _score_and_time(context, inputs, model, "tuned", "eval_tuned", reference.logits)
    metrics["quality"]["tuned"] = scores.metrics(reference.scores)
    metrics["throughput"]["tuned"] = rates
    return scores


def _score_and_time(
    context: RunContext, inputs: Inputs, model: nn.Module, stage: str, phase: str, logits: quality.BaselineLogits
) -> tuple[quality.Scores, dict]:
    """Score the model on the held-out text, and time how fast it generates. The baseline writes its logits."""
    with context.phases(phase, f"score the {stage} model", len(inputs.held_out)) as advance:
        scores = quality.evaluate(model, inputs.held_out, logits, stage == "baseline", advance)
    with context.phases(f"time_{stage}", f"time the {stage} model"):
        return scores, throughput.generation_rates(model, inputs.held_out[0])
