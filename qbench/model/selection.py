"""Which layers of a model are quantized, and why others stay in 16 bit."""

import copy
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from formats.modes import aside
from qbench.errors import InputError
from qbench.system.messages import OURS

from .quant_linear import PackedParameter, QuantLinear
from .unquantized import describe_unquantized


def is_replaceable(layer: nn.Module) -> bool:
    """Whether a QuantLinear can replace the layer: it computes x·Wᵀ + b with its own W, and nothing else."""
    return _is_linear(layer) and _why_not_replaceable(layer) is None


def _is_linear(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | Conv1D) and not isinstance(layer, QuantLinear)


def _why_not_replaceable(layer: nn.Module) -> str | None:
    """Why a QuantLinear cannot replace a linear layer; None if it can."""
    if layer._parameters.get("weight") is None:
        return "its weight is computed from other tensors"
    if not _computes_linear_product(layer):  # such as a router that returns the experts it chose
        return f"a {type(layer).__name__} computes something else than x·Wᵀ + b"
    return None


def _computes_linear_product(layer: nn.Module) -> bool:
    """Whether `forward` of a linear layer computes x·Wᵀ + b and nothing else."""
    return type(layer).forward in (nn.Linear.forward, Conv1D.forward) or aside(_try_forward, layer)


def _try_forward(layer: nn.Module) -> bool:
    """Whether `forward` of a copy of the layer with a small random weight gives x·Wᵀ + b."""
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
    except Exception:  # it needs other inputs than x
        return False


@dataclass(frozen=True)
class Coverage:
    """Which weights of a model are quantized.

    eligible: the number of weights in matrices, outside of embeddings and head. quantized: how many of them are quantized,
    or would be. left: why each other matrix stays in 16 bit, by name of the layer or parameter, largest first.
    """

    quantized: int
    eligible: int
    left: dict[str, str]

    @property
    def share(self) -> float:
        return self.quantized / self.eligible if self.eligible else 1.0

    def describe(self) -> str:
        """A sentence about what is left in 16 bit; empty if nothing is."""
        return describe_unquantized(self.left, self.share)

    def to_json(self) -> dict:
        return {"quantized": self.quantized, "eligible": self.eligible, "left": self.left}


def count_coverage(model: PreTrainedModel) -> Coverage:
    """The coverage of a 16-bit model, of a packed one, or of one on the meta device."""
    heads, left_layers = find_heads(model), find_layers_left(model)
    excluded = [m for m in model.modules() if isinstance(m, nn.Embedding) or m in heads]
    excluded_ids = {id(p) for m in excluded for p in m.parameters(recurse=False)}
    quantized = sum(layer.packed.numel for layer in packed_layers(model).values())
    left: dict[str, tuple[int, str]] = {}  # weights and reason
    for name, parameter in model.named_parameters():
        is_matrix = sum(size > 1 for size in parameter.shape) > 1
        if isinstance(parameter, PackedParameter) or not is_matrix or id(parameter) in excluded_ids:
            continue
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf == "weight" and is_replaceable(module):
            quantized += parameter.numel()
            continue
        why = f"a {type(module).__name__} keeps it as {list(parameter.shape)}, in no linear layer"
        left[owner if owner in left_layers else name] = parameter.numel(), left_layers.get(owner, why)
    largest_first = sorted(left, key=lambda name: -left[name][0])
    eligible = quantized + sum(weights for weights, _ in left.values())
    return Coverage(quantized, eligible, {name: left[name][1] for name in largest_first})


def find_layers_left(model: PreTrainedModel) -> dict[str, str]:
    """The linear layers outside of the head that stay in 16 bit, by name, and why."""
    heads = find_heads(model)
    linear = {name: module for name, module in model.named_modules() if _is_linear(module) and module not in heads}
    return {name: why for name, module in linear.items() if (why := _why_not_replaceable(module))}


def find_heads(model: PreTrainedModel) -> set[nn.Module | None]:
    """The modules that turn the output of the base model into an answer: `lm_head`, `score`, `classifier` and the like.

    If the base model is no separate module, they are the output embeddings or, without these, the module with the last
    parameter. transformers' own quantizers use the same rule.
    """
    output, base = model.get_output_embeddings(), model.base_model
    if base is not model:
        return {output, *model.modules()} - set(base.modules())
    last = [name for name, _ in model.named_parameters()][-1:]
    return {output} if output is not None else {model.get_submodule(name.rpartition(".")[0]) for name in last}


def warn_of_layers_left(model: PreTrainedModel) -> None:
    """Warn of the layers that stay in 16 bit, if any. The warning points at the caller's caller."""
    if sentence := count_coverage(model).describe():
        warnings.warn(f"{OURS}{sentence}", UserWarning, stacklevel=3)


def weight_of(layer: nn.Module, weight: Tensor | None = None) -> Tensor:
    """W [out_features, in_features] of a replaceable layer; transformers' `Conv1D` stores the transpose.

    weight: used instead of the layer's own, and stored in the same layout.
    """
    weight = layer.get_parameter("weight") if weight is None else weight
    return weight.t() if isinstance(layer, Conv1D) else weight


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers to quantize, by name: every replaceable one outside of the head. Raises InputError if there is none."""
    heads = find_heads(model)
    layers = {name: m for name, m in model.named_modules() if is_replaceable(m) and m not in heads}
    if not layers:
        raise InputError(f"{type(model).__name__} has no linear layer to quantize besides its head")
    return layers


def packed_layers(model: nn.Module) -> dict[str, QuantLinear]:
    """The layers of a model that are packed, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
