"""Models on disk: 16-bit checkpoints, packed ones, and those of bitsandbytes and GGUF.

In comes a path, which `location` finds; out comes a model, or a folder that holds one. `loading` opens what a run starts
from, `packed` loads and saves packed folders, `streaming` writes one without the model. Read `packed` first.
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
