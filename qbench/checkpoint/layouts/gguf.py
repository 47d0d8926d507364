"""GGUF files, as llama.cpp writes them, in: tensors bit for bit, and whole models of the architectures below.

    for name, tensor in gguf.tensors(Path("model.gguf")): …       # QuantizedTensors, and plain tensors
    checkpoint.load(Path("model.gguf"), device, dtype)            # linear layers packed, all else decoded

The package `gguf` reads the file and maps its names; config and tokenizer are transformers' doing. What is left: a block
of 4-bit codes has its first half in the low nibbles and its second in the high ones, here codes go in order; and for a
Llama, llama.cpp interleaves the two halves of the rows of q and k in each head. A row is whole blocks, so rows are put
back as they are stored.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import formats
from formats import Format, QuantizedTensor
from formats.packing import pack
from qbench.checkpoint import auto_classes
from qbench.checkpoint.safetensors_io import Spec
from qbench.errors import InputError
from qbench.model.quant_linear import QuantLinear
from qbench.model.selection import linear_layers, weight_of
from qbench.system.extras import install

from .base import Foreign, Held

BLOCK = 32
PACKED = {"Q4_0": "q4_0", "Q4_1": "q4_1", "Q8_0": "q8_0"}  #: types of tensors, and the formats that they are in
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INTERLEAVED = {"llama": ("attn_q", "attn_k"), "qwen2": (), "qwen3": ()}  #: architectures; all else is as in the model
ROPE = "rope_freqs.weight"  #: what each frequency of the positions is divided by


def is_one(path: Path) -> bool:
    return path.suffix == ".gguf" and path.is_file()


def package() -> ModuleType:
    """The package `gguf`. Raises InputError where it is not installed."""
    try:
        return import_module("gguf")
    except ImportError:
        raise InputError(f"gguf, which reads GGUF files, is not installed; {install('gguf')} brings it") from None


@dataclass(frozen=True)
class Kept:
    """A tensor of a file. tensor: as the package gives it. rows: which of its rows are wanted, in order; None for all."""

    path: Path
    tensor: Any
    rows: np.ndarray | None = None

    @property
    def kind(self) -> str:
        return self.tensor.tensor_type.name

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.tensor.shape.tolist()[::-1])

    @property
    def data(self) -> np.ndarray:
        """Its rows as they are stored: numbers, or the bytes of blocks."""
        return np.array(self.tensor.data if self.rows is None else self.tensor.data[self.rows])

    @property
    def format(self) -> Format:
        return formats.get(PACKED[self.kind], block=BLOCK)

    def packed(self, dtype: torch.dtype) -> QuantizedTensor:
        """Of a packed type; `dtype` stands for the original's, which a file does not tell."""
        fmt = self.format
        empty = fmt.empty(self.shape, dtype, "cpu")
        blocks = torch.from_numpy(self.data).reshape(len(empty.scale[0]), -1)
        numbers = 2 * (1 + fmt.shifted)  # bytes of d, or of d and m
        scale, *shift = ((z.contiguous(),) for z in blocks[:, :numbers].contiguous().view(torch.float16).unbind(1))
        codes = blocks[:, numbers:]
        if fmt.bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], 1)
        codes = pack(codes.reshape(-1), fmt.bits)
        return dataclasses.replace(empty, codes=codes, scale=scale, shift=shift[0] if shift else ())

    def plain(self) -> Tensor:
        """Of a plain type as it is, of any other that the package can decode in fp32."""
        if self.kind in PLAIN:
            return torch.from_numpy(self.data).view(PLAIN[self.kind]).reshape(self.shape)
        return torch.from_numpy(package().dequantize(self.data, self.tensor.tensor_type)).reshape(self.shape)

    def refuse(self) -> None:
        """Raises InputError."""
        raise InputError(f"{self.path}: {self.tensor.name} is {self.kind}; accepted: {', '.join([*PACKED, *PLAIN])}")


def tensors(path: Path, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, QuantizedTensor | Tensor]]:
    """Those of a file under their names there, in order, rows as they lie; `dtype`: see `Kept.packed`.

    Raises InputError for a file that is not whole, and for a tensor of another type than are accepted.
    """
    for name, kept in File(path).found.items():
        if kept.kind not in PACKED | PLAIN:
            kept.refuse()
        yield name, kept.packed(dtype) if kept.kind in PACKED else kept.plain()


