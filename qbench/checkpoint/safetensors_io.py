"""The files of a checkpoint: safetensors that are read, and written, a tensor at a time.

A safetensors file is eight bytes that tell the length of a header, the header in JSON (of each tensor dtype, shape and
place), and the tensors. What goes into a file is known before the first tensor is, so the header is written first and
each tensor to its place, in any order: no more of a file is in memory than one tensor.
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
from qbench.results import json_files
from qbench.system import files

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = "pytorch_model.bin", "pytorch_model.bin.index.json"  #: the same in PyTorch's files
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
}  #: dtypes as a header tells them
_DTYPES = {code: dtype for dtype, code in CODES.items()}
_ALIGNED = 8


@dataclass(frozen=True)
class Spec:
    """What a header tells of a tensor."""

    dtype: torch.dtype
    shape: torch.Size

    @classmethod
    def of(cls, tensor: Tensor) -> "Spec":
        return cls(tensor.dtype, tensor.shape)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape)


Contents = dict[Path, dict[str, Spec]]  #: the files of a checkpoint in order, of each its tensors


def name(number: int, count: int) -> str:
    """The name of file `number` (from 1) of `count`."""
    return f"model-{number:05}-of-{count:05}.safetensors"


def contents(folder: Path, pickles: bool = False) -> Contents:
    """The tensors of the checkpoint in a folder, by file; only headers are read.

    pickles: where there are no safetensors, take PyTorch's files, of which no more is run than
    `torch.load(weights_only=True)` does. Raises InputError naming the file that is missing, cut short, or without a tensor
    that the index places there.
    """
    kinds = [(SINGLE, INDEX), PICKLES] if pickles else [(SINGLE, INDEX)]
    for single, index in ((folder / single, folder / index) for single, index in kinds):
        if single.is_file():
            where = {}
            found = headers([single])
            break
        if index.is_file():
            where = _weight_map(index)
            found = headers([folder / file for file in sorted(set(where.values()))])
            break
    else:
        raise InputError(f"{folder} holds no weights; accepted: {SINGLE}, or {INDEX} and the files it names")
    for tensor, file in where.items():
        if tensor not in found[folder / file]:
            raise InputError(f"{folder / file} lacks {tensor}, which {index.name} places there")
    return found


def headers(files: list[Path]) -> Contents:
    """The tensors of these files. Raises InputError for one that is missing or cut short, or has what another has."""
    found = {file: header(file) for file in files}
    places: dict[str, Path] = {}
    for file, specs in found.items():
        for tensor in specs:
            if tensor in places:
                raise InputError(f"{tensor} is both in {places[tensor]} and in {file}; accepted: one of them")
            places[tensor] = file
    return found


def merged(contents: Contents) -> dict[str, Spec]:
    return {tensor: spec for specs in contents.values() for tensor, spec in specs.items()}


def _weight_map(index: Path) -> dict[str, str]:
    content = json_files.read_json(index)
    where = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(where, dict) or not where or not all(isinstance(file, str) for file in where.values()):
        raise InputError(f"{index} has no weight_map from tensors to files")
    for file in where.values():
        if not file or Path(file).name != file:
            raise InputError(f"{index} names {file!r}; files of the same folder are accepted")
    return where


def header(file: Path) -> dict[str, Spec]:
    """The tensors of one file. Raises InputError naming it where it is missing or not whole."""
    if file.suffix == ".bin":
        return {name: Spec.of(tensor) for name, tensor in _unpickled(file, "meta").items()}
    specs = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for tensor in opened.keys():  # noqa: SIM118  no dict
                part = opened.get_slice(tensor)
                code = part.get_dtype()
                if code not in _DTYPES:
                    raise InputError(f"{file}: {tensor} is kept as {code}; accepted: {', '.join(_DTYPES)}")
                specs[tensor] = Spec(_DTYPES[code], torch.Size(part.get_shape()))
    except FileNotFoundError:
        raise InputError(f"{file} is missing") from None
    except SafetensorError as error:
        raise InputError(f"{file} is not a whole safetensors file: {error}") from error
    except OSError as error:  # a folder, or a device
        raise InputError(f"{file} cannot be read: {error.strerror or error}") from error
    return specs


def mapped(file: Path) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one file by name, mapped from it: each takes memory as it is used."""
    if file.suffix == ".bin":
        yield from _unpickled(file, "cpu").items()
        return
    with safe_open(file, framework="pt") as opened:
        for tensor in opened.keys():  # noqa: SIM118  no dict
            yield tensor, opened.get_tensor(tensor)


def _unpickled(file: Path, device: str) -> dict[str, Tensor]:
    """What a file of PyTorch's holds. Raises InputError for one that is no dict of tensors."""
    try:
        found = torch.load(file, map_location=device, weights_only=True, mmap=zipfile.is_zipfile(file))
    except FileNotFoundError:
        raise InputError(f"{file} is missing") from None
    except Exception as error:  # of many kinds
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{file} is no whole file of tensors: {first}") from error
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) and isinstance(n, str) for n, t in found.items()):
        raise InputError(f"{file} holds something else than tensors by name; accepted: a state_dict")
    return found


def read(file: Path, tensor: str) -> Tensor:
    """A tensor that is mapped from a file: it takes memory as it is used, and none once it has gone."""
    with safe_open(file, framework="pt") as opened:  # anew for each, since pages stay mapped while the file is open
        return opened.get_tensor(tensor)


def write(file: Path, specs: dict[str, Spec], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write a file of the tensors that `specs` tells, which `tensors` gives in any order; the whole of it or nothing.

    Raises ValueError where they are not those, OSError naming the file.
    """
    places: dict[str, int] = {}
    told: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in sorted(specs, key=lambda tensor: (-specs[tensor].dtype.itemsize, tensor)):  # so that each is aligned
        spec = specs[tensor]
        places[tensor], end = end, end + spec.nbytes
        told[tensor] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [places[tensor], end]}
    head = json.dumps(told, separators=(",", ":")).encode()
    head += b" " * (-len(head) % _ALIGNED)
    with files.replaced(file) as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        start = stream.tell()
        for tensor, values in tensors:
            if specs.get(tensor) != Spec.of(values):
                raise ValueError(f"{tensor}: {Spec.of(values)} where {specs.get(tensor)} was to come")
            stream.seek(start + places.pop(tensor))
            stream.write(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            del values  # before the next is read
        if places:
            raise ValueError(f"{next(iter(places))} has not come")


def index(contents: Contents) -> dict:
    """What the index of a checkpoint holds."""
    return {
        "metadata": {"total_size": sum(spec.nbytes for spec in merged(contents).values())},
        "weight_map": {tensor: file.name for file, specs in contents.items() for tensor in sorted(specs)},
    }
