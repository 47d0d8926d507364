"""qbench: which weight quantization format should go under a LoRA fine-tune?

Once this is imported, transformers loads and saves packed models, and PEFT puts adapters on them. It takes no time: what
knows of them is imported after they are.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .imports import after

if TYPE_CHECKING:
    from .api import Result, run
    from .models import pack
    from .pretrained import QBenchConfig
    from .record import load

__all__ = ["QBenchConfig", "Result", "load", "pack", "run"]
__version__ = "0.1.0"

# imported once one is asked for, with all that it needs
_LATER = {
    "QBenchConfig": "qbench.pretrained",
    "Result": "qbench.api",
    "load": "qbench.record",
    "pack": "qbench.models",
    "run": "qbench.api",
}


after("transformers.quantizers.auto", "qbench.pretrained")
after("transformers.modeling_utils", "qbench.counting")
after("peft", "qbench.lora")
after("torch.distributed.fsdp._fully_shard._fsdp_param", "qbench.fsdp")


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = getattr(import_module(_LATER[name]), name)
    return found
