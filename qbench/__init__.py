"""qbench: which weight quantization format should go under a LoRA fine-tune?

`import qbench` lets transformers load and save packed models and lets PEFT put adapters on them. It is fast, because it
imports neither library: its plug-ins are imported when you import the library.

The parts, from the bottom to the top; each imports only from those above it in this list:

    errors, keys, settings   the settings that a user can choose, and the error for a bad one
    system/      helpers for files, locks, messages and imports
    results/     result.json: its schema, reading and writing it, and loading many into one DataFrame
    ops/         the kernels
    model/       QuantLinear, the layer that holds a packed weight, and which layers it replaces
    checkpoint/  models on disk: 16-bit checkpoints, packed ones, those of bitsandbytes and GGUF
    training/    the fine-tune: text, adapters, losses, optimizers, the loop
    measure/     error, quality, memory, throughput, tasks, and their statistics
    report/      pages for people: one run, and a comparison of many
    runs/        one run, from the model to its report; start with runs/experiment.py
    testing/     check_format, for authors of a format
    plan/        the memory that a training step needs, computed before anything is loaded
    bench/       measures the speed of the kernels and of a training step
    cli/         the commands, and `qbench.run`, the same in Python

    assets/      the bundled model, texts and tasks
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qbench.system import import_hooks
from qbench.system.version import VERSION

if TYPE_CHECKING:
    from qbench.checkpoint.packed_checkpoint import pack
    from qbench.checkpoint.transformers_plugin import QBenchConfig
    from qbench.cli.api import Result, run
    from qbench.results.dataframe import load

__all__ = ["QBenchConfig", "Result", "load", "pack", "run"]
__version__ = VERSION

#: public names and their modules, which are imported when the name is first used
_LAZY = {
    "QBenchConfig": "qbench.checkpoint.transformers_plugin",
    "Result": "qbench.cli.api",
    "load": "qbench.results.dataframe",
    "pack": "qbench.checkpoint.packed_checkpoint",
    "run": "qbench.cli.api",
}

import_hooks.install()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value
