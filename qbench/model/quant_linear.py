"""QuantLinear, the layer that holds a packed weight, and the guards against accidental writes to that weight.

PackedParameter guards the packed tensors. Dequantized guards the 16-bit weight that is computed from them.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map_only

import formats
from formats import QuantizedTensor
from formats.modes import aside, is_fake
from qbench import ops  # noqa: F401  registers qbench::linear

from .devices import dtype_name

#: methods whose names end in `_`, but which do not change values
_HARMLESS = {"requires_grad_", "share_memory_", "retain_grad_"}


class PackedParameter(nn.Parameter):
    """A frozen tensor of a packed weight.

    It is a parameter, so that DistributedDataParallel sends it once, FSDP shards it and PEFT counts it. It cannot be
    trained, and a cast does not change its dtype: scales rounded to bf16 would be another weight.
    """

    def __new__(cls, data: Tensor, requires_grad: bool = False) -> "PackedParameter":
        if data.is_inference():  # autograd refuses to save such a tensor, and a fine-tune may follow
            with torch.inference_mode(False):
                data = data.clone()
        return super().__new__(cls, data, False)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return PackedParameter, (self.detach(),)

    @property
    def requires_grad(self) -> bool:
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.requires_grad_(value)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        if requires_grad:
            raise TypeError("a packed weight cannot be trained; train adapters on it, or `model.dequantize()` first")
        return self

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.dtype != self.dtype:
            own = self.detach().to(value.device)
            if value.is_meta or not torch.equal(own.to(value.dtype), value):
                raise TypeError(f"a packed tensor of {self.dtype} does not accept values of {value.dtype}")
            value = own
        nn.Parameter.data.__set__(self, value)  # type: ignore[attr-defined]  # a descriptor written in C


class Dequantized(Tensor):
    """A weight computed from a packed one. Reads work as for any tensor; a write would be lost, so it raises TypeError.

    Tensors that share its memory, such as views or `data`, are guarded as well.
    """

    _is_hf_initialized = True  # else transformers would fill it with random numbers

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = [kwargs.get("out"), *((args[:1] or kwargs.values()) if _writes_in_place(func) else ())]
        if any(isinstance(tensor, Dequantized) for tensor in tree_iter(written)):
            _refuse_write()
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            memory = {_memory_id(tensor) for tensor in tree_iter(args) if isinstance(tensor, Dequantized)}
            return tree_map_only(Tensor, lambda t: t.as_subclass(Dequantized) if _memory_id(t) in memory else t, result)


def _refuse_write(*_: Any) -> NoReturn:
    raise TypeError(
        "a packed weight cannot be changed; qbench.training.merging.merged unpacks a model and merges adapters"
    )


for _operator in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"):
    setattr(Dequantized, f"__i{_operator}__", _refuse_write)  # Tensor's would turn the TypeError into `w = w + 1`


def _writes_in_place(func: Any) -> bool:
    """Whether a function of tensors writes to its first argument: by PyTorch's convention, its name ends in `_`."""
    name = getattr(func, "__name__", "")
    if name == "__set__":
        return getattr(func, "__self__", None) is Tensor.data
    return name == "__setitem__" or (name[-1:] == "_" and name[-2:] != "__" and name not in _HARMLESS)


def _memory_id(tensor: Tensor) -> int:
    """An id of the memory of a tensor. A tensor without a storage, such as a sparse one, has an id of its own."""
    return tensor.untyped_storage()._cdata if torch._C._has_storage(tensor) else id(tensor)


