"""Checkpoints of bitsandbytes in 4 bits, as `save_pretrained` of transformers writes them; bitsandbytes is not needed.

Of a packed layer L, with the bits of a `QuantLinear`:

    L.weight                                    codes, as [bytes, 1] of the dtype bnb_4bit_quant_storage
    L.weight.absmax                             scales, fp32, or uint8 where they are nested: double quantized
    L.weight.quant_map                          levels, fp32 [16]
    L.weight.nested_absmax, .nested_quant_map   fp32; the second is the dynamic map
    L.weight.quant_state.bitsandbytes__nf4      or __fp4: bytes of JSON with quant_type, blocksize, dtype and shape of the
                                                weight, and nested_blocksize, nested_dtype, nested_offset

Which layers are packed is told by these names: what llm_int8_skip_modules, or a default, left out is read as it is.
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
from qbench.checkpoint.recipe import CONFIG, KEY, word
from qbench.checkpoint.safetensors_io import Contents, Spec
from qbench.errors import InputError
from qbench.model.quant_linear import QuantLinear
from qbench.model.selection import Coverage, replaceable, weight_of

from .base import Foreign, Held

METHOD = "bitsandbytes"
TYPES = ("nf4", "fp4")
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_DTYPES = {word(dtype): dtype for dtype in (torch.bfloat16, torch.float16, torch.float32)}
_PART = re.compile(r"(.+)\.weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)")
_SAME = 1e-6  # within which bitsandbytes takes two tables for the same
_LONGEST = 4096  # bytes of the JSON of a layer, which takes some 200
_WIDEST = -1.1754943508222875e-38  # no fp32 number is longer in JSON


@dataclass(frozen=True)
class State:
    """What the JSON of a layer tells. offset: of its nested scales; None where there are none."""

    format: Format
    dtype: torch.dtype
    shape: torch.Size
    offset: float | None

    def plain(self) -> dict:
        told = {"quant_type": self.format.name, "blocksize": self.format.block, "dtype": word(self.dtype)}
        told["shape"] = list(self.shape)
        if self.offset is None:
            return told
        return told | {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": self.offset}

    @classmethod
    def read(cls, text: bytes) -> "State":
        """Raises InputError."""
        try:
            told = json.loads(text.decode())
        except ValueError as error:
            raise InputError("is not JSON; accepted: what bitsandbytes writes") from error
        if not isinstance(told, dict):
            raise InputError(f"{told!r} is not accepted; an object is")
        one_of = {"quant_type": TYPES, "blocksize": BLOCKS, "dtype": tuple(_DTYPES)}
        nested = "nested_offset" in told
        if nested:
            one_of |= {"nested_blocksize": (NESTED_BLOCK,), "nested_dtype": ("float32",)}
        for key, accepted in one_of.items():
            if not isinstance(told.get(key), str | int) or told[key] not in accepted:
                raise InputError(f"{key}: {told.get(key)!r} is not accepted; {', '.join(map(str, accepted))} is")
        if nested and not (type(told["nested_offset"]) is float and math.isfinite(told["nested_offset"])):
            raise InputError(f"nested_offset: {told['nested_offset']!r} is not accepted; a finite number is")
        fmt = formats.get(told["quant_type"], block=told["blocksize"], dq=nested)
        shape = told.get("shape")
        if not (isinstance(shape, list) and all(type(size) is int for size in shape)):
            raise InputError(f"shape: {shape!r} is not accepted; a list of sizes is")
        found = cls(fmt, _DTYPES[told["dtype"]], torch.Size(shape), told.get("nested_offset"))
        if unknown := sorted(told.keys() - found.plain().keys()):
            raise InputError(f"{unknown[0]} is unknown; accepted: {', '.join(found.plain())}")
        return found


def state_key(layer: str, kind: str) -> str:
    return f"{layer}.weight.quant_state.bitsandbytes__{kind}"


def parts(layer: str, q: QuantizedTensor) -> dict[str, Tensor]:
    """The tensors of a packed layer, but for its state and its bias."""
    assert q.levels is not None  # of nf4 and fp4
    found = {"weight": q.codes.unsqueeze(1), "weight.absmax": q.scale[0], "weight.quant_map": q.levels.clone()}
    if len(q.scale) == 3:  # tables are copies, as files of tensors take none that are shared
        found |= {"weight.nested_absmax": q.scale[1], "weight.nested_quant_map": dynamic_map(q.device).clone()}
    return {f"{layer}.{key}": tensor for key, tensor in found.items()}


def places(layer: str, fmt: Format) -> dict[str, str]:
    """Where each tensor of a QuantLinear is found."""
    found = {"codes": f"{layer}.weight", "scale": f"{layer}.weight.absmax"}
    nested = {"scale_absmax": f"{layer}.weight.nested_absmax", "scale_offset": state_key(layer, fmt.name)}
    return found | (nested if fmt.dq else {})


@dataclass(frozen=True)
class Recipe(recipe.Recipe):
    """config: the quantization_config."""

    _imports: ClassVar[str] = "# bitsandbytes has to be installed\n"

    config: dict = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        arguments: dict,
        dtypes: dict[str, torch.dtype],
        model: PreTrainedModel | None = None,
        coverage: Coverage | None = None,
    ) -> "Recipe":
        base = recipe.Recipe.of(arguments, dtypes)
        fmt = base.format
        if fmt.name not in TYPES or fmt.block not in BLOCKS:
            accepted = f"{' or '.join(TYPES)}, block {', '.join(map(str, BLOCKS))}"
            raise InputError(f"layout: bitsandbytes does not keep {fmt!r}; accepted: {accepted}")
        for name, dtype in dtypes.items():
            if dtype not in _DTYPES.values():
                raise InputError(f"layout: {name} is {word(dtype)}; bitsandbytes accepts {', '.join(_DTYPES)}")
        before = getattr(model.config, KEY, None) if model else None
        before = before.to_dict() if isinstance(before, QuantizationConfigMixin) else before
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=base.dtype).to_dict()
        config |= before if is_one(before) else {}
        config |= {"bnb_4bit_quant_type": fmt.name, "bnb_4bit_use_double_quant": fmt.dq}
        config["llm_int8_skip_modules"] = _skipped(model) if model else None
        return cls(arguments, base.dtype, base.others, config=config)

    def plain(self) -> dict:
        return self.config

    def layers(self, model: PreTrainedModel) -> dict[str, tuple[Format, torch.dtype]]:
        skipped = self.config["llm_int8_skip_modules"]
        if skipped is None:
            return super().layers(model)
        names = [name for name, module in model.named_modules() if replaceable(module) and name not in skipped]
        return {name: (self.format, self.dtype_of(name)) for name in names}

    def tensors(self, name: str, layer: QuantLinear, fixed: bool = False) -> dict[str, Tensor]:
        q = layer.packed
        kept = parts(name, q) | {state_key(name, q.format): self._text(q, fixed)}
        kept[f"{name}.weight"] = q.codes.view(getattr(torch, self.config["bnb_4bit_quant_storage"])).unsqueeze(1)
        return kept | ({} if layer.bias is None else {f"{name}.bias": layer.bias})

    def _text(self, q: QuantizedTensor, fixed: bool) -> Tensor:
        """The JSON of a weight as bytes; `fixed`, with blanks after it up to the longest that it can be."""
        offset = (0.0 if q.codes.is_meta else q.scale[2].item()) if self.format.dq else None
        plain = State(self.format, q.dtype, q.shape, offset).plain()
        width = len(json.dumps(plain | {"nested_offset": _WIDEST})) if fixed and self.format.dq else 0
        text = torch.frombuffer(bytearray(json.dumps(plain).ljust(width).encode()), dtype=torch.uint8)
        return text.to(q.device)


def _skipped(model: PreTrainedModel) -> list[str] | None:
    """The linear layers that are not packed; None where that is the output head alone, as by default."""
    names = [name for name, module in model.named_modules() if replaceable(module)]
    head = model.get_output_embeddings()
    usual = not isinstance(head, QuantLinear) and all(model.get_submodule(name) is head for name in names)
    return None if usual else names


def is_one(plain: object) -> TypeGuard[dict[str, Any]]:
    """Whether the quantization_config of a model is bitsandbytes'; old ones do not say whose they are."""
    old = isinstance(plain, dict) and "quant_method" not in plain and plain.keys() & {"load_in_4bit", "load_in_8bit"}
    return bool(old) or (isinstance(plain, dict) and plain.get("quant_method") == METHOD)


