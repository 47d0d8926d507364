"""Reads and writes the 4-bit checkpoints of bitsandbytes, as transformers saves them. bitsandbytes need not be installed.

The tensors of a packed layer L have the same bits as those of a `QuantLinear`:

    L.weight                                    codes, as [bytes, 1] of the dtype bnb_4bit_quant_storage
    L.weight.absmax                             scales, fp32, or uint8 if they are nested, that is, double quantized
    L.weight.quant_map                          levels, fp32 [16]
    L.weight.nested_absmax, .nested_quant_map   fp32; the second is the dynamic map
    L.weight.quant_state.bitsandbytes__nf4      or __fp4: bytes of JSON with quant_type, blocksize, dtype and shape of the
                                                weight, and nested_blocksize, nested_dtype, nested_offset

These names show which layers are packed. Layers that llm_int8_skip_modules or a default left out are read unchanged.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils.quantization_config import QuantizationConfigMixin

import formats
from formats import Format, QuantizedTensor
from formats.scales import NESTED_BLOCK, dynamic_map
from qbench.checkpoint import recipe, safetensors_io, tensor_names
from qbench.checkpoint.recipe import CONFIG, KEY
from qbench.checkpoint.safetensors_io import Contents, TensorSpec
from qbench.errors import InputError
from qbench.model.devices import dtype_name
from qbench.model.quant_linear import QuantLinear
from qbench.model.selection import Coverage, is_replaceable, weight_of

from .base import ForeignCheckpoint, ForeignTensors

METHOD = "bitsandbytes"
TYPES = ("nf4", "fp4")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = {dtype_name(dtype): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
_PART_KEY = re.compile(r"(.+)\.weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)")
_TABLE_TOLERANCE = 1e-6  # bitsandbytes treats tables that are closer as equal
_MAX_JSON_BYTES = 4096  # for a layer; about 200 are used
_LONGEST_FLOAT = -1.1754943508222875e-38  # an fp32 number that takes the most characters in JSON


@dataclass(frozen=True)
class QuantState:
    """The quant_state of a weight, stored as JSON. offset: of nested scales; None if scales are not nested."""

    format: Format
    dtype: torch.dtype
    shape: torch.Size
    offset: float | None

    def to_json(self) -> dict:
        content = {
            "quant_type": self.format.name,
            "blocksize": self.format.block,
            "dtype": dtype_name(self.dtype),
            "shape": list(self.shape),
        }
        if self.offset is None:
            return content
        return content | {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": self.offset}

    @classmethod
    def from_json(cls, text: bytes) -> "QuantState":
        """The state in these bytes of JSON. Raises InputError if it is not valid."""
        try:
            content = json.loads(text.decode())
        except ValueError as error:
            raise InputError("is not JSON; accepted: what bitsandbytes writes") from error
        if not isinstance(content, dict):
            raise InputError(f"{content!r} is not accepted; an object is")
        accepted_values = {"quant_type": TYPES, "blocksize": BLOCKS, "dtype": tuple(_DTYPES)}
        nested = "nested_offset" in content
        if nested:
            accepted_values |= {"nested_blocksize": (NESTED_BLOCK,), "nested_dtype": ("float32",)}
        for key, accepted in accepted_values.items():
            if not isinstance(content.get(key), str | int) or content[key] not in accepted:
                raise InputError(f"{key}: {content.get(key)!r} is not accepted; {', '.join(map(str, accepted))} is")
        if nested and not (type(content["nested_offset"]) is float and math.isfinite(content["nested_offset"])):
            raise InputError(f"nested_offset: {content['nested_offset']!r} is not accepted; a finite number is")
        fmt = formats.get(content["quant_type"], block=content["blocksize"], dq=nested)
        shape = content.get("shape")
        if not (isinstance(shape, list) and all(type(size) is int for size in shape)):
            raise InputError(f"shape: {shape!r} is not accepted; a list of sizes is")
        state = cls(fmt, _DTYPES[content["dtype"]], torch.Size(shape), content.get("nested_offset"))
        if unknown := sorted(content.keys() - state.to_json().keys()):
            raise InputError(f"{unknown[0]} is unknown; accepted: {', '.join(state.to_json())}")
        return state


def state_key(layer: str, kind: str) -> str:
    """The name of the quant_state of a layer; kind: one of TYPES."""
    return f"{layer}.weight.quant_state.bitsandbytes__{kind}"


def weight_tensors(layer: str, q: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of a packed layer by name, without its state and its bias."""
    assert q.levels is not None  # nf4 and fp4 have levels
    tensors = {"weight": q.codes.unsqueeze(1), "weight.absmax": q.scale[0], "weight.quant_map": q.levels.clone()}
    if len(q.scale) == 3:  # tables are copied: safetensors refuses shared tensors
        tensors |= {"weight.nested_absmax": q.scale[1], "weight.nested_quant_map": dynamic_map(q.device).clone()}
    return {f"{layer}.{key}": tensor for key, tensor in tensors.items()}


