"""Models: load a Hugging Face causal LM from disk or hub, and quantize its layers."""

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from formats import Format, QuantizedTensor
from formats.contract import first_line

from . import checkpoint, opened, skeleton
from .checkpoint import LoadedModel
from .errors import InputError
from .functions import logits_of
from .layers import coverage, hold_still, replace, warn_of_left, weight_of
from .opened import Opened
from .places import BUNDLED as BUNDLED
from .places import commit, locate
from .pretrained import tell
from .recipe import Recipe

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises InputError for a device that this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise InputError(f"device: {name!r} is none; accepted: auto, cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device: {name!r} is not supported; accepted: auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device: {name!r} is not on this machine; accepted here: {_devices()}")
    return device


def _devices() -> str:
    return ", ".join(["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device computes in it, else float32: a CPU without such instructions emulates it."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" or _cpu_computes_in_bf16() else torch.float32
    if name not in DTYPES:
        raise InputError(f"model.dtype: {name!r} is none; accepted: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def _cpu_computes_in_bf16() -> bool:
    """Whether the CPU has instructions for it (AVX512-BF16 or AMX)."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check)


def open(path: str | None, revision: str | None = None, trust: bool = False) -> Opened:
    """Open a 16-bit checkpoint: all but its weights is there, and these have been found to be those of its config.

    path: a folder as `save_pretrained` writes it, a hub id (the one case in which the network is used), None for the
    bundled model. revision: of a hub id. trust: run the code that it brings along. Raises InputError, in one line.
    """
    if found := checkpoint.find(locate(path, revision, trust)):
        instead = "qbench.checkpoint.load brings it into Python, and qbench.measure.quality.evaluate scores it there"
        raise InputError(
            f"model.path: {path!r} is packed already, as {found}; accepted: a 16-bit checkpoint. {instead}"
        )
    return opened.open(path, revision, trust)


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
    if checkpoint.find(source):
        return checkpoint.load(source, device, dtype)
    return loaded(opened.open(path, revision, trust), dtype, device)


@torch.inference_mode()
def check_logits(model: PreTrainedModel, tokens: torch.Tensor) -> None:
    """Raises InputError where a model gives no logits of tokens [n, seq] alone, as one that reads another's states."""
    try:
        logits_of(model, tokens.to(model.device))
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        kind = type(model).__name__
        raise InputError(
            f"model.path: a {kind} gives no logits of tokens alone: {first_line(error)}; accepted: a model that does"
        ) from error


def pick_seq(seq: int | str, model: PreTrainedModel, usual: int = 256) -> int:
    """Tokens a window: `auto` is the usual, or as many as the model has positions. Raises InputError for more."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    if isinstance(seq, str):  # auto
        return min(usual, positions) if positions > 0 else usual
    if 0 < positions < seq:  # XLNet's -1 is no limit
        raise InputError(
            f"data.seq: {seq} is more than the model's {positions} positions; accepted: auto, or up to those"
        )
    return seq


def quantize(
    layers: Mapping[str, nn.Module], fmt: Format, advance: Callable[[int], None] = lambda n: None
) -> dict[str, QuantizedTensor]:
    """The weight of each layer in the format; `advance` is told the number of weights done. Raises InputError."""
    packed = {}
    for name, layer in layers.items():
        try:
            packed[name] = fmt.quantize(weight_of(layer), name=f"{name}.weight")
        except ValueError as error:
            raise InputError(str(error)) from error
        advance(packed[name].numel)
    return packed


def pack(model: PreTrainedModel, format: str, block: int = 64, dq: bool = False, **options: Any) -> PreTrainedModel:
    """Quantize a model that is in memory, in place: every linear layer but those of its head, as `QBenchConfig` does on
    the way from disk, to the same bits.

    format, block, dq and options: what `formats.get` takes. Returns the model. Raises InputError, before anything is
    changed, for what is no format, for a model without such layers, and naming the weight that is tied, NaN or Inf. A
    linear layer that computes something else than a product is left, and named in a warning.
    """
    recipe = Recipe.of({"name": format, "block": block, "dq": dq, **options}, {})
    layers = skeleton.layers_of(model, type(model).__name__)
    warn_of_left(model)
    dtypes = {name: weight_of(layer).dtype for name, layer in layers.items()}
    hold_still(model)
    replace(model, quantize(layers, recipe.format))
    model.config = copy.copy(model.config)  # other models may have been made from it, and are not packed
    tell(model, Recipe.of(recipe.arguments, dtypes, coverage=coverage(model)))
    return model


def held_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())
