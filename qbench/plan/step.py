"""What a training step holds beside the frozen weights: the step itself, run on the meta device, its tensors counted.

Nothing here models an architecture. The model, packed layers, PEFT's adapters, loss, gradient checkpointing and optimizer
are those of a run; on the meta device their operations give tensors with a size and no memory, and `LiveBytes` counts
which are alive after each. What the forward keeps for the backward, what both hold in between, the logits and their
gradient, the layer that a product has decoded: all of it is what autograd and the ops really ask for.

A step has its most memory at one of few moments, and each label below is one:

    forward   first: up to the end of the first block; last: the last block, final norm and head, all that is saved
    loss      logits, their gradient, fp32 of some rows at once, up to the gradient of the last block's output
    backward  last: of the last block, when everything that is saved still is (with checkpointing: the inputs of all
              blocks, and one block computed again); first: of the first, when every other gradient is there
    step      the optimizer, when all gradients are there and PyTorch's loops make copies (`copies`)

Blocks are alike, so at each moment every kind of bytes grows by the same with each block: a step of two blocks and one
of three tell what that is, exactly, and a model of any depth takes a second. What blocks between the first and the last
hold lies between what these hold. A model whose blocks differ is run whole.

Where the GPU differs from the meta device: the fused attention is that of the CPU kernel's schema, which saves what the
CUDA one does (q, k, v, output, log-sum-exp); scratch memory inside a CUDA kernel is not seen.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

import formats
from formats import Format, QuantizedTensor
from qbench import ops
from qbench.errors import InputError
from qbench.measure.live_tensors import DECODED, LiveBytes
from qbench.model.replacement import replace
from qbench.model.selection import linear_layers, weight_of
from qbench.settings import TuneSettings
from qbench.training import losses, optim
from qbench.training.adapters import add as add_adapters

from .settings import ATTENTION, UNQUANTIZED, Dtypes, PlanSettings
from .shapes import Shape, blocks

MOMENTS = {
    "forward": ("forward, first", "forward, between", "forward, last"),
    "loss": ("loss",),
    "backward": ("backward, last", "backward, between", "backward, first"),
}
STEP = "step"  #: the moment after these
ACTIVATIONS, LOGITS, GRADIENTS = "activations", "logits", "gradients"
KINDS = (ACTIVATIONS, LOGITS, DECODED, GRADIENTS)
KERNELS = {"cpu": ops.cpu, "cuda": ops.linear}  #: on a GPU beyond 128 rows: decode the layer, then cuBLAS
META = torch.device("meta")
QUANTIZED = formats.get("nf4")

Peaks = dict[str, dict[str, int]]  #: by label, the most bytes that are alive at once, by kind


def peaks(shape: Shape, settings: PlanSettings) -> Peaks:
    """What a step up to the optimizer's holds at its moments, without weights, adapters and states. Raises InputError."""
    quantized = settings.format.name != "none"
    dtype = Dtypes(settings.dtype.compute, adapters=settings.dtype.adapters, gradients=settings.dtype.gradients)
    # the rest decides nothing here: one trace serves every format, every optimizer and every GPU
    decisive = settings.but(format=QUANTIZED if quantized else UNQUANTIZED, dtype=dtype, optimizer="adamw")
    return _peaks(shape, decisive.but(gpu=None, context=None, fragmentation=None))


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
    """A step of the model's first `depth` blocks, run on the meta device."""
    built = shape.shortened(settings.dtype.of("compute"), ATTENTION[settings.attention], depth)
    decoder = blocks(built)
    model = prepare(
        built, settings, lambda layers: {name: _empty(one, settings.format) for name, one in layers.items()}
    )
    tokens = torch.zeros(settings.part, settings.seq, dtype=torch.long, device=META)
    live = _MetaStep(KERNELS[settings.device])
    with _standing_for(settings.device), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with live, _labelled(model, decoder, live, settings), torch.set_grad_enabled(settings.trains):
                # the second part of a batch meets the gradients of the first; a third is like the second
                for _ in range(min(settings.accumulate, 2) if settings.trains else 1):
                    _part(model, tokens, live, settings.trains)
        except Exception as error:
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"model: a step of {shape.name!r} cannot be run on the meta device: {text}") from error
    return {label: {kind: found.get(kind, 0) for kind in KINDS} for label, found in live.peaks.items()}