def source_keys(layer: str, fmt: Format) -> dict[str, str]:
    """For each tensor of a QuantLinear, the name of the tensor in the file that holds it."""
    keys = {"codes": f"{layer}.weight", "scale": f"{layer}.weight.absmax"}
    nested = {"scale_absmax": f"{layer}.weight.nested_absmax", "scale_offset": state_key(layer, fmt.name)}
    return keys | (nested if fmt.dq else {})


@dataclass(frozen=True)
class BitsAndBytesRecipe(recipe.Recipe):
    """The layout of bitsandbytes. config: the quantization_config."""

    _imports: ClassVar[str] = "# bitsandbytes has to be installed\n"

    config: dict = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        arguments: dict,
        dtypes: dict[str, torch.dtype],
        model: PreTrainedModel | None = None,
        coverage: Coverage | None = None,
    ) -> "BitsAndBytesRecipe":
        base = recipe.Recipe.of(arguments, dtypes)
        fmt = base.format
        if fmt.name not in TYPES or fmt.block not in BLOCKS:
            accepted = f"{' or '.join(TYPES)}, block {', '.join(map(str, BLOCKS))}"
            raise InputError(f"layout: bitsandbytes does not store {fmt!r}; accepted: {accepted}")
        for name, dtype in dtypes.items():
            if dtype not in _DTYPES.values():
                raise InputError(f"layout: {name} is {dtype_name(dtype)}; bitsandbytes accepts {', '.join(_DTYPES)}")
        before = getattr(model.config, KEY, None) if model else None
        before = before.to_dict() if isinstance(before, QuantizationConfigMixin) else before
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=base.dtype).to_dict()
        config |= before if is_bitsandbytes(before) else {}
        config |= {"bnb_4bit_quant_type": fmt.name, "bnb_4bit_use_double_quant": fmt.dq}
        config["llm_int8_skip_modules"] = _modules_to_skip(model) if model else None
        return cls(arguments, base.dtype, base.other_dtypes, config=config)

    def to_json(self) -> dict:
        return self.config

    def layers(self, model: PreTrainedModel) -> dict[str, tuple[Format, torch.dtype]]:
        skipped = self.config["llm_int8_skip_modules"]
        if skipped is None:
            return super().layers(model)
        names = [name for name, module in model.named_modules() if is_replaceable(module) and name not in skipped]
        return {name: (self.format, self.dtype_of(name)) for name in names}

    def tensors_of(self, name: str, layer: QuantLinear, fixed: bool = False) -> dict[str, Tensor]:
        q = layer.packed
        tensors = weight_tensors(name, q) | {state_key(name, q.format): self._state_bytes(q, fixed)}
        tensors[f"{name}.weight"] = q.codes.view(getattr(torch, self.config["bnb_4bit_quant_storage"])).unsqueeze(1)
        return tensors | ({} if layer.bias is None else {f"{name}.bias": layer.bias})

    def _state_bytes(self, q: QuantizedTensor, fixed: bool) -> Tensor:
        """The JSON of a weight as bytes. fixed: pad it with blanks to the greatest length that it can have."""
        offset = (0.0 if q.codes.is_meta else q.scale[2].item()) if self.format.dq else None
        content = QuantState(self.format, q.dtype, q.shape, offset).to_json()
        width = len(json.dumps(content | {"nested_offset": _LONGEST_FLOAT})) if fixed and self.format.dq else 0
        text = torch.frombuffer(bytearray(json.dumps(content).ljust(width).encode()), dtype=torch.uint8)
        return text.to(q.device)


def _modules_to_skip(model: PreTrainedModel) -> list[str] | None:
    """The linear layers that are not packed; None if that is only the output head, which is the default."""
    names = [name for name, module in model.named_modules() if is_replaceable(module)]
    head = model.get_output_embeddings()
    usual = not isinstance(head, QuantLinear) and all(model.get_submodule(name) is head for name in names)
    return None if usual else names


def is_bitsandbytes(content: object) -> TypeGuard[dict[str, Any]]:
    """Whether the quantization_config of a model is that of bitsandbytes. Old ones have no quant_method."""
    if not isinstance(content, dict):
        return False
    old = "quant_method" not in content and content.keys() & {"load_in_4bit", "load_in_8bit"}
    return bool(old) or content.get("quant_method") == METHOD


def find_config(folder: Path) -> dict | None:
    """The quantization_config of a checkpoint of bitsandbytes; None for any other checkpoint. Raises InputError."""
    content = recipe.read_config(folder).get(KEY)
    if not is_bitsandbytes(content):
        return None
    where, kind = f"{folder / CONFIG}: {KEY}", content.get("bnb_4bit_quant_type", "fp4")
    if content.get("load_in_8bit"):
        raise InputError(f"{where}: load_in_8bit, which is LLM.int8, is not supported; accepted: load_in_4bit")
    if kind not in TYPES:
        raise InputError(f"{where}: bnb_4bit_quant_type: {kind!r} is unknown; accepted: {', '.join(TYPES)}")
    return content


