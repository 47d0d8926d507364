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
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from formats import Format, QuantizedTensor

from . import checkpoint, recipe, skeleton
from .checkpoint import LoadedModel, reading
from .errors import InputError
from .interop import gguf
from .layers import replace, warn_of_left, weight_of
from .pretrained import tell
from .recipe import Recipe
from .shards import Spec

BUNDLED = Path(__file__).parent / "assets" / "model"
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


def locate(path: str | None) -> Path | str:
    """The folder of a model, a GGUF file, or the hub id that a path is; None is the bundled model. Raises InputError."""
    folder = BUNDLED if path is None else Path(path).expanduser()
    if gguf.is_one(folder):
        return folder
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(
                f"model.path: {path!r} holds no config.json; accepted: a folder that save_pretrained wrote"
            )
        return folder
    if path is None or path.count("/") != 1 or path.startswith((".", "/", "~")) or folder.parent.is_dir():
        raise InputError(
            f"model.path: {path!r} does not exist; accepted: a folder with a model, or a hub id owner/name"
        )
    return path


def refuse_packed(path: str | None) -> None:
    """Raises InputError where a path is a checkpoint that is packed already."""
    source = locate(path)
    if isinstance(source, Path) and (found := checkpoint.find(source)):
        instead = "qbench.checkpoint.load brings it into Python, and qbench.measure.quality.evaluate scores it there"
        raise InputError(
            f"model.path: {path!r} is packed already, as {found}; accepted: a 16-bit checkpoint. {instead}"
        )


def digest(path: str | None, revision: str | None = None) -> str | None:
    """What tells a model's files from others: SHA-256 over a folder or file, of a hub id the commit. Raises InputError."""
    source = locate(path)
    if isinstance(source, Path):
        files = [file for file in sorted(source.iterdir()) if file.is_file()] if source.is_dir() else [source]
        return hashlib.sha256("".join(_file_digest(file, *_stamp(file)) for file in files).encode()).hexdigest()
    with reading(f"model.path: {path!r}"):
        return AutoConfig.from_pretrained(source, revision=revision or "main")._commit_hash


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
        if isinstance(locate(path), Path):
            digest(path)


_kept: dict[tuple, LoadedModel] = {}


def keep(path: str | None, dtype: str, revision: str | None) -> None:
    """Have a model in the memory of the host, the last one asked for, where it leaves as much again free.

    `load` hands it out, once: this is for children of this process, each of which does so.
    """
    key = (path, DTYPES[dtype], revision, digest(path, revision))
    if key not in _kept:
        _kept.clear()
        with _one_thread():  # those that OpenMP has here would count against a child's own
            loaded = load(path, DTYPES[dtype], torch.device("cpu"), revision)
        if held_bytes(loaded.model) < psutil.virtual_memory().available:
            _kept[key] = loaded


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load(path: str | None, dtype: torch.dtype, device: torch.device, revision: str | None = None) -> LoadedModel:
    """Load a causal LM and its tokenizer.

    path: a folder as `save_pretrained` or `qbench.quantize` writes it, a GGUF file, or a hub id (the one case in which the
    network is used); None is the bundled model. Weights come from safetensors, or from a pickle that
    `torch.load(weights_only=True)` takes; code that a checkpoint brings along is not run. A packed checkpoint is loaded as
    it is, see `checkpoint`. Raises InputError if it cannot be loaded.
    """
    if _kept and (kept := _kept.pop((path, dtype, revision, digest(path, revision)), None)):
        kept.model.to(device)  # type: ignore[arg-type]  # which transformers types as no method
        return kept
    source = locate(path)
    if isinstance(source, Path) and checkpoint.find(source):
        return checkpoint.load(source, device, dtype)
    options = {"local_files_only": True} if isinstance(source, Path) else {"revision": revision or "main"}
    transformers_logging.disable_progress_bar()
    with reading(f"model.path: {path!r}"):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, trust_remote_code=False, **options)
    if getattr(model.config, recipe.KEY, None) is not None:
        raise InputError(
            f"model.path: {path!r} is quantized already; accepted: a 16-bit checkpoint, or a packed one on disk"
        )
    for name, tensor in model.named_parameters():
        if not tensor.isfinite().all():
            raise InputError(f"model.path: {name} of {path!r} holds NaN or Inf; finite weights are accepted")
    model.to(device).eval().requires_grad_(False)  # type: ignore[arg-type]  # as above
    return LoadedModel(model, tokenizer)


def pick_seq(seq: int | str, model: PreTrainedModel, usual: int = 256) -> int:
    """Tokens a window: `auto` is the usual, or as many as the model has positions. Raises InputError for more."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(seq, str):  # auto
        return min(usual, positions or usual)
    if positions and seq > positions:
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
    """Quantize a model that is in memory, in place: every linear layer but the output head, as `QBenchConfig` does on the
    way from disk, to the same bits.

    format, block, dq and options: what `formats.get` takes. Returns the model. Raises InputError, before anything is
    changed, for what is no format, for a model without such layers, and naming the weight that is tied, NaN or Inf. A
    linear layer that computes something else than a product is left, and named in a warning.
    """
    recipe = Recipe.of({"name": format, "block": block, "dq": dq, **options}, {})
    held = {name: Spec.of(tensor) for name, tensor in model.state_dict().items()}
    layers = skeleton.layers_of(model, held, type(model).__name__)
    warn_of_left(model)
    dtypes = {name: weight_of(layer).dtype for name, layer in layers.items()}
    replace(model, quantize(layers, recipe.format))
    model.config = copy.copy(model.config)  # other models may have been made from it, and are not packed
    tell(model, Recipe.of(recipe.arguments, dtypes))
    return model


def held_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())
