"""Measures the memory of a real step with random weights and tokens, to compare it with the plan."""

import gc
from dataclasses import replace

import torch

from qbench.errors import InputError
from qbench.measure.live_tensors import LiveBytes
from qbench.measure.memory import PeakMemory
from qbench.model import quantizing
from qbench.training.loop import train

from .count import Plan, count_memory
from .settings import ATTENTION, PlanSettings
from .shapes import Shape
from .step import prepare

STEPS = 2  # the optimizer makes its states in the first


def comparable_plan(shape: Shape, settings: PlanSettings) -> Plan:
    """The plan of the step that `measure_step` takes: without context and fragmentation, and with PyTorch's dtypes.

    Raises InputError for tune=none, and if PyTorch finds no GPU.
    """
    if not settings.trains:
        raise InputError("check: tune=none trains nothing, so there is no step to take; accepted: another tune")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputError("check: PyTorch finds no GPU on this machine; accepted here: device=cpu")
    dtype = settings.dtype
    trained = dtype.adapters if settings.low_rank else dtype.compute
    dtype = replace(dtype, embeddings=None, head=None, norms=None, gradients=None, states=trained)
    return count_memory(shape, settings.replace(dtype=dtype, context=0, fragmentation=0))


def measure_step(shape: Shape, settings: PlanSettings) -> int:
    """The most bytes that the tensors of a fine-tune hold, counted by the GPU's allocator, or on a CPU by `LiveBytes`."""
    device = torch.device(settings.device)
    torch.manual_seed(0)
    built = shape.build(settings.dtype.of("compute"), ATTENTION[settings.attention], settings.device)
    vocabulary = built.config.get_text_config().vocab_size
    model = prepare(built, settings, lambda layers: quantizing.quantize(layers, settings.format))
    del built
    gc.collect()
    windows = list(torch.randint(vocabulary, (STEPS * settings.batch, settings.seq)))
    # `prepare` has set checkpointing; with method=full the loop would compute under autocast, which a plan does not count
    tune = settings.tune(steps=STEPS, checkpointing=False, method="lora")
    if device.type == "cuda":
        with PeakMemory(device) as peak:
            train(model, windows, tune, seed=0)
        return peak.bytes["allocated"]
    held = quantizing.model_bytes(model)
    with LiveBytes() as live:
        train(model, windows, tune, seed=0)
    return held + live.peak