class QuantLinear(nn.Linear):
    """y = x·Wᵀ + b, with W [out_features, in_features] in a format.

    It is a subclass of Linear, so that PEFT and others find it. The packed weight is a set of frozen parameters: `codes`;
    `scale`, with double quantization also `scale_absmax` and `scale_offset`; the same for `shift`; and `levels` if the
    tensor has its own table.

    The product runs in the dtype of x, or in that of autocast. The backward pass computes only the gradient for x. Moving
    the layer to another dtype does not change the packed weight.

    A state dict also names its format. Loading one of another format, block size or scale storage is an error.
    """

    codes: Tensor
    levels: Tensor | None
    _is_hf_initialized = True  # else transformers would fill the weight with random numbers

    def __init__(self, weight: QuantizedTensor, bias: Tensor | None = None, conv1d: bool = False):
        """conv1d: whether it replaces a `Conv1D`; unpacking the model then puts one back."""
        nn.Module.__init__(self)  # Linear's would allocate a weight
        self.out_features, self.in_features = weight.shape
        self.format, self.bits, self.block = weight.format, weight.bits, weight.block
        self.dtype, self.own_levels, self.conv1d = weight.dtype, weight.own_levels, conv1d
        self.identified = True  #: whether its state dict names its format
        self._scale, self._shift = _names_of_scales("scale", weight.scale), _names_of_scales("shift", weight.shift)
        self._packed = ["codes", *self._scale, *self._shift, *(["levels"] if weight.own_levels else [])]
        self.table = aside(_shared_levels, weight)  #: the levels, if all tensors of the format share them
        self.codes = PackedParameter(weight.codes)
        for name, tensor in zip(self._scale + self._shift, weight.scale + weight.shift, strict=True):
            self.register_parameter(name, PackedParameter(tensor.reshape(tensor.shape or 1)))  # FSDP shards no scalar
        self._dtypes = {name: self.get_parameter(name).dtype for name in self._packed if name != "levels"}
        # levels that all tensors of the format share are no parameter: they are neither saved, sent nor sharded
        self.levels = PackedParameter(weight.levels) if self.own_levels and weight.levels is not None else weight.levels
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter. A packed tensor is frozen, also if other code such as `from_pretrained` assigns it."""
        if name == "weight":
            _refuse_write()
        if name in self._packed and type(param) is nn.Parameter and type(param.data) is Tensor:
            param = PackedParameter(param.data)
        super().register_parameter(name, param)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        packed = {id(self._parameters[name]) for name in self._packed}

        def move(tensor: Tensor) -> Tensor:  # `model.to(torch.bfloat16)` must not round scales and levels
            moved = fn(tensor)
            cast = id(tensor) in packed and moved.dtype != tensor.dtype
            return tensor.to(moved.device) if cast else moved

        super()._apply(move, recurse)
        for name in self._packed:
            self.register_parameter(name, self._parameters[name])
        if not self.own_levels and self.levels is not None:
            self._move_levels(self.codes.device)
        return self

    def _move_levels(self, device: torch.device) -> None:
        """Move the levels of the format to a device. Levels on the meta device are built again, from `table`."""
        assert self.levels is not None
        if self.levels.is_meta and device.type != "meta":
            if self.table is None:
                return
            self.levels = torch.tensor(self.table, dtype=torch.float32, device=device)
        else:
            self.levels = self.levels.to(device)

    @property
    def dq(self) -> bool:
        """Whether the scales are double quantized."""
        return len(self._scale) == 3

    @property
    def num_weights(self) -> int:
        """Weights of the layer, in_features × out_features."""
        return self.out_features * self.in_features

    def packed_parameters(self) -> list[nn.Parameter]:
        """The parameters that make up the packed weight."""
        return [self.get_parameter(name) for name in self._packed]

    def stored_tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """The tensors that a packed checkpoint stores for the layer, by name: the packed weight and the bias."""
        names = [*self._packed, *(["bias"] if self.bias is not None else [])]
        return {prefix + name: _to_stored_shape(name, self.get_parameter(name).detach()) for name in names}

    def get_extra_state(self) -> Tensor:
        """The format and its levels as JSON in a uint8 tensor, which any file of tensors can hold."""
        text = json.dumps(self._identity() | {"levels": self.table})
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Raises ValueError if the state is of another format, block size or scale storage."""
        if why := self._find_mismatch(state):
            raise ValueError(why)

    def _identity(self) -> dict[str, Any]:
        """What a state and the layer that loads it must have in common."""
        return {
            "format": self.format,
            "bits": self.bits,
            "block": self.block,
            "shape": [*self._shape],
            "scale": [dtype_name(self._dtypes[name]) for name in self._scale],
            "shifted": bool(self._shift),
        }

    def _find_mismatch(self, state: Tensor) -> str | None:
        """Why an extra state does not fit this layer, in a line; None if it fits.

        If this layer does not know its levels, it takes them from the state.
        """
        try:
            content = json.loads(bytes(state.tolist()))
            identity = {key: content.get(key) for key in self._identity()}
        except (ValueError, AttributeError, TypeError):
            return "the state of a QuantLinear is unreadable; accepted: what `state_dict` gives"
        if identity != self._identity():
            return f"the state is of {_describe(identity)}; accepted: {_describe(self._identity())}"
        levels = content.get("levels")
        if self.table is None:
            self.table = levels and tuple(levels)
        elif levels is not None and tuple(levels) != self.table:
            return f"the state has other levels than {_describe(self._identity())}; accepted: the same"
        return None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        sharded = hasattr(self.codes, "device_mesh")  # accelerate then expects every entry of a state to be sharded
        if not self.identified or sharded:
            destination.pop(f"{prefix}_extra_state", None)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        key = f"{prefix}_extra_state"
        why = self._find_mismatch(state_dict[key]) if key in state_dict else None
        state = {k: v for k, v in state_dict.items() if k != key}
        for name in self._packed if not why else ():
            tensor, own = state.get(prefix + name), self.get_parameter(name)
            if tensor is None:
                continue
            if tensor.shape == torch.Size():  # a checkpoint stores an offset as a scalar
                state[prefix + name] = tensor = tensor.reshape(1)
            if (tensor.dtype, tensor.shape) != (own.dtype, own.shape):
                given, wanted = (f"{dtype_name(t.dtype)} {list(t.shape)}" for t in (tensor, own))
                why = f"{name} is {given}; accepted: {wanted}, of {_describe(self._identity())}"
                break
        if why:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {why}")
            return
        super()._load_from_state_dict(state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if key in missing_keys:  # a packed checkpoint names the format once, in its config.json
            missing_keys.remove(key)
        if not self.own_levels and self.levels is not None:
            self._move_levels(self.codes.device)

    def _checked_tensors(self, names: list[str]) -> list[Tensor]:
        """The named tensors in the shapes that formats expect. Raises TypeError if something has cast one of them."""
        tensors = [_to_stored_shape(name, getattr(self, name)) for name in names]
        for name, tensor in zip(names, tensors, strict=True):
            if tensor.dtype != (dtype := self._dtypes[name]):  # some frameworks cast all parameters of a model
                raise TypeError(f"{name} of a packed weight has been cast to {tensor.dtype}; accepted: {dtype}")
        return tensors

    @property
    def _shape(self) -> torch.Size:
        return torch.Size((self.out_features, self.in_features))

    @property
    def weight(self) -> Tensor:
        """W [out_features, in_features], dequantized anew each time; read only."""
        w = self.packed.dequantize()
        return w if torch.compiler.is_compiling() else w.as_subclass(Dequantized)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        _refuse_write()

    @property
    def packed(self) -> QuantizedTensor:
        """The weight as a QuantizedTensor. It shares its tensors with this layer."""
        return QuantizedTensor(
            format=self.format,
            bits=self.bits,
            block=self.block,
            shape=self._shape,
            dtype=self.dtype,
            codes=self.codes.detach(),
            levels=None if self.levels is None else self._levels().detach(),
            scale=tuple(tensor.detach() for tensor in self._checked_tensors(self._scale)),
            shift=tuple(tensor.detach() for tensor in self._checked_tensors(self._shift)),
            own_levels=self.own_levels,
        )

    def _levels(self) -> Tensor:
        """The levels, on the device of the codes: hooks of other libraries move only parameters."""
        assert self.levels is not None
        if not self.own_levels and self.levels.device != self.codes.device:
            self._move_levels(self.codes.device)
        return self.levels

    def forward(self, x: Tensor) -> Tensor:
        if self.levels is None:  # 16 bit: the codes are the weight
            y = nn.functional.linear(x, self.codes.to(x.dtype))
        else:
            y = torch.ops.qbench.linear(
                x,
                self.codes,
                self._levels(),
                self._checked_tensors(self._scale),
                self._checked_tensors(self._shift),
                self.bits,
                self.block,
                self.out_features,
                self.in_features,
            )
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format}, block={self.block}, dq={self.dq}"


