"""Makes a model trainable: PEFT adapters on a quantized model, or all weights of a 16-bit one."""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn
from transformers import PreTrainedModel

from formats.contract import first_line
from qbench.errors import InputError
from qbench.model.quant_linear import QuantLinear
from qbench.model.replacement import unpack_model
from qbench.model.selection import linear_layers, weight_of
from qbench.settings import FULL, METHODS, PROMPTS, TuneSettings
from qbench.system.messages import OURS

from .lora_init import LoraInit

# methods that train low-rank matrices, with their options of LoraConfig
_LOW_RANK: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
_PROMPT_CONFIGS = {"prefix": PrefixTuningConfig, "p_tuning": PromptEncoderConfig}


def add(
    model: PreTrainedModel,
    targets: Iterable[str],
    settings: TuneSettings,
    seed: int,
    starts: dict[str, LoraInit] | None = None,
) -> PreTrainedModel | PeftModel:
    """Add fp32 adapters to the layers named in `targets`; with `tune.method=full` make all weights trainable.

    LoRA starts with B = 0, so the model's output does not change, or from `starts` (by layer), whose packed weights the
    model must already have. An all-zero start is skipped: with A = B = 0 no gradient flows.
    """
    torch.manual_seed(seed)
    if settings.method == FULL:
        return _unfreeze(model)
    refused = refused_layers(model, targets, settings)
    targets = [name for name in targets if name not in refused]
    with _ignore_peft_warnings():
        adapted = peft.get_peft_model(model, _peft_config(model, targets, settings))
    for p in adapted.parameters():
        if p.requires_grad:  # some PEFT methods leave them in 16 bits, where small steps are lost
            p.data = p.data.float()
    for name in (starts or {}).keys() & targets:
        start = (starts or {})[name]
        if not start.a.any():
            continue
        layer = adapted.get_base_model().get_submodule(name)
        assert isinstance(layer, LoraLayer)
        root = layer.scaling["default"] ** 0.5
        layer.get_parameter("lora_A.default.weight").data.copy_(start.a / root)
        layer.get_parameter("lora_B.default.weight").data.copy_(start.b / root)
    return adapted


def check(model: PreTrainedModel, settings: TuneSettings, seq: int) -> dict[str, str]:
    """Check that a fine-tune on windows of `seq` tokens can work, by a training step on the meta device.

    model: has no weights (see `build_empty`). Returns the linear layers that get no adapter, by name, with the reason;
    the first is named in a warning. Raises InputError for settings that the model or PEFT does not support.
    """
    layers = linear_layers(model)
    check_rank(layers, settings)
    _check_positions(model, settings, seq)
    _check_checkpointing(model, settings)
    if settings.method == FULL:
        return {}
    without = refused_layers(model, layers, settings)
    without |= _unused_layers(copy.deepcopy(model), [name for name in layers if name not in without], settings)
    if without:
        first, why = next(iter(without.items()))
        others = f", and {len(without) - 1} more" if len(without) > 1 else ""
        warnings.warn(f"{OURS}No adapter on {first}, as {why}{others}.", UserWarning, stacklevel=2)
    return without


def check_rank(layers: Mapping[str, nn.Module], settings: TuneSettings) -> None:
    """Raises InputError if `tune.rank` is larger than the rank of one of the layers."""
    ranks = {name: rank for name, layer in layers.items() if (rank := _full_rank(layer)) > 1}
    least = min(ranks, key=ranks.__getitem__)
    if settings.method in _LOW_RANK and settings.rank > ranks[least]:
        raise InputError(f"tune.rank: {settings.rank} is more than {least} has; accepted: up to {ranks[least]}")


def _check_positions(model: PreTrainedModel, settings: TuneSettings, seq: int) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    virtual = settings.virtual_tokens if settings.method in PROMPTS else 0
    if positions and virtual and seq + virtual > positions > 0:
        fits = f"data.seq={positions - virtual}" if positions > virtual + 1 else f"up to {positions - 2}"
        raise InputError(
            f"tune.virtual_tokens: {virtual} and data.seq={seq} are more than the model's {positions} positions; "
            f"accepted: {fits}"
        )


def _check_checkpointing(model: PreTrainedModel, settings: TuneSettings) -> None:
    if not settings.checkpointing:
        return
    if settings.method == "prefix":
        why = "tune.method=prefix, whose virtual tokens are in a cache"
    elif not model.supports_gradient_checkpointing:
        why = f"a {type(model).__name__}"
    else:
        return
    raise InputError(f"tune.checkpointing: true does not work with {why}; accepted: false")


