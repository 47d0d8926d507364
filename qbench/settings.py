"""The settings of a run: typed, checked, and the same for the command line and Python."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from qbench import keys
from qbench.errors import InputError

if TYPE_CHECKING:
    from formats import Format  # it imports PyTorch, which takes seconds; mistakes are reported before that

FULL = "full"  #: the method that trains all weights of a 16-bit model
LOW_RANK = ("lora", "dora", "rslora")
PROMPTS = ("prefix", "p_tuning")  #: methods that put virtual tokens before the text
METHODS = keys.METHODS
SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine"}  #: and transformers' names for them


@dataclass(frozen=True)
class ModelSettings:
    """path: a folder or a hub id; None for the bundled model. dtype: auto, bfloat16, float16 or float32.

    revision: branch, tag or commit of a hub id. trust_remote_code: run the Python code in the model's repository.
    """

    path: str | None = None
    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        keys.check(keys.RUN, vars(self), "model.")


@dataclass(frozen=True)
class DataSettings:
    """path: a text or .jsonl file, or the name of a bundled text.

    seq: tokens in a window; `auto` is 256, or the model's positions if those are fewer.
    """

    path: str = "kjv"
    seq: int | str = "auto"

    def __post_init__(self) -> None:
        keys.check(keys.RUN, vars(self), "data.")


@dataclass(frozen=True)
class EvalSettings:
    """tokens: held-out tokens to score, rounded up to whole windows.

    tasks: lm-eval tasks to score too (`measure.task_files`). limit: documents of each task, None for all. batch: requests
    at once.
    """

    tokens: int = 16384
    tasks: Sequence[str] = ()
    limit: int | None = None
    batch: int = 8

    def __post_init__(self) -> None:
        keys.check(keys.RUN, vars(self), "eval.")
        object.__setattr__(self, "tasks", [self.tasks] if isinstance(self.tasks, str) else list(self.tasks))

    def plain(self) -> dict:
        """The settings as JSON. Without tasks, `limit` and `batch` do not affect the result and are left out."""
        return asdict(self) if self.tasks else {"tokens": self.tokens}


@dataclass(frozen=True)
class TuneSettings:
    """method: one of METHODS. steps: optimizer steps, each on `batch` examples, which are split into `accumulate` parts.

    group_by_length: train on documents, or `data.seq` tokens of longer ones, in batches of similar length. Otherwise an
    example is a window filled with text.

    rank, alpha, dropout: of LoRA. init, init_rounds: the initial A and B (`training.lora_init`). virtual_tokens: for
    prefix tuning and P-tuning. checkpointing: recompute activations in the backward pass instead of keeping them.
    merge: measure the merged adapters. adapter_format, adapter_block: measure adapters quantized to this format.

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
    optimizer_page: int | str = "2MiB"
    merge: bool = False
    adapter_format: str | None = None
    adapter_block: int = 64

    def __post_init__(self) -> None:
        keys.check(keys.RUN, vars(self), "tune.")
        if self.method not in METHODS:
            raise InputError(f"tune.method: {self.method} has no settings; accepted: {', '.join(METHODS)}")
        if self.init != "default" and self.method not in LOW_RANK:
            raise InputError(f"tune.init: {self.init} is for {', '.join(LOW_RANK)}; {self.method} takes default")
        if (self.merge or self.adapter_format) and self.method not in LOW_RANK:
            raise InputError(f"tune.merge: {self.method} has no low-rank matrices; accepted with {', '.join(LOW_RANK)}")
        if self.method == "prefix" and self.checkpointing:
            raise InputError(
                "tune.checkpointing: true is not possible with prefix, which needs a cache; accepted: false"
            )
        if self.adapter_format is not None:  # a mistake is reported before hours of training, not after
            self.format_of_adapters()
        if self.batch % self.accumulate:
            raise InputError(f"tune.accumulate: {self.accumulate} does not divide tune.batch={self.batch}")
        if self.optimizer_budget is not None and self.optimizer not in keys.PAGED:
            takers = " or ".join(f"tune.optimizer={name}" for name in keys.PAGED)
            raise InputError(
                f"tune.optimizer_budget: {self.optimizer_budget!r} is not accepted with tune.optimizer={self.optimizer};"
                f" null is, or {takers}"
            )
        if self.optimizer_budget is not None:
            keys.check_paging(self.optimizer_budget, self.optimizer_page)

    def format_of_adapters(self) -> "Format":
        """The format that adapters are quantized to, to measure them."""
        import formats
        from formats.contract import first_line

        try:
            return formats.get(str(self.adapter_format), block=self.adapter_block)
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"tune.adapter_format: {first_line(error)}") from error


@dataclass(frozen=True)
class Settings:
    """All settings of a run. tune: None for no fine-tune."""

    format: "Format"
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    tune: TuneSettings | None = field(default_factory=TuneSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        keys.check(keys.RUN, {"seed": self.seed, "device": self.device})
        if self.tune and self.tune.method == FULL and self.format.name != "none":
            raise InputError(
                f"tune.method: full trains the weights themselves, which {self.format.name} quantizes; accepted with"
                " it: +format=none"
            )

    @property
    def formats(self) -> list["Format"]:
        """The formats that affect the result: that of the weights, and that of quantized adapters."""
        if self.tune and self.tune.adapter_format:
            return [self.format, self.tune.format_of_adapters()]
        return [self.format]

    def plain(self, **resolved: str | int) -> dict:
        """The configuration as JSON. resolved: values for a device, dtype and seq of `auto`."""
        model, data = asdict(self.model), asdict(self.data)
        return {
            "format": _plain(self.format),
            "block": self.format.block,
            "dq": self.format.dq,
            "seed": self.seed,
            "device": resolved.get("device", self.device),
            "model": {**model, "dtype": resolved.get("dtype", self.model.dtype)},
            "data": {**data, "seq": resolved.get("seq", self.data.seq)},
            "tune": asdict(self.tune) if self.tune else {"method": "none"},
            "eval": self.eval.plain(),
        }


def parts(config: dict) -> dict[str, Any]:
    """The typed parts of a resolved config, except its format. Raises InputError."""
    tune = config["tune"]
    return {
        "model": ModelSettings(**config["model"]),
        "data": DataSettings(**config["data"]),
        "tune": None if tune["method"] == "none" else TuneSettings(**tune),
        "eval": EvalSettings(**config["eval"]),
    }


def _plain(fmt: "Format") -> dict:
    """A format as JSON: its name and source, and for a format of another package its class."""
    from formats.registry import ours

    plain, cls = {"name": fmt.name, "source": fmt.source}, type(fmt)
    return plain if ours(cls) else {**plain, "class": f"{cls.__module__}.{cls.__qualname__}"}
