"""The loop of the fine-tune, which trains whatever of a model requires a gradient."""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import get_scheduler

from . import optim
from .functions import logits_of, next_token_loss
from .settings import FULL, SCHEDULES, TuneSettings


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
    full = settings.method == FULL  # whose weights are fp32: the products are in 16 bit all the same
    with _training_mode(model, settings.checkpointing):
        for step in range(settings.steps):
            started = time.perf_counter()
            batch = windows[order[step * settings.batch : (step + 1) * settings.batch]].to(device)
            total = 0.0
            with torch.autocast(device.type, torch.bfloat16) if full else nullcontext():
                for part in batch.chunk(settings.accumulate):
                    loss = next_token_loss(logits_of(model, part), part) / settings.accumulate
                    loss.backward()
                    total += loss.item()
            if not total < float("inf"):
                raise FloatingPointError(
                    f"the loss of step {step + 1} is {total}; a lower tune.lr={settings.lr} may help"
                )
            norm = nn.utils.clip_grad_norm_(parameters, settings.clip)
            log.lr.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            log.loss.append(total)
            log.grad_norm.append(norm.item())
            log.tokens_s.append(batch.numel() / (time.perf_counter() - started))
            advance(total, log.tokens_s[-1])
    log.optimizer = optim.footprint(optimizer)
    return log


@contextmanager
def _training_mode(model: nn.Module, checkpointing: bool) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of a new name for it
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        try:
            yield
        finally:
            model.eval()
            if checkpointing:
                model.gradient_checkpointing_disable()