class BitsAndBytesFolder(ForeignCheckpoint):
    """A folder that transformers saved with bitsandbytes in 4 bits."""

    recipe = BitsAndBytesRecipe

    def __str__(self) -> str:
        content = find_config(self.path)
        assert content is not None
        nested = " with double quantization" if content.get("bnb_4bit_use_double_quant") else ""
        return f"{content.get('bnb_4bit_quant_type', 'fp4')} by bitsandbytes{nested}"

    def map_tensors(self, model: PreTrainedModel) -> ForeignTensors:
        in_files = safetensors_io.read_contents(self.path)
        file_of = {key: file for file, specs in in_files.items() for key in specs}
        rename, modules = tensor_names.make_renamer(model), dict(model.named_modules())
        states: dict[str, QuantState] = {}
        specs = safetensors_io.merge_specs(in_files)
        keys: dict[str, str] = {}  # names in the files, by names in the model
        contents: Contents = {file: {} for file in in_files}
        rest = dict(file_of)
        for layer in sorted({match[1] for match in map(_PART_KEY.fullmatch, file_of) if match}):
            name = rename(f"{layer}.weight", self.path).removesuffix(".weight")
            if name not in modules or not is_replaceable(modules[name]):
                raise InputError(f"{self.path}: {layer} is no linear layer of a {type(model).__name__}")
            state = states[name] = self._read_state(layer, file_of, specs, weight_of(modules[name]).shape)
            empty = state.format.empty(state.shape, state.dtype, "cpu")
            self._check_weight(state, weight_tensors(layer, empty), specs, file_of)
            for key in (*weight_tensors(layer, empty), state_key(layer, state.format.name)):
                del rest[key]
            stored = QuantLinear(empty).stored_tensors()
            for part, key in source_keys(layer, state.format).items():
                contents[file_of[key]][f"{name}.{part}"] = TensorSpec.of(stored[part])
                keys[f"{name}.{part}"] = key
        if not states:
            raise InputError(
                f"{self.path} holds no 4-bit weight; accepted: what save_pretrained wrote of a 4-bit model"
            )
        for key, file in rest.items():  # tensors of no packed layer
            contents[file][rename(key, file)] = specs[key]
            keys[rename(key, file)] = key

        def read(file: Path, name: str) -> Tensor:
            layer, _, part = name.rpartition(".")
            if layer in states and part == "scale_offset":
                return torch.tensor(states[layer].offset, dtype=torch.float32)
            tensor = safetensors_io.read(file, keys[name])
            return tensor.view(torch.uint8).reshape(-1) if layer in states and part == "codes" else tensor

        layers = {name: (state.format, state.dtype) for name, state in states.items()}
        return ForeignTensors(layers, contents, read, keys)

    def _read_state(
        self, layer: str, file_of: dict[str, Path], specs: dict[str, TensorSpec], shape: torch.Size
    ) -> QuantState:
        """The state of a layer whose weight has this shape. Raises InputError if it is missing or not valid."""
        keys = [key for key in file_of if key.startswith(f"{layer}.weight.quant_state.")]
        accepted = [state_key(layer, kind) for kind in TYPES]
        if not keys:
            raise InputError(f"{self.path}: {accepted[0]} is missing")
        if len(keys) > 1 or keys[0] not in accepted:
            raise InputError(f"{self.path}: {' and '.join(keys)}: not accepted; one of {', '.join(accepted)} is")
        (key,) = keys
        where = f"{file_of[key]}: {key}"
        if (size := specs[key].nbytes) > _MAX_JSON_BYTES:
            raise InputError(f"{where}: {size} bytes are not accepted; up to {_MAX_JSON_BYTES} are")
        try:
            state = QuantState.from_json(bytes(safetensors_io.read(file_of[key], key).tolist()))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if key != state_key(layer, state.format.name):
            raise InputError(f"{where}: quant_type: {state.format.name!r} is not what its key says")
        if state.shape != shape:
            raise InputError(f"{where}: shape: {list(state.shape)} is not accepted; {list(shape)} is")
        return state

    def _check_weight(
        self, state: QuantState, expected: dict[str, Tensor], specs: dict[str, TensorSpec], file_of: dict[str, Path]
    ) -> None:
        """Raises InputError if the tensors of a weight are not those expected, by name, or have another table."""
        for key, tensor in expected.items():
            if key not in file_of:
                raise InputError(f"{self.path}: {key} is missing")
            file, spec, accepted = file_of[key], specs[key], TensorSpec.of(tensor)
            any_dtype = key.endswith(".weight")  # only the bytes count
            if spec.nbytes != accepted.nbytes if any_dtype else spec != accepted:
                raise InputError(f"{file}: {key} is {spec}; accepted: {accepted}")
            is_table = key.endswith("quant_map")
            if is_table and not torch.allclose(safetensors_io.read(file, key), tensor, rtol=0, atol=_TABLE_TOLERANCE):
                raise InputError(f"{file}: {key} is not the table of {state.format.name}; accepted: no other")
