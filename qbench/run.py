"""One experiment: load, quantize, measure, fine-tune, measure, record."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import set_seed

from formats import Format

from . import data, models, record
from .errors import InputError
from .measure import distribution, error, quality, throughput
from .measure.memory import PeakMemory
from .progress import Phases
from .report import run_page
from .tune import TuneSettings, add_lora, train

ERROR_WINDOWS = 4  # windows of held-out text whose activations weigh the output error


@dataclass(frozen=True)
class ModelSettings:
    """path: a folder or a hub id, None the bundled model. dtype: auto, bfloat16, float16 or float32."""

    path: str | None = None
    dtype: str = "auto"
    revision: str | None = None


@dataclass(frozen=True)
class DataSettings:
    """path: a text file, or the name of a bundled text. seq: tokens a window."""

    path: str = "kjv"
    seq: int = 256

    def __post_init__(self):
        if isinstance(self.seq, bool) or not isinstance(self.seq, int) or self.seq < 2:
            raise InputError(f"data.seq: {self.seq!r} is not accepted; an integer of at least 2 is")


@dataclass(frozen=True)
class EvalSettings:
    """tokens: held-out tokens that are scored, rounded up to whole windows."""

    tokens: int = 16384

    def __post_init__(self):
        if isinstance(self.tokens, bool) or not isinstance(self.tokens, int) or self.tokens < 1:
            raise InputError(f"eval.tokens: {self.tokens!r} is not accepted; a positive integer is")


@dataclass(frozen=True)
class Settings:
    """All that a run depends on. tune: None to leave the fine-tuning out."""

    format: Format
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    tune: TuneSettings | None = field(default_factory=TuneSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    seed: int = 0
    device: str = "auto"

    def resolved(self, device: torch.device, dtype: torch.dtype) -> dict:
        """The configuration as it came out: nothing left on `auto`."""
        plain = {name: asdict(value) for name in ("model", "data", "eval") if (value := getattr(self, name))}
        plain["model"]["dtype"] = str(dtype).removeprefix("torch.")
        return {
            "format": {"name": self.format.name, "source": self.format.source},
            "block": self.format.block,
            "dq": self.format.dq,
            "seed": self.seed,
            "device": device.type,
            **plain,
            "tune": asdict(self.tune) if self.tune else {"method": "none"},
        }


def run(settings: Settings, folder: Path) -> dict:
    """Run one experiment and leave result.json, report.md, figures and adapters in `folder`; returns the result.

    Whatever happens, result.json tells: an exception leaves its status and traceback there and is raised again.
    """
    result = {
        "schema": record.SCHEMA,
        "status": "failed",
        "error": None,
        "run": {"id": None, "started": record.now(), "seconds": {}},
        "config": None,
        "environment": None,
        "metrics": {},
    }
    phases = Phases()
    result["run"]["seconds"] = phases.seconds
    try:
        _experiment(settings, folder, result, phases)
        result["status"] = "done"
    except BaseException as exception:
        result["status"] = "oom" if isinstance(exception, torch.OutOfMemoryError | MemoryError) else "failed"
        result["error"] = record.error(exception)
        raise
    finally:
        record.write(folder, result)
    with phases("report", "write the report"):
        run_page.write(folder, record.read(folder))
    return result


def _experiment(settings: Settings, folder: Path, result: dict, phases: Phases) -> None:
    fmt = settings.format
    set_seed(settings.seed)
    device = models.pick_device(settings.device)
    dtype = models.pick_dtype(settings.model.dtype, device)
    config = result["config"] = settings.resolved(device, dtype)
    result["environment"] = record.environment(device)
    peaks: dict[str, dict] = {}
    memory = {"peak_bytes": peaks}
    metrics = result["metrics"]

    with phases("load", "load model and text"), PeakMemory(device) as peak:
        loaded = models.load(settings.model.path, dtype, device, settings.model.revision)
        model, tokenizer = loaded.model, loaded.tokenizer
        layers = models.linear_layers(model)
        text = data.read(settings.data.path)
        seq = settings.data.seq
        held_out = data.windows(text.held_out, tokenizer, seq, -(settings.eval.tokens // -(seq - 1)), seed=0)
        if settings.tune:
            wanted = settings.tune.steps * settings.tune.batch
            training = data.windows(text.train, tokenizer, seq, wanted, seed=settings.seed)
    peaks["load"] = peak.bytes
    result["run"]["id"] = record.run_id(config, weights=loaded.digest, text=text.digest)
    parameters = sum(p.numel() for p in model.parameters())
    memory["baseline_bytes"] = models.held_bytes(model)

    baseline_logits = quality.BaselineLogits(folder / "baseline.logits")
    try:
        with phases("eval_baseline", "score the baseline", len(held_out)) as advance, PeakMemory(device) as peak:
            baseline = quality.evaluate(model, held_out, baseline_logits, is_baseline=True, advance=advance)
        peaks["eval_baseline"] = peak.bytes
        metrics["quality"] = {"baseline": baseline.metrics()}
        with phases("throughput_baseline", "time the baseline"):
            rates = {"baseline": throughput.generation_rates(model, held_out[0])}

        weights = sum(models.weight_of(layer).numel() for layer in layers.values())
        with phases("quantize", f"quantize to {fmt.title}", weights) as advance:
            packed = models.quantize(layers, fmt, advance)
        with phases("error", "measure the error", len(layers)) as advance:
            metrics["error"] = error.layer_errors(model, layers, packed, held_out[:ERROR_WINDOWS], advance)
        with phases("throughput_weights", "time the format"):
            rates.update(throughput.weights_rates(layers, packed, fmt, dtype))
        metrics["weights"] = distribution.normalized_weights(layers, packed)

        models.replace(model, packed)
        del layers
        stored = sum(q.nbytes for q in packed.values())
        memory |= {"weights_bytes": stored, "model_bytes": models.held_bytes(model)}
        metrics["memory"] = memory
        metrics["bits"] = {
            "per_parameter": 8 * stored / weights,
            "model": 8 * memory["model_bytes"] / parameters,
            "compression": 16 * weights / (8 * stored),
            "quantized_parameters": weights,
            "parameters": parameters,
        }
        targets = list(packed)
        del packed

        with (
            phases("eval_quantized", "score the quantized model", len(held_out)) as advance,
            PeakMemory(device) as peak,
        ):
            scores = quality.evaluate(model, held_out, baseline_logits, advance=advance)
        peaks["eval"] = peak.bytes
        metrics["quality"]["quantized"] = scores.metrics(baseline)
        with phases("throughput_quantized", "time the quantized model"):
            rates.update(throughput.generation_rates(model, held_out[0]))
        metrics["throughput"] = rates

        if settings.tune:
            with phases("tune", "fine-tune LoRA", settings.tune.steps) as advance, PeakMemory(device) as peak:
                model = add_lora(model, targets, settings.tune, settings.seed)
                log = train(
                    model,
                    training,
                    settings.tune,
                    settings.seed,
                    advance=lambda loss, rate: advance(1, f"loss {loss:.3f}, {rate:,.0f} tokens/s"),
                )
            peaks["tune"] = peak.bytes
            metrics["tune"] = asdict(log)
            rates["tune_tokens_s"] = throughput.summary(log.tokens_s)
            memory["tuned_bytes"] = models.held_bytes(model)
            model.save_pretrained(folder / "adapter")
            with phases("eval_tuned", "score the tuned model", len(held_out)) as advance, PeakMemory(device) as peak:
                scores = quality.evaluate(model, held_out, baseline_logits, advance=advance)
            peaks["eval_tuned"] = peak.bytes
            metrics["quality"]["tuned"] = scores.metrics(baseline)
            with phases("throughput_tuned", "time the tuned model"):
                rates["tuned"] = throughput.generation_rates(model, held_out[0])
    finally:
        baseline_logits.close()
