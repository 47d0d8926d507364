"""What a fine-tune trains: one of PEFT's adapters on a quantized model, or all of a 16-bit one."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from .errors import InputError
from .layers import QuantLinear, replace, unpack_all, weight_of
from .settings import FULL, TuneSettings
from .starts import Start

# and their LoraConfig's keys
_LOW_RANK: dict[str, dict[str, Any]] = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}
_PROMPTS = {"prefix": PrefixTuningConfig, "p_tuning": PromptEncoderConfig}


def add(
    model: PreTrainedModel,
    targets: list[str],
    settings: TuneSettings,
    seed: int,
    starts: dict[str, Start] | None = None,
) -> PreTrainedModel | PeftModel:
    """Adapters in fp32 on the named layers, or with `tune.method=full` all of the model, ready to train.

    LoRA starts with B at zero, so that the model's output is what it was, or from `starts`, which bring their own packed
    weights along. A start of zeros, where there was no error to begin from, is none: A and B both at zero never move.
    """
    torch.manual_seed(seed)
    if settings.method == FULL:
        return _unfrozen(model)
    targets = [name for name in targets if _full_rank(model.get_submodule(name)) > 1]  # a gate is left alone
    replace(model, {name: start.packed for name, start in (starts or {}).items()})
    with _quietly():
        adapted = peft.get_peft_model(model, _config(model, targets, settings))
    for p in adapted.parameters():
        if p.requires_grad:  # not all of PEFT's methods see to that; in 16 bits small steps are lost
            p.data = p.data.float()
    for name, start in (starts or {}).items():
        if name not in targets or not start.a.any():
            continue
        layer = adapted.get_base_model().get_submodule(name)
        assert isinstance(layer, LoraLayer)
        root = layer.scaling["default"] ** 0.5
        layer.get_parameter("lora_A.default.weight").data.copy_(start.a / root)
        layer.get_parameter("lora_B.default.weight").data.copy_(start.b / root)
    return adapted


def check_rank(layers: Mapping[str, nn.Module], settings: TuneSettings) -> None:
    """Raises InputError for a rank that one of the layers does not have."""
    ranks = {name: rank for name, layer in layers.items() if (rank := _full_rank(layer)) > 1}
    least = min(ranks, key=ranks.__getitem__)
    if settings.method in _LOW_RANK and settings.rank > ranks[least]:
        raise InputError(f"tune.rank: {settings.rank} is more than {least} has; accepted: up to {ranks[least]}")


def _full_rank(layer: nn.Module) -> int:
    return min(layer.in_features, layer.out_features) if isinstance(layer, QuantLinear) else min(weight_of(layer).shape)


def _config(model: PreTrainedModel, targets: list[str], settings: TuneSettings) -> peft.PeftConfig:
    if settings.method in _LOW_RANK:
        options = {**_LOW_RANK[settings.method], "lora_alpha": settings.alpha}  # to PEFT an int, though it takes any
        return LoraConfig(
            r=settings.rank,
            lora_dropout=settings.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
            **options,
        )
    if settings.method in _PROMPTS:
        return _PROMPTS[settings.method](task_type="CAUSAL_LM", num_virtual_tokens=settings.virtual_tokens)
    known = peft.utils.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    if model.config.model_type in known:  # keys, values, and what feeds the second layer of the MLP, as in the paper
        return IA3Config(task_type="CAUSAL_LM")
    return IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=[])


def _unfrozen(model: PreTrainedModel) -> PreTrainedModel:
    """Every weight in fp32, to be trained: steps are too small for 16 bits to take up."""
    unpack_all(model)
    return model.float().requires_grad_(True)


def load(model: PreTrainedModel, folder: Path | str) -> PeftModel:
    """The model, quantized as it was, with the adapters that `save_pretrained` left in a folder."""
    with _quietly():
        return PeftModel.from_pretrained(model, folder)


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        # PEFT calls it by the name that it had before
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield
