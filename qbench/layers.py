"""QuantLinear, the layer that holds a packed weight, and the layers of a model in whose place it goes."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from formats import QuantizedTensor

from . import ops  # noqa: F401  registers qbench::linear
from .errors import InputError


def replaceable(layer: nn.Module) -> bool:
    """Whether a QuantLinear can stand in for it."""
    return isinstance(layer, nn.Linear | Conv1D) and not isinstance(layer, QuantLinear)


def weight_of(layer: nn.Module, weight: Tensor | None = None) -> Tensor:
    """W [out_features, in_features] of a replaceable layer; transformers' `Conv1D` keeps it transposed.

    weight: one to take for the layer's own, as that is kept.
    """
    weight = layer.get_parameter("weight") if weight is None else weight
    return weight.t() if isinstance(layer, Conv1D) else weight


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers to quantize, by name: every linear one but the output head. Raises InputError if there is none."""
    head = model.get_output_embeddings()
    found = {name: m for name, m in model.named_modules() if replaceable(m) and m is not head}
    if not found:
        raise InputError(f"{type(model).__name__} has no linear layer to quantize besides its head")
    return found


def packed_layers(model: nn.Module) -> dict[str, "QuantLinear"]:
    """Those that are packed, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def replace(model: nn.Module, packed: dict[str, QuantizedTensor]) -> None:
    """Put a QuantLinear in the place of each named layer, keeping its bias; the 16-bit weight is let go.

    `checkpoint.save` writes such a model; its own `save_pretrained` does where it was loaded packed.
    """
    for name, weight in packed.items():
        layer = model.get_submodule(name)
        conv1d = layer.conv1d if isinstance(layer, QuantLinear) else isinstance(layer, Conv1D)
        model.set_submodule(name, QuantLinear(weight, layer._parameters["bias"], conv1d))


def unpack(model: nn.Module, name: str, dtype: torch.dtype | None = None) -> None:
    """Put a Linear with the dequantized weight in the place of the QuantLinear `name`."""
    layer = model.get_submodule(name)
    assert isinstance(layer, QuantLinear)
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(layer.packed.dequantize(dtype), requires_grad=False)
    plain.bias = layer.bias
    model.set_submodule(name, plain)


def to_conv1d(model: nn.Module, name: str) -> None:
    """Put transformers' `Conv1D` in the place of the Linear `name`."""
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    with torch.device("meta"):
        conv = Conv1D(layer.out_features, layer.in_features)
    conv.weight = nn.Parameter(layer.weight.t().contiguous(), layer.weight.requires_grad)
    conv.bias = layer.bias
    model.set_submodule(name, conv)


def unpack_all(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Put in the place of each QuantLinear what stood there before it, with the dequantized weight."""
    for name, layer in packed_layers(model).items():
        unpack(model, name, dtype)
        if layer.conv1d:
            to_conv1d(model, name)


class Dequantized(Tensor):
    """What is computed from a packed weight: read like any tensor, but `data` cannot be set, as that would be lost."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # what comes of it is a tensor like any other

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise TypeError(
            "a packed weight cannot take up a change; qbench.merge.merged unpacks a model and merges adapters"
        )


class QuantLinear(nn.Linear):
    """y = x·Wᵀ + b, with W [out_features, in_features] in a format.

    It is a Linear to all who look for one, such as PEFT. The weight is buffers, not a parameter: nothing trains it, and
    the backward gives the gradient for x alone. The product runs in the dtype of x. Moving the layer to another dtype
    leaves the packed weight as it is.
    """

    codes: Tensor
    levels: Tensor | None
    _is_hf_initialized = True  # to transformers, which would draw random numbers for a weight that is not kept

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None = None, conv1d: bool = False):
        """conv1d: whether it stands for a `Conv1D`, which a model that is unpacked is to have again."""
        nn.Module.__init__(self)  # that of Linear would make a weight
        self.out_features, self.in_features = weight.shape
        self.format, self.bits, self.block = weight.format, weight.bits, weight.block
        self.dtype, self.own_levels, self.conv1d = weight.dtype, weight.own_levels, conv1d
        self.register_buffer("codes", weight.codes)
        self.register_buffer("levels", weight.levels, persistent=weight.own_levels)
        self._scale = self._register("scale", weight.scale)
        self._shift = self._register("shift", weight.shift)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    def _register(self, name: str, stored: tuple[Tensor, ...]) -> list[str]:
        names = [name, f"{name}_absmax", f"{name}_offset"][: len(stored)]
        for buffer, tensor in zip(names, stored, strict=True):
            self.register_buffer(buffer, tensor)
        return names

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        packed = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, tensor in packed.items():  # `model.to(torch.bfloat16)` must not round scales and levels
            moved = self.get_buffer(name)
            if moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    @property
    def dq(self) -> bool:
        """Whether the scales are double quantized."""
        return len(self._scale) == 3

    def _stored(self, names: list[str]) -> list[Tensor]:
        return [getattr(self, name) for name in names]

    @property
    def weight(self) -> Dequantized:  # type: ignore[override]  # computed: nothing could set it
        """W [out_features, in_features], dequantized anew each time."""
        return self.packed.dequantize().as_subclass(Dequantized)

    @property
    def packed(self) -> QuantizedTensor:
        return QuantizedTensor(
            format=self.format,
            bits=self.bits,
            block=self.block,
            shape=torch.Size((self.out_features, self.in_features)),
            dtype=self.dtype,
            codes=self.codes,
            levels=self.levels,
            scale=tuple(self._stored(self._scale)),
            shift=tuple(self._stored(self._shift)),
            own_levels=self.own_levels,
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.levels is None:  # 16 bit: the codes are the weight
            y = nn.functional.linear(x, self.codes.to(x.dtype))
        else:
            y = torch.ops.qbench.linear(
                x,
                self.codes,
                self.levels,
                self._stored(self._scale),
                self._stored(self._shift),
                self.bits,
                self.block,
                self.out_features,
                self.in_features,
            )
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}, block={self.block}, dq={self.dq}"
