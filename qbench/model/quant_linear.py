"""QuantLinear, the layer that holds a packed weight, and what keeps that weight from being changed by accident."""

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

_HARMLESS = {"requires_grad_", "share_memory_", "retain_grad_"}  #: look like a change in place and are none


class PackedParameter(nn.Parameter):
    """A frozen tensor of a packed weight.

    It is a parameter, so that DistributedDataParallel sends it once, FSDP shards it and PEFT counts it; but it cannot be
    trained, and a cast leaves its dtype alone: a scale that is rounded to bf16 would be another weight.
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
                raise TypeError(f"a packed tensor of {self.dtype} cannot take up values of {value.dtype}")
            value = own
        nn.Parameter.data.__set__(self, value)  # type: ignore[attr-defined]  # a descriptor of C


class Dequantized(Tensor):
    """A weight computed from a packed one. It is read like any tensor; a write raises TypeError, as it would be lost.

    What shares its memory, such as a view or `data`, is guarded alike.
    """

    _is_hf_initialized = True  # to transformers, which would draw random numbers for it

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        written = [kwargs.get("out"), *((args[:1] or kwargs.values()) if _in_place(func) else ())]
        if any(isinstance(tensor, Dequantized) for tensor in tree_iter(written)):
            _refuse_write()
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            memory = {_memory(tensor) for tensor in tree_iter(args) if isinstance(tensor, Dequantized)}
            return tree_map_only(Tensor, lambda t: t.as_subclass(Dequantized) if _memory(t) in memory else t, result)


def _refuse_write(*_: Any) -> NoReturn:
    raise TypeError(
        "a packed weight cannot take up a change; qbench.training.merging.merged unpacks a model and merges adapters"
    )


for _operator in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"):
    setattr(Dequantized, f"__i{_operator}__", _refuse_write)  # Tensor's own would turn the TypeError into `w = w + 1`


def _in_place(func: Any) -> bool:
    """Whether a function of tensors writes to its first argument, by PyTorch's rule for names."""
    name = getattr(func, "__name__", "")
    if name == "__set__":
        return getattr(func, "__self__", None) is Tensor.data
    return name == "__setitem__" or (name[-1:] == "_" and name[-2:] != "__" and name not in _HARMLESS)


def _memory(tensor: Tensor) -> int:
    """What tells the memory of a tensor from that of others; one without a storage, such as a sparse one, has its own."""
    return tensor.untyped_storage()._cdata if torch._C._has_storage(tensor) else id(tensor)