def _part(model: nn.Module, tokens: Tensor, live: LiveBytes, trains: bool) -> None:
    """As in `tune.train`."""
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
    """The model as the method trains it: layers packed, adapters on, checkpointing set.

    pack: linear layers, by name, to packed weights.
    """
    trained: PreTrainedModel | PeftModel = model
    model.requires_grad_(settings.method == "full")
    if settings.method != "full":
        layers = linear_layers(model)
        replace(model, pack(layers))
        if settings.method == "lora":
            lora = TuneSettings(rank=settings.rank, dropout=settings.dropout)
            trained = add_adapters(model, targets(list(layers), settings.targets), lora, seed=0)
            for parameter in trained.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(settings.dtype.of("adapters"))
    if settings.checkpointing and settings.trains:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # transformers has another name for it on the way
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return trained.train(settings.trains)


def targets(layers: list[str], wanted: str | tuple[str, ...]) -> list[str]:
    """The layers that carry adapters. Raises InputError for an end that no name has."""
    if wanted == "all":
        return layers
    ends = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    for end in ends:
        if not any(_ends(layer, end) for layer in layers):
            kinds = ", ".join(dict.fromkeys(layer.rpartition(".")[2] for layer in layers))
            raise InputError(f"targets: no layer is called {end!r}; accepted: all, or some of {kinds}")
    return [layer for layer in layers if any(_ends(layer, end) for end in ends)]


def _ends(layer: str, end: str) -> bool:
    return layer == end or layer.endswith(f".{end}")


def _empty(layer: nn.Module, fmt: Format) -> QuantizedTensor:
    weight = weight_of(layer)
    return fmt.empty(weight.shape, weight.dtype, META)


def copies(numels: list[int], settings: PlanSettings) -> int:
    """Bytes that a step of the optimizer makes beside its states, for trained tensors of so many elements, counted on it.

    PyTorch's loop on a GPU takes all parameters at once, so what it makes grows with their sum; on a CPU, and in pages or
    8 bits, one is taken after the other.
    """
    if not numels:
        return 0
    together = settings.device == "cuda" and settings.optimizer in optim.PYTORCH
    distinct = tuple(sorted(set(numels)))
    peak = _copies(distinct, settings.optimizer, together, settings.dtype.of("states"))
    return peak * sum(numels) // sum(distinct) if together else peak


@lru_cache
def _copies(numels: tuple[int, ...], name: str, together: bool, dtype: torch.dtype) -> int:
    parameters = [nn.Parameter(torch.empty(n, dtype=dtype, device=META)) for n in numels]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer = optim.build(name, parameters, lr=1e-3, weight_decay=0.0)
    for group in optimizer.param_groups:
        group["foreach"] = together
    optimizer.step()  # makes the states, which are not its copies
    with _MetaStep() as live:
        optimizer.step()
    return live.peak


class _MetaStep(LiveBytes):
    def answer(self, func: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        # a model asks whether its windows are whole: yes; an optimizer keeps its count of steps in real memory
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 0
        return super().answer(func, args, kwargs)


@contextmanager
def _labelled(model: nn.Module, decoder: nn.ModuleList, live: LiveBytes, settings: PlanSettings) -> Iterator[None]:
    """Have each moment of the step set its label, and each gradient its kind, as it comes."""
    ends = {0: "first", len(decoder) - 1: "last"}

    def began(i: int) -> None:
        if live.label.startswith("forward"):  # and not computed again in the backward
            live.label = f"forward, {ends.get(i, 'between')}"

    def ended(i: int, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _: returned(i))

    def returned(i: int) -> None:
        live.label, live.kind = f"backward, {ends.get(i, 'between')}", ACTIVATIONS

    def arrived(parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None  # it has just arrived
        itemsize = settings.dtype.of("gradients").itemsize if settings.dtype.gradients else gradient.itemsize
        live.tag(gradient, GRADIENTS, gradient.numel() * itemsize)

    handles = [p.register_post_accumulate_grad_hook(arrived) for p in model.parameters() if p.requires_grad]
    for i, block in enumerate(decoder):
        handles.append(block.register_forward_pre_hook(lambda *_, i=i: began(i)))
        handles.append(block.register_forward_hook(lambda _block, _inputs, output, i=i: ended(i, output)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _standing_for(device: str) -> Iterator[None]:
    """The meta device takes the rows of a loss and the attention that a device would."""
    plain = F.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """PyTorch takes a fused kernel wherever a device has one; to the meta device it would give the plain one."""
        if dropout_p and device == "cpu":  # for which the CPU's has no dropout
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]

    rows = patch.dict(losses.LOGITS, meta=losses.LOGITS[device])
    with rows, patch.object(F, "scaled_dot_product_attention", attention):
        yield