def _to_stored_shape(name: str, tensor: Tensor) -> Tensor:
    """A tensor of a packed weight in the shape that files and formats use: the offset of scales is a scalar."""
    return tensor.reshape(()) if name.endswith("_offset") else tensor


def _names_of_scales(name: str, stored: tuple[Tensor, ...]) -> list[str]:
    return [name, f"{name}_absmax", f"{name}_offset"][: len(stored)]


def _shared_levels(weight: QuantizedTensor) -> tuple[float, ...] | None:
    """The levels as numbers, if all tensors of the format share them; otherwise None.

    Levels on the meta device have no values, so they are taken from `formats.get`.
    """
    levels = weight.levels
    if weight.own_levels or levels is None:
        return None
    if levels.is_meta or is_fake(levels):
        try:
            fmt = formats.get(weight.format, block=weight.block, dq=len(weight.scale) == 3)
        except (KeyError, TypeError, ValueError):
            return None
        levels = fmt.empty(torch.Size([0]), torch.float32, "cpu").levels
    return None if levels is None else tuple(levels.tolist())


def _describe(identity: Mapping[str, Any]) -> str:
    dtypes = identity["scale"] or ["no"]
    scales = "double-quantized" if len(dtypes) == 3 else dtypes[0]
    return f"{identity['format']} of {identity['shape']}, block {identity['block']}, {scales} scales"
