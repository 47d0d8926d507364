"""What a fine-tune trains: one of PEFT's adapters on a quantized model, or all of a 16-bit one."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import InputError
from .functions import add_low_rank
from .layers import QuantLinear
from .settings import FULL, TuneSettings
from .starts import Start

_LOW_RANK = {"lora": {}, "dora": {"use_dora": True}, "rslora": {"use_rslora": True}}  # and their LoraConfig's keys
_PROMPTS = {"prefix": PrefixTuningConfig, "p_tuning": PromptEncoderConfig}


class LoraQuantLinear(LoraLinear):
    """LoRA on a QuantLinear: PEFT's own layer, whose base is packed and so cannot be merged into.

    One plain adapter, the usual case, is a single step of autograd, which keeps x in its own dtype.
    """

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        plain = not (self.disable_adapters or self.lora_variant or self.merged or args or kwargs)
        if not plain or len(active) != 1 or self.lora_B[active[0]].bias is not None:
            return super().forward(x, *args, **kwargs)
        name = active[0]
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return add_low_rank(self.base_layer(x), self.lora_dropout[name](x), a, b, self.scaling[name])

    def merge(self, *args, **kwargs) -> None:
        if isinstance(self.get_base_layer(), QuantLinear):
            raise TypeError("a packed weight cannot take up an adapter; dequantize the model before merging")
        super().merge(*args, **kwargs)


def add(
    model: PreTrainedModel,
    targets: list[str],
    settings: TuneSettings,
    seed: int,
    starts: dict[str, Start] | None = None,
) -> nn.Module:
    """Adapters in fp32 on the named layers, or with `tune.method=full` all of the model, ready to train.

    LoRA starts with B at zero, so that the model's output is what it was, or from `starts`, which bring their own packed
    weights along. A start of zeros, where there was no error to begin from, is none: A and B both at zero never move.
    """
    torch.manual_seed(seed)
    if settings.method == FULL:
        return _unfrozen(model)
    targets = [name for name in targets if _full_rank(model.get_submodule(name)) > 1]  # a gate is left alone
    for name in starts or {}:
        model.set_submodule(name, QuantLinear(starts[name].packed, model.get_submodule(name).bias))
    with _quietly():
        adapted = peft.get_peft_model(model, _config(model, targets, settings))
    for p in adapted.parameters():
        if p.requires_grad:  # not all of PEFT's methods see to that; in 16 bits small steps are lost
            p.data = p.data.float()
    for name, start in (starts or {}).items():
        if name not in targets or not start.a.any():
            continue
        layer = adapted.base_model.model.get_submodule(name)
        root = layer.scaling["default"] ** 0.5
        layer.lora_A["default"].weight.data.copy_(start.a / root)
        layer.lora_B["default"].weight.data.copy_(start.b / root)
    return adapted


def check_rank(layers: dict[str, nn.Module], settings: TuneSettings) -> None:
    """Raises InputError for a rank that one of the layers does not have."""
    ranks = {name: rank for name, layer in layers.items() if (rank := _full_rank(layer)) > 1}
    least = min(ranks, key=ranks.get)
    if settings.method in _LOW_RANK and settings.rank > ranks[least]:
        raise InputError(f"tune.rank: {settings.rank} is more than {least} has; accepted: up to {ranks[least]}")


def _full_rank(layer: nn.Module) -> int:
    return min(layer.weight.shape) if not isinstance(layer, QuantLinear) else min(layer.in_features, layer.out_features)


def _config(model: PreTrainedModel, targets: list[str], settings: TuneSettings) -> peft.PeftConfig:
    if settings.method in _LOW_RANK:
        return _knows_quant_linear(
            LoraConfig(
                r=settings.rank,
                lora_alpha=settings.alpha,
                lora_dropout=settings.dropout,
                target_modules=targets,
                task_type="CAUSAL_LM",
                **_LOW_RANK[settings.method],
            )
        )
    if settings.method in _PROMPTS:
        return _PROMPTS[settings.method](task_type="CAUSAL_LM", num_virtual_tokens=settings.virtual_tokens)
    known = peft.utils.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    if model.config.model_type in known:  # keys, values, and what feeds the second layer of the MLP, as in the paper
        return IA3Config(task_type="CAUSAL_LM")
    return IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=[])


def _unfrozen(model: PreTrainedModel) -> PreTrainedModel:
    """Every weight in fp32, to be trained: steps are too small for 16 bits to take up."""
    for name in [name for name, layer in model.named_modules() if isinstance(layer, QuantLinear)]:
        unpack(model, name)
    return model.float().requires_grad_(True)


def unpack(model: nn.Module, name: str, dtype: torch.dtype | None = None) -> None:
    """Put a Linear with the dequantized weight in the place of the QuantLinear `name`."""
    layer = model.get_submodule(name)
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(layer.packed.dequantize(dtype), requires_grad=False)
    plain.bias = layer.bias
    model.set_submodule(name, plain)


def load(model: PreTrainedModel, folder: Path | str) -> PeftModel:
    """The model, quantized as it was, with the adapters that `save_pretrained` left in a folder."""
    with _quietly():
        config = peft.PeftConfig.from_pretrained(folder)
        return PeftModel.from_pretrained(model, folder, config=_knows_quant_linear(config))


def _knows_quant_linear(config: peft.PeftConfig) -> peft.PeftConfig:
    """Tell a LoraConfig how LoRA goes on a QuantLinear."""
    if isinstance(config, LoraConfig):
        config._register_custom_module({QuantLinear: LoraQuantLinear})
    return config


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT doubts a layer that is not its own, and calls what transformers renamed
        yield
