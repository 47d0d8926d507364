"""The plan against reality: a step taken here, with random weights and tokens, its memory measured."""

import gc
from dataclasses import replace

import torch

from qbench.errors import InputError
from qbench.measure.live_tensors import LiveBytes
from qbench.measure.memory import PeakMemory
from qbench.model import quantizing
from qbench.settings import TuneSettings
from qbench.training import optim
from qbench.training.loop import train

from .count import Plan, count
from .settings import ATTENTION, PlanSettings
from .shapes import Shape
from .step import prepare

STEPS = 2  # the second finds the optimizer's states in place


def comparable(shape: Shape, settings: PlanSettings) -> Plan:
    """The plan of what `measure` runs: no context and no fragmentation, every dtype that of PyTorch.

    Raises InputError for a method or an optimizer that cannot be run.
    """
    if not settings.trains or settings.optimizer not in optim.OPTIMIZERS:
        names = ", ".join(optim.OPTIMIZERS)
        raise InputError(f"check: takes a step of method=lora or full, with optimizer={names}; not of this plan")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputError("check: there is no GPU here that PyTorch can use; accepted here: device=cpu")
    dtype = settings.dtype
    trained = dtype.adapters if settings.method == "lora" else dtype.compute
    dtype = replace(dtype, embeddings=None, head=None, norms=None, gradients=None, states=trained)
    return count(shape, settings.but(dtype=dtype, context=0, fragmentation=0))


def measure(shape: Shape, settings: PlanSettings) -> int:
    """The most bytes that the tensors of a fine-tune hold: on a GPU as its allocator, on a CPU as `LiveBytes` counts."""
    device = torch.device(settings.device)
    torch.manual_seed(0)
    built = shape.build(settings.dtype.of("compute"), ATTENTION[settings.attention], settings.device)
    vocabulary = built.config.get_text_config().vocab_size
    model = prepare(built, settings, lambda layers: quantizing.quantize(layers, settings.format))
    del built
    gc.collect()
    windows = list(torch.randint(vocabulary, (STEPS * settings.batch, settings.seq)))
    tune = TuneSettings(
        steps=STEPS,
        batch=settings.batch,
        accumulate=settings.accumulate,
        rank=settings.rank,
        dropout=settings.dropout,
        optimizer=settings.optimizer,
    )
    if device.type == "cuda":
        with PeakMemory(device) as peak:
            train(model, windows, tune, seed=0)
        return peak.bytes["allocated"]
    held = quantizing.held_bytes(model)
    with LiveBytes() as live:
        train(model, windows, tune, seed=0)
    return held + live.peak
