"""Reads GGUF files, as llama.cpp writes them: single tensors, or whole models of a few architectures.

    for name, tensor in gguf.tensors(Path("model.gguf")): …       # QuantizedTensors, and decoded tensors
    checkpoint.load(Path("model.gguf"), device, dtype)            # linear layers packed, all else decoded

The package `gguf` reads the file and maps its names; transformers reads config and tokenizer. Two things are done here:

    codes   GGUF puts the first half of a 4-bit block into the low nibbles, the second half into the high ones; formats
            here put codes in order
    rows    for Llama, llama.cpp interleaves the two halves of each head in the rows of q and k; this is undone while
            they are packed, since each row is whole blocks
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
from qbench.checkpoint.safetensors_io import TensorSpec
from qbench.errors import InputError
from qbench.model.quant_linear import QuantLinear
from qbench.model.selection import linear_layers, weight_of
from qbench.system.extras import install_command

from .base import ForeignCheckpoint, ForeignTensors

BLOCK = 32
PACKED = {"Q4_0": "q4_0", "Q4_1": "q4_1", "Q8_0": "q8_0"}  #: types of packed tensors, and their formats
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: architectures, and their tensors with interleaved rows
INTERLEAVED = {"llama": ("attn_q", "attn_k"), "qwen2": (), "qwen3": ()}
ROPE = "rope_freqs.weight"  #: divisors of the frequencies of rotary positions


def is_gguf(path: Path) -> bool:
    """Whether the path is a GGUF file, by its name."""
    return path.suffix == ".gguf" and path.is_file()


def import_gguf() -> ModuleType:
    """The package `gguf`. Raises InputError if it is not installed."""
    try:
        return import_module("gguf")
    except ImportError:
        raise InputError(
            f"gguf, which reads GGUF files, is not installed; {install_command('gguf')} brings it"
        ) from None


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a file. tensor: as the package `gguf` gives it. rows: the order of its rows; None to leave it."""

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
        """Its rows as the file has them: numbers, or the bytes of blocks."""
        return np.array(self.tensor.data if self.rows is None else self.tensor.data[self.rows])

    @property
    def format(self) -> Format:
        return formats.get(PACKED[self.kind], block=BLOCK)

    def to_quantized(self, dtype: torch.dtype) -> QuantizedTensor:
        """A tensor of a packed type, with the same bits. dtype: of the original weight, which the file does not say."""
        fmt = self.format
        empty = fmt.empty(self.shape, dtype, "cpu")
        blocks = torch.from_numpy(self.data).reshape(len(empty.scale[0]), -1)
        header = 2 * (1 + fmt.shifted)  # bytes of d, or of d and m, in fp16
        scale, *shift = ((z.contiguous(),) for z in blocks[:, :header].contiguous().view(torch.float16).unbind(1))
        codes = blocks[:, header:]
        if fmt.bits == 4:
            codes = torch.cat([codes & 15, codes >> 4], 1)
        codes = pack(codes.reshape(-1), fmt.bits)
        return dataclasses.replace(empty, codes=codes, scale=scale, shift=shift[0] if shift else ())

    def decode(self) -> Tensor:
        """A tensor of a plain type in its dtype, any other in fp32, decoded by the package `gguf`."""
        if self.kind in PLAIN:
            return torch.from_numpy(self.data).view(PLAIN[self.kind]).reshape(self.shape)
        return torch.from_numpy(import_gguf().dequantize(self.data, self.tensor.tensor_type)).reshape(self.shape)

    def refuse(self) -> None:
        """Raises InputError: the type is not accepted."""
        raise InputError(f"{self.path}: {self.tensor.name} is {self.kind}; accepted: {', '.join([*PACKED, *PLAIN])}")


def tensors(path: Path, dtype: torch.dtype = torch.float32) -> Iterator[tuple[str, QuantizedTensor | Tensor]]:
    """Yields names and tensors in the order of the file; rows stay interleaved. dtype: of the original weights.

    Raises InputError if the file is incomplete or a tensor is of another type than PACKED or PLAIN.
    """
    for name, tensor in GGUFFile(path).tensors.items():
        if tensor.kind not in PACKED | PLAIN:
            tensor.refuse()
        yield name, tensor.to_quantized(dtype) if tensor.kind in PACKED else tensor.decode()


