"""What a plan assumes: typed, checked, and all of it printed."""

import re
from dataclasses import dataclass, field, replace
from typing import Any

import torch

import formats
from formats import Format
from qbench import keys
from qbench.errors import InputError

ATTENTION = {"sdpa": "sdpa", "flash": "sdpa", "eager": "eager"}  #: what a model is told
UNQUANTIZED = formats.get("none")
UNITS = {"B": 1} | {f"{p}B": 10 ** (3 * (i + 1)) for i, p in enumerate("KMGT")}
UNITS |= {f"{p}IB": 2 ** (10 * (i + 1)) for i, p in enumerate("KMGT")}
#: CUDA's context with cuBLAS' workspace, and what an allocator loses to rounding: of the order that GPUs of 2020 on show
CONTEXT, FRAGMENTATION = 500_000_000, 5.0


def size(name: str, value: object) -> int:
    """Bytes of `24GB` (10⁹) or `24GiB` (2³⁰). Raises InputError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B)\s*", str(value).upper())
    if not found or found[2] not in UNITS:
        raise InputError(f"{name}: {value!r} is no size; accepted: a number with a unit, such as 24GB, 24GiB or 800MB")
    return round(float(found[1]) * UNITS[found[2]])


@dataclass(frozen=True)
class Dtypes:
    """What is stored in which dtype. compute: of the activations. None: embeddings, head and norms are in compute's,
    gradients in that of what is trained. states: of an optimizer that does not hold them in 8 bits.
    """

    compute: str = "bfloat16"
    embeddings: str | None = None
    head: str | None = None
    norms: str | None = None
    adapters: str = "float32"
    gradients: str | None = None
    states: str = "float32"

    def __post_init__(self) -> None:
        keys.check(keys.PLAN, vars(self), "dtype.")

    def of(self, name: str) -> torch.dtype:
        return getattr(torch, getattr(self, name) or self.compute)


@dataclass(frozen=True)
class PlanSettings:
    """format: in a sweep any, which it replaces. gpu, context: bytes. fragmentation: per cent of what is allocated.
    targets: `all`, or the ends of the names of the layers that carry adapters. The rest is as in conf/plan/config.yaml.
    Raises InputError.
    """

    format: Format = UNQUANTIZED
    method: str = "lora"
    rank: int = 16
    targets: str | tuple[str, ...] = "all"
    dropout: float = 0.0
    batch: int = 4
    accumulate: int = 1
    seq: int = 256
    checkpointing: bool = False
    attention: str = "sdpa"
    optimizer: str = "adamw"
    dtype: Dtypes = field(default_factory=Dtypes)
    device: str = "cuda"
    gpu: int | None = None
    context: int | None = None
    fragmentation: float | None = None

    def __post_init__(self) -> None:
        told = {name: value for name, value in vars(self).items() if name not in ("format", "dtype", "gpu", "context")}
        keys.check(keys.PLAN, told)
        if self.batch % self.accumulate:
            raise InputError(f"accumulate: {self.accumulate} does not divide batch={self.batch}")
        if self.method == "full" and self.format.name != "none":
            raise InputError(f"method: full trains 16-bit weights, not {self.format.name}; accepted with +format=none")

    @property
    def trains(self) -> bool:
        return self.method != "none"

    @property
    def paged(self) -> bool:
        return self.trains and self.optimizer.startswith("paged")

    @property
    def part(self) -> int:
        """Windows that go through the model at once."""
        return self.batch // self.accumulate

    @property
    def context_bytes(self) -> int:
        return self.context if self.context is not None else CONTEXT * (self.device == "cuda")

    @property
    def fragmentation_percent(self) -> float:
        return self.fragmentation if self.fragmentation is not None else FRAGMENTATION * (self.device == "cuda")

    def but(self, **changes: Any) -> "PlanSettings":
        return replace(self, **changes)