def find(folder: Path) -> dict | None:
    """The quantization_config of a checkpoint of bitsandbytes, None for another. Raises InputError."""
    plain = recipe.plain_config(folder).get(KEY)
    if not is_one(plain):
        return None
    where, kind = f"{folder / CONFIG}: {KEY}", plain.get("bnb_4bit_quant_type", "fp4")
    if plain.get("load_in_8bit"):
        raise InputError(f"{where}: load_in_8bit, which is LLM.int8, is not supported; accepted: load_in_4bit")
    if kind not in TYPES:
        raise InputError(f"{where}: bnb_4bit_quant_type: {kind!r} is unknown; accepted: {', '.join(TYPES)}")
    return plain


class Folder(Foreign):
    recipe = Recipe

    def __str__(self) -> str:
        plain = find(self.path)
        assert plain is not None
        nested = " with double quantization" if plain.get("bnb_4bit_use_double_quant") else ""
        return f"{plain.get('bnb_4bit_quant_type', 'fp4')} by bitsandbytes{nested}"

    def hold(self, model: PreTrainedModel) -> Held:
        found = safetensors_io.contents(self.path)
        files = {key: file for file, specs in found.items() for key in specs}
        rename, modules = tensor_names.renaming(model), dict(model.named_modules())
        states: dict[str, State] = {}
        specs = safetensors_io.merged(found)
        called: dict[str, str] = {}
        contents: Contents = {file: {} for file in found}
        rest = dict(files)
        for layer in sorted({match[1] for match in map(_PART.fullmatch, files) if match}):
            name = rename(f"{layer}.weight", self.path).removesuffix(".weight")
            if name not in modules or not replaceable(modules[name]):
                raise InputError(f"{self.path}: {layer} is no linear layer of a {type(model).__name__}")
            state = states[name] = self._state(layer, files, specs, weight_of(modules[name]).shape)
            empty = state.format.empty(state.shape, state.dtype, "cpu")
            self._check(state, parts(layer, empty), found, files)
            for key in (*parts(layer, empty), state_key(layer, state.format.name)):
                del rest[key]
            stored = QuantLinear(empty).stored()
            for part, key in places(layer, state.format).items():
                contents[files[key]][f"{name}.{part}"] = Spec.of(stored[part])
                called[f"{name}.{part}"] = key
        if not states:
            raise InputError(
                f"{self.path} holds no 4-bit weight; accepted: what save_pretrained wrote of a 4-bit model"
            )
        for key, file in rest.items():
            contents[file][rename(key, file)] = found[file][key]
            called[rename(key, file)] = key

        def read(file: Path, name: str) -> Tensor:
            layer, _, part = name.rpartition(".")
            if layer in states and part == "scale_offset":
                return torch.tensor(states[layer].offset, dtype=torch.float32)
            tensor = safetensors_io.read(file, called[name])
            return tensor.view(torch.uint8).reshape(-1) if layer in states and part == "codes" else tensor

        return Held({name: (state.format, state.dtype) for name, state in states.items()}, contents, read, called)

    def _state(self, layer: str, files: dict[str, Path], specs: dict[str, Spec], shape: torch.Size) -> State:
        found = [key for key in files if key.startswith(f"{layer}.weight.quant_state.")]
        accepted = [state_key(layer, kind) for kind in TYPES]
        if not found:
            raise InputError(f"{self.path}: {accepted[0]} is missing")
        if len(found) > 1 or found[0] not in accepted:
            raise InputError(f"{self.path}: {' and '.join(found)}: not accepted; one of {', '.join(accepted)} is")
        where = f"{files[found[0]]}: {found[0]}"
        if (size := specs[found[0]].nbytes) > _LONGEST:
            raise InputError(f"{where}: {size} bytes are not accepted; up to {_LONGEST} are")
        try:
            state = State.read(bytes(safetensors_io.read(files[found[0]], found[0]).tolist()))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if found[0] != state_key(layer, state.format.name):
            raise InputError(f"{where}: quant_type: {state.format.name!r} is not what its key says")
        if state.shape != shape:
            raise InputError(f"{where}: shape: {list(state.shape)} is not accepted; {list(shape)} is")
        return state

    def _check(self, state: State, accepted: dict[str, Tensor], contents: Contents, files: dict[str, Path]) -> None:
        """Hold the tensors of a layer against what they have to be."""
        for key, tensor in accepted.items():
            if key not in files:
                raise InputError(f"{self.path}: {key} is missing")
            file, spec = files[key], Spec.of(tensor)
            found = contents[file][key]
            bytes_alone = key.endswith(".weight")  # of whatever dtype they are
            if found.nbytes != spec.nbytes if bytes_alone else found != spec:
                raise InputError(f"{file}: {key} is {found}; accepted: {spec}")
            if key.endswith("quant_map") and not torch.allclose(
                safetensors_io.read(file, key), tensor, rtol=0, atol=_SAME
            ):
                raise InputError(f"{file}: {key} is not the table of {state.format.name}; accepted: no other")