def refused_layers(model: PreTrainedModel, names: Iterable[str], settings: TuneSettings) -> dict[str, str]:
    """The named linear layers that cannot have an adapter, with the reason."""
    refused = {name: "it has one row or column" for name in names if _full_rank(model.get_submodule(name)) == 1}
    if settings.method not in _LOW_RANK:
        return refused
    config: Any = LoraConfig()
    for name in names:
        leaf = name.rpartition(".")[2]
        try:  # PEFT makes this check only after it has changed other layers
            LoraModel._check_target_module_compatiblity(None, config, model, leaf)  # type: ignore[arg-type]
        except ValueError:
            refused[name] = f"PEFT puts no LoRA on {leaf} of a {model.config.model_type}"
        if _mistaken_for_expert(model, leaf):
            refused[name] = f"PEFT takes {leaf} of a {model.config.model_type} for one of its experts"
    return refused


def _mistaken_for_expert(model: PreTrainedModel, leaf: str) -> bool:
    """Whether PEFT takes a layer for part of an expert, as before transformers 5, and adapts the experts instead."""
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # an older PEFT, which makes no such mistake
        return False
    config = LoraConfig(target_modules=[leaf])
    try:
        conversion.convert_peft_config_for_transformers(config, model, None)
    except ValueError:  # it wants the other parts of the expert too
        return True
    return leaf not in (config.target_modules or ())


def _unused_layers(model: PreTrainedModel, targets: list[str], settings: TuneSettings) -> dict[str, str]:
    """The targets whose adapters have no effect on the model's output, with the reason.

    Some models read a weight without calling its layer; some have layers that a causal LM does not use. The check moves
    `model` to the meta device, adds adapters and runs a backward. Raises InputError if that fails.
    """
    tokens = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    model.to("meta").requires_grad_(False).train()  # type: ignore[arg-type]  # the wrapper hides its arguments
    try:
        model(input_ids=tokens)
        runs = True
    except Exception:  # its control flow needs values, which the meta device does not have
        runs = False
    try:
        with torch.random.fork_rng(devices=[]):
            adapted: Any = add(model, targets, settings, seed=0)
        if runs:
            adapted(input_ids=tokens).logits.sum().backward()
    except Exception as error:
        raise _unsupported(model, settings, first_line(error)) from error
    if not runs or settings.method in PROMPTS:
        return {}
    layers = {name: adapted.get_base_model().get_submodule(name) for name in targets}
    adapters = {name: [p for p in layer.parameters() if p.requires_grad] for name, layer in layers.items()}
    why = f"a {type(model).__name__} never calls it"
    return {name: why for name, own in adapters.items() if own and all(p.grad is None for p in own)}


def _unsupported(model: PreTrainedModel, settings: TuneSettings, why: str) -> InputError:
    others = ", ".join(method for method in METHODS if method != settings.method)
    return InputError(
        f"tune.method: {settings.method} does not work on a {type(model).__name__}: {why}; accepted: one of {others}"
    )


def _full_rank(layer: nn.Module) -> int:
    return min(layer.in_features, layer.out_features) if isinstance(layer, QuantLinear) else min(weight_of(layer).shape)


def _peft_config(model: PreTrainedModel, targets: list[str], settings: TuneSettings) -> peft.PeftConfig:
    if settings.method in _LOW_RANK:
        # PEFT types lora_alpha as int, but accepts floats
        options = {**_LOW_RANK[settings.method], "lora_alpha": settings.alpha}
        return LoraConfig(
            r=settings.rank,
            lora_dropout=settings.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
            **options,
        )
    if settings.method in _PROMPT_CONFIGS:
        return _PROMPT_CONFIGS[settings.method](task_type="CAUSAL_LM", num_virtual_tokens=settings.virtual_tokens)
    known = peft.utils.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    if model.config.model_type in known:  # keys, values and the input of the MLP's second layer, as in the paper
        return IA3Config(task_type="CAUSAL_LM")
    return IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=[])


def _unfreeze(model: PreTrainedModel) -> PreTrainedModel:
    """Make every weight fp32 and trainable: 16 bits would round small steps away."""
    unpack_model(model)
    return model.float().requires_grad_(True)


def load(model: PreTrainedModel, folder: Path | str) -> PeftModel:
    """Add to a quantized model the adapters that `save_pretrained` wrote into a folder."""
    with _ignore_peft_warnings():
        return PeftModel.from_pretrained(model, folder)


@contextmanager
def _ignore_peft_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # PEFT uses the old name of this property
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to", UserWarning)  # PEFT then corrects it itself
        yield
