"""LoRA on a quantized model: PEFT's adapters, and the loop that trains them."""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel, get_scheduler

from . import optim
from .errors import InputError, integer
from .functions import add_low_rank, next_token_loss
from .layers import QuantLinear

SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine"}


@dataclass(frozen=True)
class TuneSettings:
    """steps: optimizer steps, each of `batch` windows, taken `accumulate` at a time. rank, alpha, dropout: LoRA's.

    schedule: constant or cosine, after `warmup` steps. clip: largest norm of the gradient. optimizer_budget: bytes of
    optimizer states on the device, such as 67108864, "64MB" or "1.5GiB", for the paged optimizers; None for no limit.
    optimizer_page: bytes that move between device and host at once.
    """

    method: str = "lora"
    steps: int = 40
    batch: int = 4
    accumulate: int = 1
    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    lr: float = 1e-3
    schedule: str = "cosine"
    warmup: int = 5
    weight_decay: float = 0.0
    clip: float = 1.0
    optimizer: str = "adamw"
    optimizer_budget: int | str | None = None
    optimizer_page: int | str = optim.PAGE

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "rank"):
            integer(f"tune.{name}", getattr(self, name))
        for name, names in (("optimizer", optim.OPTIMIZERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in names:
                raise InputError(f"tune.{name}: {getattr(self, name)!r} is unknown; accepted: {', '.join(names)}")
        if self.batch % self.accumulate:
            raise InputError(f"tune.accumulate: {self.accumulate} does not divide tune.batch={self.batch}")
        optim.checked(self.optimizer_budget, self.optimizer_page)
        if self.optimizer_budget is not None and self.optimizer not in optim.PAGED:
            takers = " or ".join(f"tune.optimizer={name}" for name in optim.PAGED)
            raise InputError(
                f"tune.optimizer_budget: {self.optimizer_budget!r} is not accepted with tune.optimizer={self.optimizer};"
                f" null is, or {takers}"
            )


@dataclass
class TuneLog:
    """What the training left: a loss (nats a token), gradient norm, lr and tokens/s a step.

    optimizer: bytes of its states, and the pages that moved (`optim.footprint`).
    """

    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    tokens_s: list[float] = field(default_factory=list)
    trainable: int = 0
    optimizer: dict[str, int] = field(default_factory=dict)


class LoraQuantLinear(LoraLinear):
    """LoRA on a QuantLinear: PEFT's own layer, whose base is packed and so cannot be merged into.

    One plain adapter, the usual case, is a single step of autograd, which keeps x in its own dtype.
    """

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        active = [name for name in self.active_adapters if name in self.lora_A]
        plain = not (self.disable_adapters or self.lora_variant or args or kwargs)
        if not plain or len(active) != 1 or self.lora_B[active[0]].bias is not None:
            return super().forward(x, *args, **kwargs)
        name = active[0]
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        return add_low_rank(self.base_layer(x), self.lora_dropout[name](x), a, b, self.scaling[name])

    def merge(self, *args, **kwargs):
        raise TypeError("a packed weight cannot take up an adapter; dequantize the model before merging")


def knows_quant_linear(config: LoraConfig) -> LoraConfig:
    """Tell a LoraConfig how LoRA goes on a QuantLinear."""
    config._register_custom_module({QuantLinear: LoraQuantLinear})
    return config


def add_lora(model: PreTrainedModel, targets: list[str], settings: TuneSettings, seed: int) -> PeftModel:
    """Adapters in fp32 on the named layers, B at zero: the model's output is what it was."""
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT doubts a layer that is not its own, and calls what transformers renamed
        return get_peft_model(model, knows_quant_linear(config))


def load_lora(model: PreTrainedModel, folder: Path | str) -> PeftModel:
    """The model, quantized as it was, with the adapters that `save_pretrained` left in a folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(model, folder, config=knows_quant_linear(LoraConfig.from_pretrained(folder)))


def train(
    model: nn.Module,
    windows: Tensor,
    settings: TuneSettings,
    seed: int,
    advance: Callable[[float, float], None] = lambda loss, tokens_s: None,
) -> TuneLog:
    """Train what requires a gradient on windows [n, seq] of tokens, in an order that `seed` shuffles.

    `advance` is told the loss and the tokens/s of each step. Raises FloatingPointError where the loss is not finite.
    """
    device = next(model.parameters()).device
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.build(
        settings.optimizer,
        parameters,
        settings.lr,
        settings.weight_decay,
        settings.optimizer_budget,
        settings.optimizer_page,
    )
    schedule = get_scheduler(
        SCHEDULES[settings.schedule], optimizer, min(settings.warmup, settings.steps - 1), settings.steps
    )
    log = TuneLog(trainable=sum(p.numel() for p in parameters))
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # dropout
    epochs = settings.steps * settings.batch // len(windows) + 1
    order = torch.cat([torch.randperm(len(windows), generator=generator) for _ in range(epochs)])
    model.train()
    for step in range(settings.steps):
        started = time.perf_counter()
        batch = windows[order[step * settings.batch : (step + 1) * settings.batch]].to(device)
        total = 0.0
        for part in batch.chunk(settings.accumulate):
            loss = next_token_loss(model(input_ids=part, use_cache=False).logits, part) / settings.accumulate
            loss.backward()
            total += loss.item()
        if not total < float("inf"):
            raise FloatingPointError(f"the loss of step {step + 1} is {total}; a lower tune.lr={settings.lr} may help")
        norm = nn.utils.clip_grad_norm_(parameters, settings.clip)
        log.lr.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        log.loss.append(total)
        log.grad_norm.append(norm.item())
        log.tokens_s.append(batch.numel() / (time.perf_counter() - started))
        advance(total, log.tokens_s[-1])
    model.eval()
    log.optimizer = optim.footprint(optimizer)
    return log