class GGUFFile(ForeignCheckpoint):
    """A GGUF file with a whole model."""

    def __str__(self) -> str:
        kinds = sorted({tensor.kind for tensor in self.tensors.values()} - PLAIN.keys()) or ["16 bit or more"]
        return f"{' and '.join(kinds)} in a GGUF file"

    @cached_property
    def reader(self) -> Any:
        gguf = import_gguf()
        try:
            return gguf.GGUFReader(self.path)
        except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
            raise InputError(f"{self.path} is not a whole GGUF file: {str(error) or type(error).__name__}") from error

    @cached_property
    def tensors(self) -> dict[str, GGUFTensor]:
        return {tensor.name: GGUFTensor(self.path, tensor) for tensor in self.reader.tensors}

    def metadata(self, key: str) -> object:
        """A value of the metadata; None if there is none."""
        field = self.reader.get_field(key)
        return None if field is None else field.contents()

    @property
    def architecture(self) -> str:
        name = self.metadata("general.architecture")
        if name not in INTERLEAVED:
            accepted = ", ".join(INTERLEAVED)
            raise InputError(f"{self.path}: general.architecture: {name!r} is not supported; accepted: {accepted}")
        return name

    def config(self) -> PreTrainedConfig:
        """The config that transformers reads, completed with the head size and the factors of rotary positions."""
        for key in (f"{self.architecture}.rope.scaling.type", "split.count"):
            if (value := self.metadata(key)) not in (None, "none", 0, 1):
                raise InputError(f"{self.path}: {key}: {value!r} is not supported; accepted: none")
        weights = sum(tensor.shape.numel() for tensor in self.tensors.values())
        keys = [key for key in self.reader.fields if key.startswith(self.architecture)]
        sizes = {key.rpartition(".")[2]: self.metadata(key) for key in keys}
        auto_classes.check_sizes(sizes, self.path, len(self.tensors), weights)
        config = auto_classes.load_gguf_config(self.path)
        if head := self.metadata(f"{self.architecture}.attention.key_length"):
            config.head_dim = head
        if ROPE in self.tensors:
            factors = self.tensors[ROPE].decode().tolist()
            config.rope_parameters = config.rope_parameters | {
                "rope_type": "longrope",  # the type that takes any factors
                "short_factor": factors,
                "long_factor": factors,
                "attention_factor": 1.0,
                "original_max_position_embeddings": config.max_position_embeddings,
            }
        return config

    def tokenizer(self) -> PreTrainedTokenizerBase:
        if self.metadata("tokenizer.ggml.model") is None:
            raise InputError(f"{self.path} brings no tokenizer; accepted: the folder of one, as `tokenizer`")
        return auto_classes.load_tokenizer(self.path.parent, gguf_file=self.path.name)

    def map_tensors(self, model: PreTrainedModel) -> ForeignTensors:
        model_names, linear = self._model_names(model), linear_layers(model)
        layers: dict[str, tuple[Format, torch.dtype]] = {}
        specs: dict[str, TensorSpec] = {}
        keys: dict[str, str] = {}  # names in the file, by names in the model
        in_order = {
            key: dataclasses.replace(tensor, rows=self._row_order(key, model)) for key, tensor in self.tensors.items()
        }
        for key, tensor in in_order.items():
            name = model_names.get(key, key)
            layer = name.removesuffix(".weight")
            is_weight = name != layer and layer in linear  # of a layer that may be packed
            if is_weight and tensor.kind in PACKED:
                layers[layer] = tensor.format, model.dtype
                if tensor.shape != (shape := weight_of(linear[layer]).shape):
                    raise InputError(f"{self.path}: {key} is {list(tensor.shape)}; accepted: {list(shape)}")
                empty = QuantLinear(tensor.format.empty(tensor.shape, model.dtype))
                parts = {part: TensorSpec.of(values) for part, values in empty.stored_tensors(f"{layer}.").items()}
            elif is_weight and tensor.kind not in PLAIN:
                tensor.refuse()
            elif key == ROPE:  # part of the config
                continue
            else:
                parts = {name: TensorSpec(PLAIN.get(tensor.kind, torch.float32), tensor.shape)}
            specs |= parts
            keys |= dict.fromkeys(parts, key)

        @lru_cache(maxsize=1)  # the parts of a layer are read one after the other
        def packed_parts(key: str) -> dict[str, Tensor]:
            return QuantLinear(in_order[key].to_quantized(model.dtype)).stored_tensors()

        def read(file: Path, name: str) -> Tensor:
            layer, _, part = name.rpartition(".")
            key = keys[name]
            return packed_parts(key)[part] if layer in layers and part != "bias" else in_order[key].decode()

        return ForeignTensors(layers, {self.path: specs}, read, keys)

    def _model_names(self, model: PreTrainedModel) -> dict[str, str]:
        """The names of tensors in the model, by their names in the file."""
        gguf = import_gguf()
        architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
        keys = {name: names.get_name(name, try_suffixes=(".weight", ".bias")) for name in model.state_dict()}
        return {key: name for name, key in keys.items() if key is not None}

    def _row_order(self, key: str, model: PreTrainedModel) -> np.ndarray | None:
        """The order that undoes the interleaving of rows; None for other tensors. In a head of 6 rows: 0 2 4 1 3 5."""
        part = key.split(".")[-2]
        if part not in INTERLEAVED[self.architecture]:
            return None
        heads = model.config.num_attention_heads if part == "attn_q" else model.config.num_key_value_heads
        rows = np.arange(self.tensors[key].shape[0])
        return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
