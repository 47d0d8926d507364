"""Models on disk: 16-bit checkpoints, packed ones, and those of bitsandbytes and GGUF.

A path or hub id comes in, and a model goes out; or a model comes in, and a folder is written. Read `packed_checkpoint`
first.

    packed_checkpoint     finds, loads and saves packed checkpoints; quantizes a model in memory
    loading               loads the model that a run starts from
    location              finds a model: a folder, a GGUF file, or a download from the hub
    sixteen_bit           opens, checks and loads 16-bit checkpoints
    recipe                how a checkpoint is packed, as in its config.json: format, block, dtypes
    safetensors_io        reads and writes safetensors files one tensor at a time
    tensor_names          matches the names in files with the names in a model
    empty_model           a model without weights, and checks of a checkpoint against it
    auto_classes          transformers' Auto classes, without code from checkpoints
    transformers_plugin   lets `from_pretrained` and `save_pretrained` handle packed models
    layouts/              reads bitsandbytes and GGUF, writes bitsandbytes
    streaming/            packs a checkpoint without loading the model: `python -m qbench quantize`
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .packed_checkpoint import find, load, save

__all__ = ["find", "load", "save"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import packed_checkpoint  # late: `transformers_plugin` is imported while transformers is half imported

    return getattr(packed_checkpoint, name)
