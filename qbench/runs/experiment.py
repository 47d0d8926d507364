"""One experiment: load, measure, quantize, measure, fine-tune, measure, record."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

import formats
from formats import QuantizedTensor
from qbench import checkpoint
from qbench.checkpoint import loading, location
from qbench.checkpoint.empty_model import layers_of
from qbench.measure import distribution, error, quality, task_files, throughput
from qbench.measure.statistics import nll_difference
from qbench.model import devices, quantizing
from qbench.model.replacement import replace
from qbench.model.selection import coverage, linear_layers, weight_of
from qbench.report import wording
from qbench.report.run import card, page
from qbench.results import provenance, store
from qbench.settings import FULL, Settings, TuneSettings
from qbench.system import files, messages
from qbench.training import adapters, data, lora_init, merging
from qbench.training.loop import train

from . import baseline
from . import trackers as tracking
from .progress import Phases
from .task_stages import TaskStages

ADAPTER, BASE = "adapter", "base"  #: folders: of a run's adapters, and in it of what these belong to
ERROR_WINDOWS = 4  # windows of held-out text whose activations weigh the error of the outputs


def run(settings: Settings, folder: Path, baselines: Path | None = None, trackers: Sequence[str] = ()) -> dict:
    """Run one experiment; result.json, report.md, its figures and the adapters are left in `folder`.

    baselines: a folder in which runs leave the measurements of the 16-bit model for each other. trackers: of
    `track.NAMES`, which are told of the run as well.

    Returns the result; where the folder holds it finished already, from the same configuration, code, weights and text,
    that one. Whatever goes wrong, result.json tells: an exception leaves its status, its traceback and what had been
    measured there, and is raised again. But a finished result stays until something new has been measured; and outside a
    sweep, where there are no `baselines`, what is refused or interrupted before that leaves nothing. Raises Busy where
    another process runs in the folder.
    """
    result, row = store.blank(settings.plain()), baselines is not None
    ours = not (row or folder.exists())
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with messages.aside(folder), files.locked(folder), store.kept(folder, result, row):
            files.clear_partial(folder)
            experiment = Experiment(settings, result, folder)
            if finished := store.finished(folder, result["run"]["id"]):
                return finished
            with tracking.tracks(trackers, folder, result["config"]) as experiment.tracks:
                _carry_out(experiment, baselines)
            result["status"] = "done"
            store.write(folder, result)
    except BaseException:
        if ours:
            store.discard(folder)
        raise
    return result


def _carry_out(experiment: "Experiment", baselines: Path | None) -> None:
    """All of a run, from its model to its report."""
    tune, result, folder = experiment.settings.tune, experiment.result, experiment.folder
    experiment.load()
    experiment.measure_baseline(baselines)
    experiment.quantize()
    experiment.measure("quantized")
    if tune:
        experiment.add_adapters(tune)
        experiment.tune(tune)
        experiment.measure("tuned")
        experiment.merge(tune)
    store.write(folder, result)
    with experiment.phases("report", "write the report"):
        page.write(folder, store.read(folder))
    experiment.tracks.result(result["metrics"], tune.steps if tune else 0)


class Experiment:
    """The steps of a run, and what they hand on: each writes what it found into `metrics`."""

    tracks: tracking.Tracks
    model: PreTrainedModel | PeftModel
    training: list[Tensor] | Tensor

    def __init__(self, settings: Settings, result: dict, folder: Path):
        self.settings, self.folder = settings, folder
        self.device = devices.pick_device(settings.device)
        self.dtype = devices.pick_dtype(settings.model.dtype, self.device)
        self.phases = Phases(self.device)
        self.result, self.metrics = result, result["metrics"]
        self.metrics |= {"memory": {"peak_bytes": self.phases.peak_bytes}, "throughput": {}, "quality": {}}
        result["run"]["seconds"] = self.phases.seconds
        self.found = {"device": self.device.type, "dtype": str(self.dtype).removeprefix("torch.")}
        result["config"] = settings.plain(**self.found)
        with self.phases("identify", "read text and model"):
            result["environment"] = provenance.environment(self.device)
            self.text = data.read(settings.data.path)
            self.metrics["data"] = self.text.metrics()
            self._open(settings)
            weights = loading.digest(settings.model.path, settings.model.revision)
            self.digests = {"weights": weights, "text": self.text.digest}
            if settings.eval.tasks:
                self.digests["tasks"] = task_files.digest(settings.eval.tasks)
            code = [provenance.format_digest(fmt) for fmt in settings.formats]
            result["run"]["id"] = provenance.run_id(result["config"], **self.digests, formats=code)
        result["config"] = settings.plain(**self.found, seq=self.seq)

    def _open(self, settings: Settings) -> None:
        """All that can be told before a weight is read: whether model, text, tokenizer and settings fit each other."""
        chosen, text = settings.model, self.text
        self.source = loading.open(chosen.path, chosen.revision, chosen.trust_remote_code)
        model, self.tokenizer = self.source.model, self.source.tokenizer
        self.result["run"]["model"] = {"commit": self.source.commit, "wrappers": self.source.wrappers}
        layers_of(model, f"model.path: {chosen.path!r}")
        self.coverage = coverage(model)
        self.seq = data.pick_seq(settings.data.seq, model)
        told = self.tokenizer, model.config.get_text_config().vocab_size, self.seq
        self.held_out = data.held_out(text, *told, settings.eval.tokens)
        if settings.tune:
            self.spared = adapters.check(model, settings.tune, self.seq)
            wanted = settings.tune.steps * settings.tune.batch
            if settings.tune.group_by_length:
                self.training = data.examples(text.documents(), *told, wanted, settings.seed)
            else:
                self.training = data.windows(text.train, *told, wanted, settings.seed)
            self.metrics["data"]["examples"] = len(self.training)

    def load(self) -> None:
        settings = self.settings
        given = settings.eval, self.folder, self.phases, self.tokenizer
        self.tasks = TaskStages(*given) if settings.eval.tasks else None
        set_seed(settings.seed)
        with self.phases("load", "load the model"):
            self.model = loading.loaded(self.source, self.dtype, self.device).model
            del self.source
            quality.check_logits(self.model, self.held_out[:1, :2])
            self.layers = linear_layers(self.model)
        self.parameters = sum(p.numel() for p in self.model.parameters())

    def measure_baseline(self, store: Path | None) -> None:
        """What the 16-bit model is, measured here or taken from the run that was first to need it."""

        def measure(logits: quality.BaselineLogits, folder: Path) -> tuple[quality.Scores, dict]:
            scores, rates = self._measured("baseline", "eval_baseline", logits)
            if self.tasks:
                self.tasks.score("baseline", self.model, self.tokenizer, folder)
            peaks = {name: peak for name, peak in self.phases.peak_bytes.items() if name.endswith("_baseline")}
            return scores, {"throughput": rates, "peak_bytes": peaks}

        config, environment = self.result["config"], self.result["environment"]
        shared = {key: config[key] for key in ("device", "model", "data", "eval")}
        machine = {key: environment[key] for key in ("device", "threads", "versions")}
        key = provenance.run_id(shared | machine, **self.digests)
        self.baseline = baseline.obtain(key, store, self.folder, measure)
        self.result["run"]["baseline"] = {"id": key, "reused": self.baseline.reused}
        self.metrics["memory"]["baseline_bytes"] = quantizing.held_bytes(self.model)
        self.metrics["quality"]["baseline"] = self.baseline.scores.metrics()
        self.metrics["throughput"]["baseline"] = self.baseline.found["throughput"]
        self.phases.peak_bytes |= self.baseline.found["peak_bytes"]
        if self.tasks:
            self.tasks.take_baseline(self.baseline.folder)
            self.metrics["tasks"] = {"baseline": self.tasks.metrics("baseline")}

    def measure(self, name: str) -> None:
        """Quality, memory and generation speed of the model as it is now: `quantized` or `tuned`."""
        phase, held = {"quantized": ("eval", "model_bytes"), "tuned": ("eval_tuned", "tuned_bytes")}[name]
        self.metrics["memory"][held] = quantizing.held_bytes(self.model)
        scores, rates = self._measured(name, phase, self.baseline.logits)
        self.metrics["quality"][name] = scores.metrics(self.baseline.scores)
        if name == "tuned":
            self.tuned = scores
            fmt = self.settings.format
            arguments = fmt.arguments or {"name": fmt.name, "block": fmt.block, "dq": fmt.dq}
            card.write(self.folder / ADAPTER, self.result, arguments)
        self.metrics["throughput"] |= rates if name == "quantized" else {name: rates}
        if self.tasks:
            self.tasks.score(name, self.model, self.tokenizer)
            self.metrics["tasks"][name] = self.tasks.metrics(name)

    def _measured(self, name: str, phase: str, logits: quality.BaselineLogits) -> tuple[quality.Scores, dict]:
        with self.phases(phase, f"score the {name} model", len(self.held_out)) as advance:
            scores = quality.evaluate(self.model, self.held_out, logits, name == "baseline", advance)
        with self.phases(f"time_{name}", f"time the {name} model"):
            return scores, throughput.generation_rates(self.model, self.held_out[0])

    def quantize(self) -> None:
        settings, metrics, layers = self.settings, self.metrics, self.layers
        weights = sum(weight_of(layer).numel() for layer in layers.values())
        before = sum(weight_of(layer).nbytes for layer in layers.values())
        with self.phases("quantize", f"quantize to {wording.title(self.result['config'])}", weights) as advance:
            packed = quantizing.quantize(layers, settings.format, advance)
        with self.phases("error", "measure the error", len(layers)) as advance:
            windows = self.held_out[:ERROR_WINDOWS]
            metrics["error"] = error.layer_errors(self.model, layers, packed, windows, advance)
            metrics["weights"] = distribution.normalized_weights(layers, packed)
        with self.phases("time_format", "time the format"):
            metrics["throughput"] |= throughput.weights_rates(layers, packed, settings.format, self.dtype)
        tune = settings.tune
        self.starts = self._start(tune, layers, packed) if tune and tune.init != "default" else None
        replace(self.model, packed)
        stored = sum(q.nbytes for q in packed.values())
        metrics["memory"]["weights_bytes"] = stored
        metrics["bits"] = {
            "per_parameter": 8 * stored / weights,
            "baseline": 8 * before / weights,
            "model": 8 * quantizing.held_bytes(self.model) / self.parameters,
            "compression": 16 * weights / (8 * stored),
            "quantized_parameters": weights,
            "parameters": self.parameters,
            "eligible_parameters": self.coverage.eligible,
            "left": self.coverage.left,
        }
        self.targets = list(packed)
        del self.layers

    def _start(
        self, settings: TuneSettings, layers: Mapping[str, nn.Module], packed: dict[str, QuantizedTensor]
    ) -> dict[str, lora_init.Start]:
        """Where LoRA starts on each layer, and the error that is left there."""
        layers = {name: layer for name, layer in layers.items() if name not in self.spared}
        found: dict[str, lora_init.Start] = {}
        rows: list[tuple[str, error.Sums, error.Sums]] = []
        with self.phases("init", f"initialise by {settings.init}", len(layers)) as advance:
            for name, layer in layers.items():
                w = weight_of(layer)
                found[name] = lora_init.find(
                    w, self.settings.format, settings.rank, settings.init, settings.init_rounds, f"{name}.weight"
                )
                before, after = (error.compare_weights(w, q.dequantize()) for q in (packed[name], found[name]))
                rows.append((name, before, after))
                advance()
        self.metrics["init"] = {
            "method": settings.init,
            "base": f"{ADAPTER}/{BASE}",
            "quantized": sum((before for _, before, _ in rows), error.Sums()).weights(),
            "initial": sum((after for *_, after in rows), error.Sums()).weights(),
            "layers": [{"name": name, "quantized": q.weights(), "initial": i.weights()} for name, q, i in rows],
        }
        return found

    def add_adapters(self, settings: TuneSettings) -> None:
        """The adapters, and where they do not start at nothing, what the model is before the first step."""
        assert isinstance(self.model, PreTrainedModel)
        shutil.rmtree(self.folder / ADAPTER, ignore_errors=True)  # of a run before
        if not self.result["run"]["model"]["commit"]:  # a folder, by whatever way it was named
            self.model.name_or_path = str(location.locate(self.settings.model.path).resolve())
        if self.starts:
            self._save_base({name: start.packed for name, start in self.starts.items()})
        targets = [name for name in self.targets if name not in self.spared]
        self.model = adapters.add(self.model, targets, settings, self.settings.seed, self.starts)
        if self.starts:
            del self.starts
            with self.phases("eval_initial", "score the initial model", len(self.held_out)) as advance:
                scores = quality.evaluate(self.model, self.held_out, self.baseline.logits, advance=advance)
            self.metrics["quality"]["initial"] = scores.metrics(self.baseline.scores)

    def _save_base(self, packed: dict[str, QuantizedTensor]) -> None:
        """Adapters that start from Q = q(W − B·A) belong to that Q, which nothing but this run has: it is kept."""
        assert isinstance(self.model, PreTrainedModel)
        replace(self.model, packed)
        base = self.folder / ADAPTER / BASE
        with self.phases("save_base", "save the base of the adapters"):
            checkpoint.save(self.model, base, self.tokenizer, self.settings.format.arguments)
        self.model.name_or_path = str(base.resolve())  # by which PEFT has adapters name their base

    def tune(self, settings: TuneSettings) -> None:
        with self.phases("tune", f"fine-tune {settings.method}", settings.steps) as advance:

            def told(step: int, loss: float, rate: float) -> None:
                advance(1, f"loss {loss:.3f}, {rate:,.0f} tokens/s")
                self.tracks.step(step, loss=loss, tokens_s=rate)

            log = train(self.model, self.training, settings, self.settings.seed, told)
        if settings.method == FULL:
            self.model.to(self.dtype).requires_grad_(False)  # type: ignore[arg-type]  # typed as no method
        self.metrics["tune"] = {**asdict(log), "left": self.spared}
        self.metrics["throughput"]["tune_tokens_s"] = throughput.summary(log.tokens_s)
        self.model.save_pretrained(str(self.folder / ADAPTER))

    def merge(self, settings: TuneSettings) -> None:
        """What the trained adapters cost when they are quantized, or merged."""
        found = {}
        if settings.adapter_format:
            assert isinstance(self.model, PeftModel)
            fmt = formats.get(settings.adapter_format, block=settings.adapter_block)
            with merging.quantized_adapters(self.model, fmt) as held:
                trained = sum(p.nbytes for n, p in self.model.named_parameters() if "lora_" in n)
                found["adapters"] = self._merged("adapters", quantizing.held_bytes(self.model) - trained + held)
        if settings.merge:
            assert isinstance(self.model, PeftModel)
            self.model = merging.merged(self.model)
            found["16bit"] = self._merged("16bit", quantizing.held_bytes(self.model))
            self.model = merging.requantized(self.model, self.targets, self.settings.format)
            found["requantized"] = self._merged("requantized", quantizing.held_bytes(self.model))
        if found:
            self.metrics["merged"] = found

    def _merged(self, name: str, held: int) -> dict:
        """Quality against the baseline, and against the adapters kept apart; bits a parameter of the whole model."""
        with self.phases(f"eval_merged_{name}", f"score merged: {name}", len(self.held_out)) as advance:
            scores = quality.evaluate(self.model, self.held_out, self.baseline.logits, advance=advance)
        return {
            **scores.metrics(self.baseline.scores),
            "against_unmerged": nll_difference(scores.nll, self.tuned.nll),
            "bits": {"model": 8 * held / self.parameters},
            "bytes": held,
        }
