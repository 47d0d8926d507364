"""Reads and writes the safetensors files of a checkpoint, one tensor at a time.

A safetensors file has three parts:

    8 bytes     the length of the header
    header      JSON: dtype, shape and offsets of each tensor
    tensors     their bytes

The specs of all tensors are known before the first tensor is. So `write` starts with the header and puts each tensor at
its offset, in any order, with only one tensor in memory.
"""

import json
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qbench.errors import InputError
from qbench.model.devices import dtype_name
from qbench.results import json_files
from qbench.system import files

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = "pytorch_model.bin", "pytorch_model.bin.index.json"  #: the same for PyTorch's own files
CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}  #: the names of dtypes in a header
_DTYPES = {code: dtype for dtype, code in CODES.items()}
_ALIGNMENT = 8  # bytes


@dataclass(frozen=True)
class TensorSpec:
    """The dtype and the shape of a tensor, as a header has them."""

    dtype: torch.dtype
    shape: torch.Size

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorSpec":
        return cls(tensor.dtype, tensor.shape)

    def __str__(self) -> str:
        return f"{dtype_name(self.dtype)} {list(self.shape)}"

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape)


Contents = dict[Path, dict[str, TensorSpec]]  #: the files of a checkpoint in order, and the tensors of each


def shard_name(number: int, count: int) -> str:
    """The name of file `number` (from 1) of `count`."""
    return f"model-{number:05}-of-{count:05}.safetensors"


def read_contents(folder: Path, pickles: bool = False) -> Contents:
    """The tensors of the checkpoint in a folder, by file. Only headers are read.

    pickles: if there are no safetensors, read PyTorch's own files, with `torch.load(weights_only=True)`. Raises InputError
    naming a file that is missing, truncated, or lacks a tensor that the index lists.
    """
    kinds = [(SINGLE, INDEX), PICKLES] if pickles else [(SINGLE, INDEX)]
    for single, index in ((folder / single, folder / index) for single, index in kinds):
        if single.is_file():
            weight_map = {}
            contents = read_headers([single])
            break
        if index.is_file():
            weight_map = _read_weight_map(index)
            contents = read_headers([folder / file for file in sorted(set(weight_map.values()))])
            break
    else:
        raise InputError(f"{folder} holds no weights; accepted: {SINGLE}, or {INDEX} and the files it names")
    for tensor, file in weight_map.items():
        if tensor not in contents[folder / file]:
            raise InputError(f"{folder / file} lacks {tensor}, which {index.name} places there")
    return contents


def read_headers(files: list[Path]) -> Contents:
    """The tensors of these files. Raises InputError for a file that is missing or truncated, or a tensor in two files."""
    contents = {file: read_header(file) for file in files}
    file_of: dict[str, Path] = {}
    for file, specs in contents.items():
        for tensor in specs:
            if tensor in file_of:
                raise InputError(f"{tensor} is both in {file_of[tensor]} and in {file}; accepted: one of them")
            file_of[tensor] = file
    return contents


def merge_specs(contents: Contents) -> dict[str, TensorSpec]:
    """The tensors of all files."""
    return {tensor: spec for specs in contents.values() for tensor, spec in specs.items()}


def _read_weight_map(index: Path) -> dict[str, str]:
    """The file of each tensor, from an index. Raises InputError."""
    content = json_files.read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(file, str) for file in weight_map.values())):
        raise InputError(f"{index} has no weight_map from tensors to files")
    for file in weight_map.values():
        if not file or Path(file).name != file:
            raise InputError(f"{index} names {file!r}; files of the same folder are accepted")
    return weight_map


def read_header(file: Path) -> dict[str, TensorSpec]:
    """The tensors of one file. Raises InputError naming the file if it is missing or truncated."""
    if file.suffix == ".bin":
        return {name: TensorSpec.of(tensor) for name, tensor in _read_pickle(file, "meta").items()}
    specs = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for tensor in opened.keys():  # noqa: SIM118  it is no dict
                part = opened.get_slice(tensor)
                code = part.get_dtype()
                if code not in _DTYPES:
                    raise InputError(f"{file}: {tensor} is stored as {code}; accepted: {', '.join(_DTYPES)}")
                specs[tensor] = TensorSpec(_DTYPES[code], torch.Size(part.get_shape()))
    except FileNotFoundError:
        raise InputError(f"{file} is missing") from None
    except SafetensorError as error:
        raise InputError(f"{file} is not a whole safetensors file: {error}") from error
    except OSError as error:  # such as a folder or a device
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from error
    return specs


def map_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one file by name, memory-mapped: each takes memory only as it is used."""
    if file.suffix == ".bin":
        yield from _read_pickle(file, "cpu").items()
        return
    with safe_open(file, framework="pt") as opened:
        for tensor in opened.keys():  # noqa: SIM118  it is no dict
            yield tensor, opened.get_tensor(tensor)


def _read_pickle(file: Path, device: str) -> dict[str, Tensor]:
    """The tensors of a file that PyTorch saved. Raises InputError if it holds anything else."""
    try:
        tensors = torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))
    except FileNotFoundError:
        raise InputError(f"{file} is missing") from None
    except Exception as error:  # of many types
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{file} is no whole file of tensors: {first}") from error
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        raise InputError(f"{file} holds something else than tensors by name; accepted: a state_dict")
    return tensors


def read(file: Path, tensor: str) -> Tensor:
    """A tensor, memory-mapped from a file: it takes memory only as it is used, and none once it is deleted."""
    with safe_open(file, framework="pt") as opened:  # once a tensor, because pages stay mapped while the file is open
        return opened.get_tensor(tensor)


def write(file: Path, specs: dict[str, TensorSpec], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a file with the tensors of `specs`, which `tensors` yields in any order.

    The file appears only once it is complete. Raises ValueError if the tensors do not match the specs, OSError naming
    the file.
    """
    offsets: dict[str, int] = {}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # largest items first, so that each tensor is aligned
    for tensor in sorted(specs, key=lambda tensor: (-specs[tensor].dtype.itemsize, tensor)):
        spec = specs[tensor]
        start, end = end, end + spec.nbytes
        offsets[tensor] = start
        header[tensor] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % _ALIGNMENT)
    with files.atomic_write(file) as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        data_start = stream.tell()
        for tensor, values in tensors:
            if specs.get(tensor) != TensorSpec.of(values):
                raise ValueError(f"{tensor}: {TensorSpec.of(values)} where {specs.get(tensor)} is expected")
            stream.seek(data_start + offsets.pop(tensor))
            stream.write(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del values  # before the next is read
        if offsets:
            raise ValueError(f"{next(iter(offsets))} was not given")


def make_index(contents: Contents) -> dict:
    """The index of a checkpoint, as JSON."""
    return {
        "metadata": {"total_size": sum(spec.nbytes for spec in merge_specs(contents).values())},
        "weight_map": {tensor: file.name for file, specs in contents.items() for tensor in sorted(specs)},
    }
