"""What a run is told: typed, checked, and the same from a command line or a notebook."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import formats
from formats import Format
from formats.contract import first_line
from formats.registry import ours

from . import optim, starts
from .errors import InputError, integer

FULL = "full"  #: all weights of a 16-bit model
LOW_RANK = ("lora", "dora", "rslora")
PROMPTS = ("prefix", "p_tuning")  #: which put virtual tokens before the text
METHODS = (*LOW_RANK, "ia3", *PROMPTS, FULL)
SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine"}  #: and transformers' names for them


@dataclass(frozen=True)
class ModelSettings:
    """path: a folder or a hub id, None the bundled model. dtype: auto, bfloat16, float16 or float32."""

    path: str | None = None
    dtype: str = "auto"
    revision: str | None = None


@dataclass(frozen=True)
class DataSettings:
    """path: a text or .jsonl file, or the name of a bundled text. seq: tokens a window; `auto` is 256, or what the model
    can."""

    path: str = "kjv"
    seq: int | str = "auto"

    def __post_init__(self) -> None:
        if self.seq != "auto":
            integer("data.seq", self.seq, at_least=2)


@dataclass(frozen=True)
class EvalSettings:
    """tokens: held-out tokens that are scored, rounded up to whole windows.

    tasks: lm-eval tasks to score too (`measure.task_files`). limit: documents of each, None all. batch: requests at once.
    """

    tokens: int = 16384
    tasks: Sequence[str] = ()
    limit: int | None = None
    batch: int = 8

    def __post_init__(self) -> None:
        integer("eval.tokens", self.tokens)
        integer("eval.batch", self.batch)
        if self.limit is not None:
            integer("eval.limit", self.limit)
        tasks = [self.tasks] if isinstance(self.tasks, str) else self.tasks
        if not isinstance(tasks, list | tuple) or not all(isinstance(task, str) and task for task in tasks):
            raise InputError(
                f"eval.tasks: {self.tasks!r} is not accepted; a list of tasks is, such as [qbench_docs,my_tasks]"
            )
        object.__setattr__(self, "tasks", list(tasks))

    def plain(self) -> dict:
        """Without tasks, what is told of them is left out: it has no part in the result."""
        return asdict(self) if self.tasks else {"tokens": self.tokens}


@dataclass(frozen=True)
class TuneSettings:
    """method: one of METHODS. steps: optimizer steps, each of `batch` examples, taken in `accumulate` parts.

    group_by_length: an example is a document, or `data.seq` tokens of it, and a batch is of those of alike length; else
    it is a window, filled with text.

    rank, alpha, dropout: LoRA's. init, init_rounds: where it begins (`starts`). virtual_tokens: of prefix tuning and
    P-tuning. checkpointing: recompute the activations of a block in the backward pass rather than keep them. merge,
    adapter_format, adapter_block: what is measured of the trained adapters afterwards (`merge`).

    schedule: constant or cosine, after `warmup` steps. clip: largest norm of the gradient. optimizer_budget: bytes of
    optimizer states on the device, such as 67108864, "64MB" or "1.5GiB", for the paged optimizers; None for no limit.
    optimizer_page: bytes that move between device and host at once.
    """

    method: str = "lora"
    steps: int = 40
    batch: int = 4
    accumulate: int = 1
    group_by_length: bool = False
    checkpointing: bool = False
    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    init: str = "default"
    init_rounds: int = 5
    virtual_tokens: int = 16
    lr: float = 1e-3
    schedule: str = "cosine"
    warmup: int = 5
    weight_decay: float = 0.0
    clip: float = 1.0
    optimizer: str = "adamw"
    optimizer_budget: int | str | None = None
    optimizer_page: int | str = optim.PAGE
    merge: bool = False
    adapter_format: str | None = None
    adapter_block: int = 64

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "rank", "virtual_tokens", "init_rounds", "adapter_block"):
            integer(f"tune.{name}", getattr(self, name))
        for name in ("group_by_length", "checkpointing", "merge"):
            if not isinstance(value := getattr(self, name), bool):
                raise InputError(f"tune.{name}: {value!r} is not accepted; true or false is")
        for name, names in (
            ("method", METHODS),
            ("init", starts.INITS),
            ("optimizer", optim.OPTIMIZERS),
            ("schedule", SCHEDULES),
        ):
            if getattr(self, name) not in names:
                raise InputError(f"tune.{name}: {getattr(self, name)!r} is unknown; accepted: {', '.join(names)}")
        if self.init != "default" and self.method not in LOW_RANK:
            raise InputError(f"tune.init: {self.init} is for {', '.join(LOW_RANK)}; {self.method} takes default")
        if (self.merge or self.adapter_format) and self.method not in LOW_RANK:
            raise InputError(f"tune.merge: {self.method} has no low-rank matrices; accepted with {', '.join(LOW_RANK)}")
        if self.adapter_format is not None:  # to be known before hours of training, not after
            try:
                formats.get(self.adapter_format, block=self.adapter_block)
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"tune.adapter_format: {first_line(error)}") from error
        if self.batch % self.accumulate:
            raise InputError(f"tune.accumulate: {self.accumulate} does not divide tune.batch={self.batch}")
        optim.checked(self.optimizer_budget, self.optimizer_page)
        if self.optimizer_budget is not None and self.optimizer not in optim.PAGED:
            takers = " or ".join(f"tune.optimizer={name}" for name in optim.PAGED)
            raise InputError(
                f"tune.optimizer_budget: {self.optimizer_budget!r} is not accepted with tune.optimizer={self.optimizer};"
                f" null is, or {takers}"
            )


@dataclass(frozen=True)
class Settings:
    """All that a run depends on. tune: None to leave the fine-tuning out."""

    format: Format
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    tune: TuneSettings | None = field(default_factory=TuneSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        integer("seed", self.seed, at_least=0)
        if self.tune and self.tune.method == FULL and self.format.name != "none":
            raise InputError(
                f"tune.method: full trains the weights themselves, which {self.format.name} keeps as they are; accepted"
                " with it: +format=none"
            )

    @property
    def formats(self) -> list[Format]:
        """All that have a part in the numbers."""
        if self.tune and self.tune.adapter_format:
            return [self.format, formats.get(self.tune.adapter_format, block=self.tune.adapter_block)]
        return [self.format]

    def plain(self, **found: str | int) -> dict:
        """The configuration as JSON holds it; `found` tells device, dtype and seq once they are no longer `auto`."""
        model, data = asdict(self.model), asdict(self.data)
        return {
            "format": _plain(self.format),
            "block": self.format.block,
            "dq": self.format.dq,
            "seed": self.seed,
            "device": found.get("device", self.device),
            "model": {**model, "dtype": found.get("dtype", self.model.dtype)},
            "data": {**data, "seq": found.get("seq", self.data.seq)},
            "tune": asdict(self.tune) if self.tune else {"method": "none"},
            "eval": self.eval.plain(),
        }


def _plain(fmt: Format) -> dict:
    """The name tells a format of ours; one of another package is told by its class as well."""
    plain, cls = {"name": fmt.name, "source": fmt.source}, type(fmt)
    return plain if ours(cls) else {**plain, "class": f"{cls.__module__}.{cls.__qualname__}"}
