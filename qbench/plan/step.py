"""Counts the memory that a training step allocates and frees, by running the step on PyTorch's meta device.

Nothing here models an architecture. The model, packed layers, PEFT's adapters, loss, gradient checkpointing and optimizer
are those of a run. On the meta device their operations return tensors with a size and no memory, and `LiveBytes` counts
the tensors that are alive after each operation: what autograd saves, the logits and their gradient, the decoded layer.

A step needs most memory at one of few moments. Each has labels, which hooks set while the step runs:

    moment    label     from                                     to
    forward   first     the start                                the end of the first block
              between   the start of the second block            the start of the last block
              last      the start of the last block              the logits
    loss                the logits                               the gradient of the last block's output
    backward  last      that gradient                            the gradient of the block's input
              between   that gradient                            the gradient of the first block's output
              first     that gradient                            the end of the backward pass
    step                the optimizer, when all gradients exist; its copies are counted apart (`optimizer_copies`)

Blocks are alike, so at each moment every kind of bytes grows by the same amount with each block. A step of two blocks and
a step of three give that amount exactly, and a model of any depth takes a second. Middle blocks never hold more than the
larger of the first and the last. A model whose blocks differ is run whole.

Where a real device behaves differently from the meta device, `_imitate_device` imitates it. Scratch memory inside a CUDA
kernel is not counted.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import formats
from formats import Format, QuantizedTensor
from formats.contract import first_line
from qbench import ops
from qbench.errors import InputError
from qbench.measure.live_tensors import DECODED, LiveBytes
from qbench.model.replacement import replace_layers
from qbench.model.selection import linear_layers, weight_of
from qbench.settings import FULL
from qbench.training import losses, optim
from qbench.training.adapters import add as add_adapters

from .settings import ATTENTION, UNQUANTIZED, Dtypes, PlanSettings
from .shapes import Shape, decoder_blocks

MOMENTS = {
    "forward": ("forward, first", "forward, between", "forward, last"),
    "loss": ("loss",),
    "backward": ("backward, last", "backward, between", "backward, first"),
}
STEP = "step"  #: the moment of the optimizer, after these
ACTIVATIONS, LOGITS, GRADIENTS = "activations", "logits", "gradients"
KINDS = (ACTIVATIONS, LOGITS, DECODED, GRADIENTS)
KERNELS = {"cpu": ops.cpu, "cuda": ops.linear}  #: a GPU decodes the layer beyond 128 rows, for cuBLAS
META = torch.device("meta")
QUANTIZED = formats.get("nf4")

Peaks = dict[str, dict[str, int]]  #: the most bytes alive at once, by label and kind


def peaks(shape: Shape, settings: PlanSettings) -> Peaks:
    """The peaks of a step up to the optimizer, without weights, adapters and optimizer states. Raises InputError."""
    quantized = settings.format.name != "none"
    dtype = Dtypes(settings.dtype.compute, adapters=settings.dtype.adapters, gradients=settings.dtype.gradients)
    # the other settings change nothing here, so one trace serves every format, optimizer and GPU
    decisive = settings.replace(format=QUANTIZED if quantized else UNQUANTIZED, dtype=dtype)
    decisive = decisive.replace(optimizer="adamw", optimizer_budget=None)
    return _peaks(shape, decisive.replace(gpu=None, context=None, fragmentation=None))


@lru_cache(maxsize=256)
def _peaks(shape: Shape, settings: PlanSettings) -> Peaks:
    depth = shape.sizes.depth
    if depth <= 3 or not shape.sizes.alike:
        return trace(shape, settings, depth)
    two, three = trace(shape, settings, 2), trace(shape, settings, 3)
    return {
        label: {kind: two[label][kind] + (depth - 2) * (three[label][kind] - two[label][kind]) for kind in KINDS}
        for label in two
    }


def trace(shape: Shape, settings: PlanSettings, depth: int) -> Peaks:
    """The peaks of a step of the model's first `depth` blocks, run on the meta device. Raises InputError."""
    built = shape.shortened(settings.dtype.of("compute"), ATTENTION[settings.attention], depth)
    decoder = decoder_blocks(built)
    model = prepare(built, settings, partial(_empty_weights, fmt=settings.format))
    tokens = torch.zeros(settings.windows_at_once, settings.seq, dtype=torch.long, device=META)
    live = _MetaStep(KERNELS[settings.device])
    with _imitate_device(settings.device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with live, _label_moments(model, decoder, live, settings), torch.set_grad_enabled(settings.trains):
                # the second part of a batch meets the gradients of the first, and a third is like the second
                for _ in range(min(settings.accumulate, 2) if settings.trains else 1):
                    _forward_backward(model, tokens, live, settings.trains)
        except Exception as error:
            raise InputError(
                f"model: a step of {shape.name!r} cannot be run on the meta device: {first_line(error)}"
            ) from error
    return {label: {kind: nbytes.get(kind, 0) for kind in KINDS} for label, nbytes in live.peaks.items()}


def _forward_backward(model: nn.Module, tokens: Tensor, live: LiveBytes, trains: bool) -> None:
    """Run one part of a batch, as `training.loop.train` does."""
    live.label, live.kind = "forward, first", ACTIVATIONS
    logits = model(input_ids=tokens, use_cache=False).logits
    live.label, live.kind = "loss", LOGITS
    live.tag(logits, LOGITS)
    loss = losses.next_token_loss(logits, tokens)
    del logits
    if trains:
        loss.backward()


def prepare(
    model: PreTrainedModel,
    settings: PlanSettings,
    pack: Callable[[dict[str, nn.Module]], dict[str, QuantizedTensor]],
) -> PreTrainedModel | PeftModel:
    """The model as a run trains it: layers packed, adapters on, checkpointing set.

    pack: takes the linear layers by name, and returns their packed weights.
    """
    trained: PreTrainedModel | PeftModel = model
    model.requires_grad_(settings.method == FULL)
    if settings.method != FULL:
        layers = linear_layers(model)
        replace_layers(model, pack(layers))
        if settings.low_rank:
            trained = add_adapters(model, adapted_layers(list(layers), settings.targets), settings.tune(), seed=0)
            for parameter in trained.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(settings.dtype.of("adapters"))
    if settings.checkpointing and settings.trains:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers is about to rename an argument
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return trained.train(settings.trains)


def adapted_layers(layers: list[str], targets: str | tuple[str, ...]) -> list[str]:
    """The layers that carry adapters: all, or those whose names have one of the ends.

    Raises InputError for an end that no layer has.
    """
    if targets == "all":
        return layers
    ends = (targets,) if isinstance(targets, str) else targets
    for end in ends:
        if not any(_has_end(layer, end) for layer in layers):
            kinds = ", ".join(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
            raise InputError(f"targets: no layer is called {end!r}; accepted: all, or some of {kinds}")
    return [layer for layer in layers if any(_has_end(layer, end) for end in ends)]


def _has_end(layer: str, end: str) -> bool:
    return layer == end or layer.endswith(f".{end}")


def _empty_weights(layers: dict[str, nn.Module], fmt: Format) -> dict[str, QuantizedTensor]:
    """Packed weights on the meta device, by the names of the layers."""
    weights = {name: weight_of(layer) for name, layer in layers.items()}
    return {name: fmt.empty(weight.shape, weight.dtype, META) for name, weight in weights.items()}


def optimizer_copies(numels: list[int], settings: PlanSettings) -> int:
    """Bytes that a step of the optimizer allocates in addition to its states. numels: elements of each trained tensor.

    PyTorch's loop on a GPU takes all parameters at once, so its copies grow with their sum. On a CPU, and in the paged
    and the 8-bit optimizers, one parameter is updated after the other.
    """
    if not numels:
        return 0
    together = settings.device == "cuda" and settings.optimizer in optim.PYTORCH
    distinct = tuple(sorted(set(numels)))
    peak = _peak_of_step(distinct, settings.optimizer, together, settings.dtype.of("states"))
    return peak * sum(numels) // sum(distinct) if together else peak


@lru_cache
def _peak_of_step(numels: tuple[int, ...], name: str, together: bool, dtype: torch.dtype) -> int:
    """The most bytes that a second step of an optimizer allocates, on the meta device."""
    parameters = [nn.Parameter(torch.empty(n, dtype=dtype, device=META)) for n in numels]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer = optim.build(name, parameters, lr=1e-3, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["foreach"] = together
    optimizer.step()  # makes the states, which are no copies
    with _MetaStep() as live:
        optimizer.step()
    return live.peak


class _MetaStep(LiveBytes):
    """Counts live bytes, and answers reads of values: a model may ask whether its mask is all true. It is."""

    def run_operation(self, func: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        # an optimizer's number of steps is not on the meta device, and is read as usual
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 0
        return super().run_operation(func, args, kwargs)


@contextmanager
def _label_moments(model: nn.Module, decoder: nn.ModuleList, live: LiveBytes, settings: PlanSettings) -> Iterator[None]:
    """Install hooks that set the label when a moment begins, and the kind of each gradient when it arrives."""
    ends = {0: "first", len(decoder) - 1: "last"}

    def block_begins(i: int) -> None:
        if live.label.startswith("forward"):  # checkpointing calls the block again in the backward pass
            live.label = f"forward, {ends.get(i, 'between')}"

    def block_ends(i: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _: backward_begins(i))

    def backward_begins(i: int) -> None:
        live.label, live.kind = f"backward, {ends.get(i, 'between')}", ACTIVATIONS

    def gradient_arrives(parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None  # it has just arrived
        itemsize = settings.dtype.of("gradients").itemsize if settings.dtype.gradients else gradient.itemsize
        live.tag(gradient, GRADIENTS, gradient.numel() * itemsize)

    handles = [p.register_post_accumulate_grad_hook(gradient_arrives) for p in model.parameters() if p.requires_grad]
    for i, block in enumerate(decoder):
        handles.append(block.register_forward_pre_hook(lambda *_, i=i: block_begins(i)))
        handles.append(block.register_forward_hook(lambda _block, _inputs, output, i=i: block_ends(i, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _imitate_device(device: str) -> Iterator[None]:
    """Make the meta device behave like another, in the two places where PyTorch or a run depends on the device.

        depends on the device          CUDA                   CPU                         meta, without this
        rows of logits in fp32         losses.CHUNK["cuda"]   losses.CHUNK["cpu"]         KeyError
        scaled_dot_product_attention   fused                  fused, plain with dropout   plain, with seq² scores

    The fused attention is the CPU's operation for both: it saves the same tensors for the backward pass as CUDA's, which
    are query, key, value, output and the logarithm of the sum of exponentials.
    """
    attention = partial(_fused_attention, F.scaled_dot_product_attention, device)
    rows = patch.dict(losses.CHUNK, meta=losses.CHUNK[device])
    with rows, patch.object(F, "scaled_dot_product_attention", attention):
        yield


def _fused_attention(
    plain: Callable[..., Tensor],
    device: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by the fused kernel of a device. plain: PyTorch's own function, with the arguments after `device`."""
    if dropout_p and device == "cpu":  # its kernel has no dropout
        return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
