"""The training loop. It trains every parameter of the model that requires a gradient."""

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
from qbench.training.losses import IGNORED, logits_of, next_token_loss

from . import optim

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass
class TuneLog:
    """Records of a fine-tune: for each step the loss (nats a token), gradient norm, lr and tokens/s.

    trainable: number of trained parameters. padding: the fraction of the model's input tokens that were padding.
    optimizer: memory of its states, and moved pages (`optim.footprint`).
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
    """Train on examples, int64 [length] each, in an order shuffled with `seed`.

    The loss of a step is the mean over all targets of its batch, also when gradients are accumulated over parts of it.
    advance: called after each step, counted from 1, with its loss and tokens/s. Raises FloatingPointError if the loss is
    not finite, and InputError if no gradient reaches the trained parameters.
    """
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
    order = _training_order([len(example) for example in examples], settings, seed)
    torch.manual_seed(seed)  # dropout
    tokens = padded_tokens = 0
    with _training_mode(model, settings.checkpointing):
        for step in range(settings.steps):
            started = time.perf_counter()
            batch = [examples[i] for i in order[step * settings.batch : (step + 1) * settings.batch]]
            loss, batch_tokens = _accumulate_gradients(model, batch, settings)
            if not loss < float("inf"):
                raise FloatingPointError(
                    f"the loss of step {step + 1} is {loss}; a lower tune.lr={settings.lr} may help"
                )
            norm = nn.utils.clip_grad_norm_(parameters, settings.clip)
            log.lr.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            log.loss.append(loss)
            log.grad_norm.append(norm.item())
            length = sum(map(len, batch))
            tokens += length
            padded_tokens += batch_tokens
            log.tokens_s.append(length / (time.perf_counter() - started))
            advance(step + 1, loss, log.tokens_s[-1])
    log.padding = 1 - tokens / padded_tokens
    log.optimizer = optim.footprint(optimizer)
    return log


def _accumulate_gradients(
    model: "PreTrainedModel | PeftModel", batch: list[Tensor], settings: TuneSettings
) -> tuple[float, int]:
    """Add the gradients of a batch, part by part; returns its loss and its number of tokens with padding."""
    device = next(model.parameters()).device
    targets = sum(map(len, batch)) - len(batch)
    part_size = settings.batch // settings.accumulate
    full = settings.method == FULL  # its weights are fp32, but the products are computed in 16 bit
    total, padded_tokens = 0.0, 0
    with torch.autocast(device.type, torch.bfloat16) if full else nullcontext():
        for start in range(0, settings.batch, part_size):
            # padding is at the end, where a causal model's text does not see it, so no mask is needed
            rows = batch[start : start + part_size]
            part = pad_sequence(rows, batch_first=True, padding_value=IGNORED).to(device)
            loss = next_token_loss(logits_of(model, part.clamp(min=0)), part, targets)
            if not loss.requires_grad:  # Reformer's layers compute their gradients themselves
                raise InputError(
                    f"tune.method: {settings.method} does not work on this model, which hands no gradient to its "
                    "layers; accepted: full, or tune=none"
                )
            loss.backward()
            total += loss.item()
            padded_tokens += part.numel()
    return total, padded_tokens


def _training_order(lengths: list[int], settings: TuneSettings, seed: int) -> list[int]:
    """Example indices in training order, shuffled each epoch; `group_by_length` batches examples of like length."""
    generator = torch.Generator().manual_seed(seed)
    needed = settings.steps * settings.batch
    order: list[int] = []
    if settings.group_by_length:
        from transformers.trainer_pt_utils import LengthGroupedSampler  # seconds to import

        epoch = LengthGroupedSampler(settings.batch, lengths=lengths, generator=generator)
    while len(order) < needed:
        if not settings.group_by_length:
            order += torch.randperm(len(lengths), generator=generator).tolist()
            continue
        indices = list(epoch)
        # a batch across two epochs would mix lengths, so the last, incomplete batch is dropped, unless it is the only one
        whole_batches = len(indices) // settings.batch * settings.batch
        order += indices[: whole_batches or None]
    return order


@contextmanager
def _training_mode(model: "PreTrainedModel | PeftModel", checkpointing: bool) -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers renames an argument
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        try:
            yield
        finally:
            model.eval()
            if checkpointing:
                model.gradient_checkpointing_disable()
