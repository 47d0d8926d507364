"""The settings of a plan: typed, checked, and printed with every plan."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch

import formats
from formats import Format
from qbench import keys
from qbench.errors import InputError
from qbench.settings import FULL, LOW_RANK, TuneSettings

#: `attention=` and what transformers calls it
ATTENTION = {"sdpa": "sdpa", "flash": "sdpa", "eager": "eager"}
UNQUANTIZED = formats.get("none")
METHODS = (*LOW_RANK, FULL, "none")  #: the methods whose step can be counted
#: bytes of CUDA's context with cuBLAS' workspace, and per cent that an allocator loses to rounding: typical since 2020
CONTEXT, FRAGMENTATION = 500_000_000, 5.0


@dataclass(frozen=True)
class Dtypes:
    """The dtypes of everything that a step holds.

    compute: activations. embeddings, head, norms: None for the dtype of `compute`. adapters: A and B. gradients: None
    for the dtype of the trained tensors. states: an optimizer's, unless it holds them in 8 bits. Raises InputError.
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
        """The dtype of a field, or that of `compute` where the field is None."""
        return getattr(torch, getattr(self, name) or self.compute)


@dataclass(frozen=True)
class PlanSettings:
    """The assumptions of a plan. A key of conf/ sets each field (`key_of`).

    format: ignored where formats are compared. batch: windows a step. targets: `all`, or endings of the names of the
    layers with adapters. gpu, context: bytes. fragmentation: per cent of the allocated bytes. Raises InputError.
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
    optimizer_budget: int | str | None = None
    optimizer_page: int | str = "2MiB"
    dtype: Dtypes = field(default_factory=Dtypes)
    device: str = "cuda"
    gpu: int | None = None
    context: int | None = None
    fragmentation: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name not in ("format", "dtype"):
                keys.PLAN[key_of(name)].check(key_of(name), value)
        if self.method not in METHODS:
            raise InputError(
                f"tune.method: the memory of {self.method} is not counted; accepted in a plan: {', '.join(METHODS)}"
            )
        if self.trains:
            self.tune()
        if self.method == FULL and self.format.name != "none":
            raise InputError(
                f"tune.method: full trains 16-bit weights, not {self.format.name}; accepted with it: +format=none"
            )

    def tune(self, **changes: Any) -> TuneSettings:
        """The fine-tune of a run with these settings. Raises InputError."""
        names = {f.name for f in dataclasses.fields(TuneSettings)} & vars(self).keys()
        return TuneSettings(**{name: getattr(self, name) for name in names} | changes)

    @property
    def trains(self) -> bool:
        return self.method != "none"

    @property
    def low_rank(self) -> bool:
        """Whether adapters with matrices A and B are trained."""
        return self.method in LOW_RANK

    @property
    def paged(self) -> bool:
        return self.trains and self.optimizer in keys.PAGED

    @property
    def windows_at_once(self) -> int:
        """Windows in one part of a batch."""
        return self.batch // self.accumulate

    @property
    def context_bytes(self) -> int:
        return self.context if self.context is not None else CONTEXT * (self.device == "cuda")

    @property
    def fragmentation_percent(self) -> float:
        return self.fragmentation if self.fragmentation is not None else FRAGMENTATION * (self.device == "cuda")

    def replace(self, **changes: Any) -> "PlanSettings":
        return dataclasses.replace(self, **changes)


def key_of(name: str) -> str:
    """The key that sets a field of PlanSettings: `rank` is tune.rank, `seq` is data.seq, `gpu` is gpu."""
    return next(key for key in (name, f"tune.{name}", f"data.{name}") if key in keys.PLAN)