class File(Foreign):
    def __str__(self) -> str:
        kinds = sorted({kept.kind for kept in self.found.values()} - PLAIN.keys()) or ["16 bit or more"]
        return f"{' and '.join(kinds)} in a GGUF file"

    @cached_property
    def reader(self) -> Any:
        gguf = package()
        try:
            return gguf.GGUFReader(self.path)
        except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
            raise InputError(f"{self.path} is not a whole GGUF file: {str(error) or type(error).__name__}") from error

    @cached_property
    def found(self) -> dict[str, Kept]:
        return {tensor.name: Kept(self.path, tensor) for tensor in self.reader.tensors}

    def told(self, key: str) -> object:
        """A value of the metadata, None where there is none."""
        field = self.reader.get_field(key)
        return None if field is None else field.contents()

    @property
    def architecture(self) -> str:
        found = self.told("general.architecture")
        if found not in INTERLEAVED:
            accepted = ", ".join(INTERLEAVED)
            raise InputError(f"{self.path}: general.architecture: {found!r} is not supported; accepted: {accepted}")
        return found

    def config(self) -> PreTrainedConfig:
        """What transformers reads, and what it does not: the size of a head, and the factors of positions."""
        for key in (f"{self.architecture}.rope.scaling.type", "split.count"):
            if (value := self.told(key)) not in (None, "none", 0, 1):
                raise InputError(f"{self.path}: {key}: {value!r} is not supported; accepted: none")
        weights = sum(kept.shape.numel() for kept in self.found.values())
        told = {
            key.rpartition(".")[2]: self.told(key) for key in self.reader.fields if key.startswith(self.architecture)
        }
        auto_classes.check_sizes(told, self.path, len(self.found), weights)
        config = auto_classes.gguf_config(self.path)
        if head := self.told(f"{self.architecture}.attention.key_length"):
            config.head_dim = head
        if ROPE in self.found:
            factors = self.found[ROPE].plain().tolist()
            config.rope_parameters = config.rope_parameters | {
                "rope_type": "longrope",  # the one that takes factors as they are
                "short_factor": factors,
                "long_factor": factors,
                "attention_factor": 1.0,
                "original_max_position_embeddings": config.max_position_embeddings,
            }
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self.told("tokenizer.ggml.model") is None:
            raise InputError(f"{self.path} brings no tokenizer; accepted: the folder of one, as `tokenizer`")
        return auto_classes.tokenizer(self.path.parent, gguf_file=self.path.name)

    def hold(self, model: PreTrainedModel) -> Held:
        names, linear = self._names(model), linear_layers(model)
        layers: dict[str, tuple[Format, torch.dtype]] = {}
        specs: dict[str, Spec] = {}
        called: dict[str, str] = {}
        found = {key: dataclasses.replace(kept, rows=self._rows(key, model)) for key, kept in self.found.items()}
        for key, kept in found.items():
            name = names.get(key, key)
            layer = name.removesuffix(".weight")
            packed = name != layer and layer in linear
            if packed and kept.kind in PACKED:
                layers[layer] = kept.format, model.dtype
                if kept.shape != (shape := weight_of(linear[layer]).shape):
                    raise InputError(f"{self.path}: {key} is {list(kept.shape)}; accepted: {list(shape)}")
                state = QuantLinear(kept.format.empty(kept.shape, model.dtype)).stored(f"{layer}.")
                parts = {part: Spec.of(tensor) for part, tensor in state.items()}
            elif packed and kept.kind not in PLAIN:
                kept.refuse()
            else:
                parts = {name: Spec(PLAIN.get(kept.kind, torch.float32), kept.shape)} if key != ROPE else {}
            specs |= parts
            called |= dict.fromkeys(parts, key)

        @lru_cache(maxsize=1)  # the parts of a layer are asked for one after the other
        def unpacked(key: str) -> dict[str, Tensor]:
            return QuantLinear(found[key].packed(model.dtype)).stored()

        def read(file: Path, name: str) -> Tensor:
            layer, _, part = name.rpartition(".")
            key = called[name]
            return unpacked(key)[part] if layer in layers and part != "bias" else found[key].plain()

        return Held(layers, {self.path: specs}, read, called)

    def _names(self, model: PreTrainedModel) -> dict[str, str]:
        """What the model calls a tensor, by what the file does."""
        gguf = package()
        kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
        found = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in model.state_dict()}
        return {key: name for name, key in found.items() if key is not None}

    def _rows(self, key: str, model: PreTrainedModel) -> np.ndarray | None:
        """Where the rows of a tensor are that is interleaved: of each head, those at even places come first."""
        part = key.split(".")[-2]
        if part not in INTERLEAVED[self.architecture]:
            return None
        heads = model.config.num_attention_heads if part == "attn_q" else model.config.num_key_value_heads
        rows = np.arange(self.found[key].shape[0])
        return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
