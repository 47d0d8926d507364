"""Loads the model that a run starts from: a causal LM from disk or hub, in 16 bit or packed."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import psutil
import torch

from qbench.errors import InputError
from qbench.model.devices import DTYPES
from qbench.model.quantizing import model_bytes

from . import packed_checkpoint, sixteen_bit
from .location import BUNDLED as BUNDLED
from .location import find_commit, locate
from .packed_checkpoint import LoadedModel
from .sixteen_bit import SixteenBitCheckpoint


def open(path: str | None, revision: str | None = None, trust: bool = False) -> SixteenBitCheckpoint:
    """Open a 16-bit checkpoint and check that its tensors match its config. Weights are not read yet.

    path: a folder that `save_pretrained` wrote, a hub id (the only use of the network), or None for the bundled model.
    revision: of a hub id. trust: run the code that comes with it. Raises InputError, in one line.
    """
    if packed := packed_checkpoint.find(locate(path, revision, trust)):
        instead = "qbench.checkpoint.load brings it into Python, and qbench.measure.quality.evaluate scores it there"
        raise InputError(
            f"model.path: {path!r} is packed already, as {packed}; accepted: a 16-bit checkpoint. {instead}"
        )
    return sixteen_bit.open(path, revision, trust)


def digest(path: str | None, revision: str | None = None) -> str | None:
    """Identifies the files of a model: SHA-256 of a folder or file, or the commit of a hub id. Raises InputError."""
    if commit := find_commit(path, revision):
        return commit
    source = locate(path)
    files = [file for file in sorted(source.iterdir()) if file.is_file()] if source.is_dir() else [source]
    return hashlib.sha256("".join(_file_digest(file, *_size_and_time(file)) for file in files).encode()).hexdigest()


def _size_and_time(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=1024)
def _file_digest(file: Path, size: int, modified: int) -> str:
    """Name and digest of a file. Cached, because a sweep reads the same files again; size and time show a change."""
    with file.open("rb") as stream:
        return file.name + hashlib.file_digest(stream, "sha256").hexdigest()


def remember_digests(path: str | None) -> None:
    """Compute the digests of a model's files now, for this process and the children that it forks."""
    with suppress(InputError):
        digest(path)


_in_memory: dict[tuple, LoadedModel] = {}


def keep_in_memory(path: str | None, dtype: str, revision: str | None, trust_remote_code: bool = False) -> None:
    """Load a model into host memory, in place of the last one. It is kept only if as much memory stays free.

    `load_opened` then returns it, once in each process. Forked children share this memory, so each run starts faster.
    """
    key = (path, DTYPES[dtype], revision, trust_remote_code, digest(path, revision))
    if key not in _in_memory:
        _in_memory.clear()
        with _single_thread():  # threads that OpenMP starts here would count against those of a child
            loaded = load_opened(open(path, revision, trust_remote_code), DTYPES[dtype], torch.device("cpu"))
        if model_bytes(loaded.model) < psutil.virtual_memory().available:
            _in_memory[key] = loaded


@contextmanager
def _single_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_opened(source: SixteenBitCheckpoint, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    """The model of an opened checkpoint, and its tokenizer. Raises InputError if it cannot be loaded."""
    if _in_memory:  # a digest takes time, so it is computed only then
        key = (source.path, dtype, source.revision, source.trust, digest(source.path, source.revision))
        if kept := _in_memory.pop(key, None):
            kept.model.to(device)  # type: ignore[arg-type]  # transformers' types hide the method
            return kept
    return LoadedModel(source.load(dtype, device), source.tokenizer)


def load(
    path: str | None, dtype: torch.dtype, device: torch.device, revision: str | None = None, trust: bool = False
) -> LoadedModel:
    """Load a causal LM and its tokenizer.

    path: as for `open`, or a packed checkpoint, such as a folder that `qbench quantize` wrote or a GGUF file. Weights are
    read from safetensors, or from PyTorch's files with `torch.load(weights_only=True)`. trust: run the code that comes
    with a 16-bit checkpoint. Raises InputError if the model cannot be loaded or is incomplete.
    """
    source = locate(path, revision, trust)
    if packed_checkpoint.find(source):
        return packed_checkpoint.load(source, device, dtype)
    return load_opened(sixteen_bit.open(path, revision, trust), dtype, device)
