"""The first steps of a run: open the model and the text, identify the run, load the weights."""

from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from qbench.checkpoint import loading
from qbench.checkpoint.empty_model import layers_to_quantize
from qbench.checkpoint.sixteen_bit import SixteenBitCheckpoint
from qbench.measure import quality, task_files
from qbench.model.devices import dtype_name
from qbench.model.selection import Coverage, count_coverage
from qbench.results import provenance
from qbench.training import adapters, data

from .context import RunContext


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run, opened and checked before any weight is read.

    source: the checkpoint; its weights are not loaded yet. coverage: which weights the format quantizes.
    held_out: int64 [windows, seq], the tokens that every model is scored on. training: the tokens of the fine-tune, a
    tensor [examples, seq] or a list of documents; None without a fine-tune.
    without_adapter: linear layers that get no adapter, by name, with the reason.
    digests: identify the weights, the text and the tasks.
    """

    source: SixteenBitCheckpoint
    tokenizer: PreTrainedTokenizerBase
    coverage: Coverage
    held_out: Tensor
    training: list[Tensor] | Tensor | None
    without_adapter: dict[str, str]
    digests: dict[str, str | None]


def open_inputs(context: RunContext) -> Inputs:
    """Open model and text, check that they fit each other and the settings, and identify the run.

    Writes the run's id, the resolved configuration and the environment into the result. Raises InputError.
    """
    settings, result = context.settings, context.result
    resolved = {"device": context.device.type, "dtype": dtype_name(context.dtype)}
    result["config"] = settings.plain(**resolved)
    with context.phases("identify", "read text and model"):
        result["environment"] = provenance.environment(context.device)
        text = data.read(settings.data.path)
        context.metrics["data"] = text.metrics()
        source = loading.open(settings.model.path, settings.model.revision, settings.model.trust_remote_code)
        tokenizer, vocabulary = source.tokenizer, source.model.config.get_text_config().vocab_size
        result["run"]["model"] = {"commit": source.commit, "wrappers": source.wrappers}
        layers_to_quantize(source.model, f"model.path: {settings.model.path!r}")
        covered = count_coverage(source.model)
        seq = data.pick_seq(settings.data.seq, source.model)
        held_out = data.held_out(text, tokenizer, vocabulary, seq, settings.eval.tokens)
        training: list[Tensor] | Tensor | None = None
        without_adapter: dict[str, str] = {}
        if tune := settings.tune:
            without_adapter = adapters.check(source.model, tune, seq)
            count = tune.steps * tune.batch
            if tune.group_by_length:
                training = data.examples(text.documents(), tokenizer, vocabulary, seq, count, settings.seed)
            else:
                training = data.windows(text.train, tokenizer, vocabulary, seq, count, settings.seed)
            context.metrics["data"]["examples"] = len(training)
        digests = _identify(context, text)
    result["config"] = settings.plain(**resolved, seq=seq)
    return Inputs(source, tokenizer, covered, held_out, training, without_adapter, digests)


def _identify(context: RunContext, text: data.Text) -> dict[str, str | None]:
    """Write the run's id into the result. Returns the digests of weights, text and tasks."""
    settings, result = context.settings, context.result
    weights = loading.digest(settings.model.path, settings.model.revision)
    digests = {"weights": weights, "text": text.digest}
    if settings.eval.tasks:
        digests["tasks"] = task_files.digest(settings.eval.tasks)
    code = [provenance.format_digest(fmt) for fmt in settings.formats]
    result["run"]["id"] = provenance.run_id(result["config"], **digests, formats=code)
    return digests


def load_model(context: RunContext, inputs: Inputs) -> PreTrainedModel:
    """Load the 16-bit model, in eval mode and frozen. Raises InputError if it gives no logits for plain tokens."""
    set_seed(context.settings.seed)
    with context.phases("load", "load the model"):
        model = loading.load_opened(inputs.source, context.dtype, context.device).model
        quality.check_logits(model, inputs.held_out[:1, :2])
    return model
