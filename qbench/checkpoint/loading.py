"""Models: load a Hugging Face causal LM from disk or hub, and quantize its layers."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import psutil
import torch

from qbench.errors import InputError
from qbench.model.devices import DTYPES
from qbench.model.quantizing import held_bytes

from . import packed_checkpoint, sixteen_bit
from .location import BUNDLED as BUNDLED
from .location import commit, locate
from .packed_checkpoint import LoadedModel
from .sixteen_bit import Opened


def open(path: str | None, revision: str | None = None, trust: bool = False) -> Opened:
    """Open a 16-bit checkpoint: all but its weights is there, and these have been found to be those of its config.

    path: a folder as `save_pretrained` writes it, a hub id (the one case in which the network is used), None for the
    bundled model. revision: of a hub id. trust: run the code that it brings along. Raises InputError, in one line.
    """
    if found := packed_checkpoint.find(locate(path, revision, trust)):
        instead = "qbench.checkpoint.load brings it into Python, and qbench.measure.quality.evaluate scores it there"
        raise InputError(
            f"model.path: {path!r} is packed already, as {found}; accepted: a 16-bit checkpoint. {instead}"
        )
    return sixteen_bit.open(path, revision, trust)


def digest(path: str | None, revision: str | None = None) -> str | None:
    """What tells a model's files from others: SHA-256 over a folder or file, of a hub id the commit. Raises InputError."""
    if found := commit(path, revision):
        return found
    source = locate(path)
    files = [file for file in sorted(source.iterdir()) if file.is_file()] if source.is_dir() else [source]
    return hashlib.sha256("".join(_file_digest(file, *_stamp(file)) for file in files).encode()).hexdigest()


def _stamp(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=1024)
def _file_digest(file: Path, size: int, modified: int) -> str:
    """Of name and content; a sweep asks for the same files again and again."""
    with file.open("rb") as stream:
        return file.name + hashlib.file_digest(stream, "sha256").hexdigest()


def remember_digests(path: str | None) -> None:
    """Have the digests of a model's files at hand, here and in children of this process."""
    with suppress(InputError):
        digest(path)


_kept: dict[tuple, LoadedModel] = {}


def keep(path: str | None, dtype: str, revision: str | None, trust_remote_code: bool = False) -> None:
    """Have a model in the memory of the host, the last one asked for, where it leaves as much again free.

    `loaded` hands it out, once: this is for children of this process, each of which does so.
    """
    key = (path, DTYPES[dtype], revision, trust_remote_code, digest(path, revision))
    if key not in _kept:
        _kept.clear()
        with _one_thread():  # those that OpenMP has here would count against a child's own
            found = loaded(open(path, revision, trust_remote_code), DTYPES[dtype], torch.device("cpu"))
        if held_bytes(found.model) < psutil.virtual_memory().available:
            _kept[key] = found


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def loaded(source: Opened, dtype: torch.dtype, device: torch.device) -> LoadedModel:
    """The model of an opened checkpoint, and its tokenizer. Raises InputError if it cannot be loaded."""
    key = (source.path, dtype, source.revision, source.trust, digest(source.path, source.revision)) if _kept else ()
    if kept := _kept.pop(key, None):
        kept.model.to(device)  # type: ignore[arg-type]  # which transformers types as no method
        return kept
    return LoadedModel(source.load(dtype, device), source.tokenizer)


def load(
    path: str | None, dtype: torch.dtype, device: torch.device, revision: str | None = None, trust: bool = False
) -> LoadedModel:
    """Load a causal LM and its tokenizer.

    path: what `open` takes, or a packed checkpoint, which is loaded as it is: a folder that `qbench.quantize` wrote, a
    GGUF file (see `checkpoint`). Weights come from safetensors, or from PyTorch's files, of which no more is run than
    `torch.load(weights_only=True)` does. trust: run the code that a 16-bit checkpoint brings along. Raises InputError if
    it cannot be loaded, or is not whole.
    """
    source = locate(path, revision, trust)
    if packed_checkpoint.find(source):
        return packed_checkpoint.load(source, device, dtype)
    return loaded(sixteen_bit.open(path, revision, trust), dtype, device)