class QuantLinear(nn.Linear):
    """y = x·Wᵀ + b, with W [out_features, in_features] in a format.

    It is a Linear to all who look for one, such as PEFT. The packed weight is frozen parameters: `codes`, `scale`, with
    double quantization `scale_absmax` and `scale_offset`, the same of `shift`, and `levels` where the tensor has a table
    of its own. The backward gives the gradient for x alone. The product runs in the dtype of x, under autocast in that of
    autocast. Moving the layer to another dtype leaves the packed weight as it is.

    A state dict also says what format it is of; one of another format, block size or scale storage is refused.
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
        self.identified = True  #: whether its state dict says what format it is of
        self._scale, self._shift = _names("scale", weight.scale), _names("shift", weight.shift)
        self._packed = ["codes", *self._scale, *self._shift, *(["levels"] if weight.own_levels else [])]
        self.table = aside(_table, weight)  #: the levels of a format that has the same for all, as numbers
        self.codes = PackedParameter(weight.codes)
        for name, tensor in zip(self._scale + self._shift, weight.scale + weight.shift, strict=True):
            self.register_parameter(name, PackedParameter(tensor.reshape(tensor.shape or 1)))  # FSDP shards no scalar
        self._dtypes = {name: self.get_parameter(name).dtype for name in self._packed if name != "levels"}
        # the same for every tensor of the format, hence no state: neither sent, nor sharded, nor kept
        self.levels = PackedParameter(weight.levels) if self.own_levels and weight.levels is not None else weight.levels
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Whoever puts a tensor in its place, such as `from_pretrained`: it is frozen."""
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
        """Have the levels of the format on a device; from the meta device they come as numbers."""
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
        """Weights that it stands for."""
        return self.out_features * self.in_features

    def packed_parameters(self) -> list[nn.Parameter]:
        """The parameters that the packed weight is."""
        return [self.get_parameter(name) for name in self._packed]

    def stored(self, prefix: str = "") -> dict[str, Tensor]:
        """What a packed checkpoint keeps of the layer, by name: the packed weight, as `packed` has it, and the bias."""
        names = [*self._packed, *(["bias"] if self.bias is not None else [])]
        return {prefix + name: _as_stored(name, self.get_parameter(name).detach()) for name in names}

    def get_extra_state(self) -> Tensor:
        """What format the state is of, and its levels, as bytes of JSON: a tensor, so that any file can hold it."""
        text = json.dumps(self._identity() | {"levels": self.table})
        return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).clone()

    def set_extra_state(self, state: Tensor) -> None:
        """Raises ValueError for what is of another format, block size or scale storage."""
        if why := self._mismatch(state):
            raise ValueError(why)

    def _identity(self) -> dict[str, Any]:
        stored = (str(self._dtypes[name]).removeprefix("torch.") for name in self._scale)
        known = {"format": self.format, "bits": self.bits, "block": self.block, "shape": [*self._shape]}
        return known | {"scale": [*stored], "shifted": bool(self._shift)}

    def _mismatch(self, state: Tensor) -> str | None:
        """Why a state is not one of this layer, in a line. Takes its levels, where this layer does not know them."""
        try:
            told = json.loads(bytes(state.tolist()))
            other = {key: told.get(key) for key in self._identity()}
        except (ValueError, AttributeError, TypeError):
            return "the state of a QuantLinear is unreadable; accepted: what `state_dict` gives"
        if other != self._identity():
            return f"the state is of {_words(other)}; accepted: {_words(self._identity())}"
        levels = told.get("levels")
        if self.table is None:
            self.table = levels and tuple(levels)
        elif levels is not None and tuple(levels) != self.table:
            return f"the state has other levels than {_words(self._identity())}; accepted: the same"
        return None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        sharded = hasattr(self.codes, "device_mesh")  # then accelerate expects all of a state to be
        if not self.identified or sharded:
            destination.pop(f"{prefix}_extra_state", None)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        key = f"{prefix}_extra_state"
        why = self._mismatch(state_dict[key]) if key in state_dict else None
        state = {k: v for k, v in state_dict.items() if k != key}
        for name in self._packed if not why else ():
            found, own = state.get(prefix + name), self.get_parameter(name)
            if found is None:
                continue
            if found.shape == torch.Size():  # as a checkpoint keeps it
                state[prefix + name] = found = found.reshape(1)
            if (found.dtype, found.shape) != (own.dtype, own.shape):
                held, wanted = (f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in (found, own))
                why = f"{name} is {held}; accepted: {wanted}, of {_words(self._identity())}"
                break
        if why:
            error_msgs.append(f"{prefix.rstrip('.') or type(self).__name__}: {why}")
            return
        super()._load_from_state_dict(state, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if key in missing_keys:  # a packed checkpoint says it once, in its config.json
            missing_keys.remove(key)
        if not self.own_levels and self.levels is not None:
            self._move_levels(self.codes.device)

    def _stored(self, names: list[str]) -> list[Tensor]:
        found = [_as_stored(name, getattr(self, name)) for name in names]
        for name, tensor in zip(names, found, strict=True):
            if tensor.dtype != self._dtypes[name]:  # as by a framework that casts all parameters as it goes
                kept = self._dtypes[name]
                raise TypeError(f"{name} of a packed weight has been cast to {tensor.dtype}; accepted: {kept}")
        return found

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
        return QuantizedTensor(
            format=self.format,
            bits=self.bits,
            block=self.block,
            shape=self._shape,
            dtype=self.dtype,
            codes=self.codes.detach(),
            levels=None if self.levels is None else self._levels().detach(),
            scale=tuple(tensor.detach() for tensor in self._stored(self._scale)),
            shift=tuple(tensor.detach() for tensor in self._stored(self._shift)),
            own_levels=self.own_levels,
        )

    def _levels(self) -> Tensor:
        """The levels where the codes are: hooks of others move parameters, and know nothing else."""
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


def _as_stored(name: str, tensor: Tensor) -> Tensor:
    """A tensor of a packed weight in the shape in which it is stored: the offset of scales is a scalar."""
    return tensor.reshape(()) if name.endswith("_offset") else tensor


def _names(name: str, stored: tuple[Tensor, ...]) -> list[str]:
    return [name, f"{name}_absmax", f"{name}_offset"][: len(stored)]


def _table(weight: QuantizedTensor) -> tuple[float, ...] | None:
    """The levels of a format that has the same for every tensor; on the meta device those of the format of that name."""
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


def _words(identity: Mapping[str, Any]) -> str:
    stored = identity["scale"] or ["no"]
    scales = "double-quantized" if len(stored) == 3 else stored[0]
    return f"{identity['format']} of {identity['shape']}, block {identity['block']}, {scales} scales"
