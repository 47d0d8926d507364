"""The layers of a model that a QuantLinear stands for, and those that are left."""

import copy
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from formats.modes import aside
from qbench.errors import InputError
from qbench.system.messages import OURS, left_in_words

from .quant_linear import PackedParameter, QuantLinear


def replaceable(layer: nn.Module) -> bool:
    """Whether a QuantLinear can stand in for it: it computes x·Wᵀ + b of a weight of its own, and nothing else."""
    return _linear(layer) and _why_not(layer) is None


def _linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | Conv1D) and not isinstance(layer, QuantLinear)


def _why_not(layer: nn.Module) -> str | None:
    """Why a QuantLinear cannot stand in for a linear layer; None where it can."""
    if layer._parameters.get("weight") is None:
        return "its weight is computed from other tensors"
    if not _computes_a_product(layer):  # such as a router that returns the experts it chose
        return f"a {type(layer).__name__} computes something else than x·Wᵀ + b"
    return None


def _computes_a_product(layer: nn.Module) -> bool:
    """Whether `forward` of a linear layer is x·Wᵀ + b and nothing else, found by trying it on a small weight."""
    return type(layer).forward in (nn.Linear.forward, Conv1D.forward) or aside(_tried, layer)


def _tried(layer: nn.Module) -> bool:
    generator = torch.Generator("cpu").manual_seed(0)
    w, b, x = (torch.randn(s, generator=generator, device="cpu", dtype=torch.float32) for s in ((4, 3), (4,), (2, 3)))
    small = copy.copy(layer)
    conv1d = isinstance(layer, Conv1D)
    bias = None if layer._parameters.get("bias") is None else b
    vars(small).update(in_features=3, out_features=4, nx=3, nf=4)
    vars(small)["_parameters"] = {"weight": w.t() if conv1d else w, "bias": bias}
    try:
        with torch.no_grad():
            y = type(layer).forward(small, x)
        return isinstance(y, torch.Tensor) and torch.allclose(y, nn.functional.linear(x, w, bias), atol=1e-5)
    except Exception:  # whatever it needs beside x
        return False


@dataclass(frozen=True)
class Coverage:
    """Which weights of a model are quantized, or would be, of all that have two or more dimensions and are in neither
    embeddings nor head. quantized, eligible: how many. left: the rest, by name, and why.
    """

    quantized: int
    eligible: int
    left: dict[str, str]

    @property
    def share(self) -> float:
        return self.quantized / self.eligible if self.eligible else 1.0

    def in_words(self) -> str:
        return left_in_words(self.left, self.share)

    def plain(self) -> dict:
        return {"quantized": self.quantized, "eligible": self.eligible, "left": self.left}


def coverage(model: PreTrainedModel) -> Coverage:
    """Of a 16-bit model, a packed one, or one on the meta device."""
    heads, linear = heads_of(model), left(model)
    apart = [m for m in model.modules() if isinstance(m, nn.Embedding) or m in heads]
    aside = {id(p) for m in apart for p in m.parameters(recurse=False)}
    quantized = sum(layer.packed.numel for layer in packed_layers(model).values())
    others: dict[str, tuple[int, str]] = {}  # weights and reason
    for name, parameter in model.named_parameters():
        is_matrix = sum(size > 1 for size in parameter.shape) > 1
        if isinstance(parameter, PackedParameter) or not is_matrix or id(parameter) in aside:
            continue
        owner, _, own = name.rpartition(".")
        module = model.get_submodule(owner)
        if own == "weight" and replaceable(module):
            quantized += parameter.numel()
            continue
        why = f"a {type(module).__name__} keeps it as {list(parameter.shape)}, in no linear layer"
        others[owner if owner in linear else name] = parameter.numel(), linear.get(owner, why)
    largest_first = sorted(others, key=lambda name: -others[name][0])
    every = quantized + sum(weights for weights, _ in others.values())
    return Coverage(quantized, every, {name: others[name][1] for name in largest_first})


def left(model: PreTrainedModel) -> dict[str, str]:
    """The linear layers beside the output head that stay in 16 bit, by name, and why."""
    heads = heads_of(model)
    linear = {name: module for name, module in model.named_modules() if _linear(module) and module not in heads}
    return {name: why for name, module in linear.items() if (why := _why_not(module))}


def heads_of(model: PreTrainedModel) -> set[nn.Module | None]:
    """The modules that make an answer of what the base of a model computes: `lm_head`, `score`, `classifier` and the like.

    Where the base is no part of its own, they are the output embeddings or, without these, the module with the last
    parameter, as in transformers' own quantizers.
    """
    output, base = model.get_output_embeddings(), model.base_model
    if base is not model:
        return {output, *model.modules()} - set(base.modules())
    last = [name for name, _ in model.named_parameters()][-1:]
    return {output} if output is not None else {model.get_submodule(name.rpartition(".")[0]) for name in last}


def warn_of_left(model: PreTrainedModel) -> None:
    """Tell who quantizes a model in Python what stays as it is."""
    if sentence := coverage(model).in_words():
        warnings.warn(f"{OURS}{sentence}", UserWarning, stacklevel=3)


def weight_of(layer: nn.Module, weight: Tensor | None = None) -> Tensor:
    """W [out_features, in_features] of a replaceable layer; transformers' `Conv1D` keeps it transposed.

    weight: one to take for the layer's own, as that is kept.
    """
    weight = layer.get_parameter("weight") if weight is None else weight
    return weight.t() if isinstance(layer, Conv1D) else weight


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers to quantize, by name: every linear one but those of a head. Raises InputError if there is none."""
    heads = heads_of(model)
    found = {name: m for name, m in model.named_modules() if replaceable(m) and m not in heads}
    if not found:
        raise InputError(f"{type(model).__name__} has no linear layer to quantize besides its head")
    return found


def packed_layers(model: nn.Module) -> dict[str, "QuantLinear"]:
    """Those that are packed, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
