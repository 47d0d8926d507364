"""qbench: which weight quantization format should go under a LoRA fine-tune?

`import qbench` lets transformers load and save packed models and lets PEFT put adapters on them. It is fast: it imports
neither library, but waits until you do.

The rooms, from the bottom to the top; each imports only from those before it:

    errors, keys, settings   what a user may ask for, and what is raised when it is not accepted
    system/      files, locks, messages, imports: what qbench needs from Python and the operating system
    results/     result.json: its schema, reading and writing it, many of them as one DataFrame
    ops/         the kernels
    model/       QuantLinear, the layer that holds a packed weight, and which layers it replaces
    checkpoint/  models on disk: 16-bit checkpoints, packed ones, those of bitsandbytes and GGUF
    training/    the fine-tune: text, adapters, losses, optimizers, the loop
    measure/     error, quality, memory, throughput, tasks, and their statistics
    report/      what a person reads: a run on one page, many runs compared
    runs/        one run, from the model to its report; start with runs/experiment.py
    testing/     check_format, for whoever writes a format
    plan/        the memory that a training step needs, computed before anything is loaded
    bench/       how fast the kernels and a training step are
    cli/         the commands, and `qbench.run`, the same in Python

    assets/      the bundled model, texts and tasks
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from qbench.system import import_hooks

if TYPE_CHECKING:
    from qbench.checkpoint.packed_checkpoint import pack
    from qbench.checkpoint.transformers_plugin import QBenchConfig
    from qbench.cli.api import Result, run
    from qbench.results.dataframe import load

__all__ = ["QBenchConfig", "Result", "load", "pack", "run"]
__version__ = "0.1.0"

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
