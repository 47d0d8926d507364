"""The loop of the fine-tune, which trains whatever of a model requires a gradient."""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, get_scheduler

from qbench.errors import InputError
from qbench.settings import FULL, SCHEDULES, TuneSettings
from qbench.training.losses import NOTHING, logits_of, next_token_loss

from . import optim

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass
class TuneLog:
    """What the training left: a loss (nats a token), gradient norm, lr and tokens/s a step.

    padding: the share of what went through the model that was no text. optimizer: bytes of its states, and the pages that
    moved (`optim.footprint`).
    """

    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    tokens_s: list[float] = field(default_factory=list)
    trainable: int = 0
    padding: float = 0.0
    optimizer: dict[str, int] = field(default_factory=dict)


def train(
    model: "PreTrainedModel | PeftModel",
    examples: Sequence[Tensor] | Tensor,
    settings: TuneSettings,
    seed: int,
    advance: Callable[[int, float, float], None] = lambda step, loss, tokens_s: None,
) -> TuneLog:
    """Train what requires a gradient on examples, int64 [length] each, in an order that `seed` shuffles.

    The gradient is that of the mean over all targets of a batch, whatever the parts it is taken in. `advance` is told
    each step from 1 on, its loss and its tokens/s. Raises FloatingPointError where the loss is not finite,
    InputError where no gradient reaches what is trained.
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
    order = _order([len(example) for example in examples], settings, seed)
    torch.manual_seed(seed)  # dropout
    tokens = passed = 0
    full = settings.method == FULL  # whose weights are fp32: the products are in 16 bit all the same
    with _training_mode(model, settings.checkpointing):
        for step in range(settings.steps):
            started = time.perf_counter()
            batch = [examples[i] for i in order[step * settings.batch : (step + 1) * settings.batch]]
            length = sum(map(len, batch))
            total = 0.0
            with torch.autocast(device.type, torch.bfloat16) if full else nullcontext():
                for start in range(0, settings.batch, settings.batch // settings.accumulate):
                    rows = batch[start : start + settings.batch // settings.accumulate]
                    # padded at the end, which the text of a causal model does not see: no mask is needed
                    part = pad_sequence(rows, batch_first=True, padding_value=NOTHING).to(device)
                    loss = next_token_loss(logits_of(model, part.clamp(min=0)), part, length - len(batch))
                    if not loss.requires_grad:  # Reformer's layers compute gradients by themselves
                        raise InputError(
                            f"tune.method: {settings.method} does not work on this model, which hands no gradient to its "
                            "layers; accepted: full, or tune=none"
                        )
                    loss.backward()
                    total += loss.item()
                    passed += part.numel()
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
            tokens += length
            log.tokens_s.append(length / (time.perf_counter() - started))
            advance(step + 1, total, log.tokens_s[-1])
    log.padding = 1 - tokens / passed
    log.optimizer = optim.footprint(optimizer)
    return log


def _order(lengths: list[int], settings: TuneSettings, seed: int) -> list[int]:
    """Which example comes when: shuffled anew each epoch, or with `group_by_length` so that a batch is of alike length."""
    generator = torch.Generator().manual_seed(seed)
    needed = settings.steps * settings.batch
    order: list[int] = []
    if settings.group_by_length:
        from transformers.trainer_pt_utils import LengthGroupedSampler  # seconds to import

        epoch = LengthGroupedSampler(settings.batch, lengths=lengths, generator=generator)
    while len(order) < needed:
        some = list(epoch) if settings.group_by_length else torch.randperm(len(lengths), generator=generator).tolist()
        # a batch of the end of one epoch and the start of the next would be of two lengths
        whole = len(some) // settings.batch * settings.batch if settings.group_by_length else 0
        order += some[: whole or None]
    return order


@contextmanager
def _training_mode(model: "PreTrainedModel | PeftModel", checkpointing: bool) -> Iterator[None]:
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
