"""Tensors that break formats: odd lengths, rows that are not whole blocks, zeros, outliers, ties, tiny and huge weights.

They are made anew for each use, because a format may have changed them.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Generator, Tensor, nn

from formats import Format
from qbench.model.devices import dtype_name

SHAPES = ((), (0,), (2, 0, 3), (1,), (7,), (33, 65), (64, 64), (5, 3, 129), (4097,))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
POWERS = (0, -2, 3, -30, 30, -39, -42)  #: of ten; the last two are subnormal in fp32
Case = tuple[str, Tensor]  #: its name, and the tensor


def _uniform(w: Tensor, generator: Generator) -> Tensor:
    return torch.rand(w.shape, generator=generator, dtype=torch.float32, device="cpu")


KINDS = {
    "normal": lambda w, g: w,
    "heavy-tailed": lambda w, g: w / _uniform(w, g).clamp(min=1e-3),
    "ties": lambda w, g: torch.round(w * 12) / 24,  # halfway between evenly spaced levels
    "constant": lambda w, g: torch.full_like(w, 0.3),
    "sparse": lambda w, g: w * (_uniform(w, g) < 0.02),
    "positive": lambda w, g: w.abs() + 1,
}


def make(
    kind: str, shape: tuple[int, ...], generator: Generator, power: int = 0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Make a tensor of a kind, times ten to the power, within the range of its dtype."""
    w = KINDS[kind](torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu"), generator) * 10.0**power
    largest = min(torch.finfo(t).max for t in (dtype, torch.float32))
    return w.clamp(-largest, largest).to(dtype)


def within(fmt: Format, w: Tensor) -> Tensor:
    """Returns `w`, its finite weights clamped to a quarter of what its dtype and the format's `scale_dtype` hold."""
    most = min(torch.finfo(dtype).max for dtype in (fmt.scale_dtype, w.dtype)) / 4
    beyond = w.isfinite() & (w.abs() > most)
    return w.detach().clamp(-most, most).where(beyond, w.detach()) if beyond.any() else w


def none() -> tuple[Case, ...]:
    return (("no tensor", torch.zeros(0)),)


def shapes() -> tuple[Case, ...]:
    g = torch.Generator().manual_seed(0)
    return _named(("normal", make("normal", shape, g)) for shape in SHAPES)


def every() -> tuple[Case, ...]:
    """Returns tensors of each shape, kind, size and dtype, non-contiguous ones, and a parameter."""
    g = torch.Generator().manual_seed(1)
    usual = (33, 65)
    tensors = [(kind, make(kind, usual, g)) for kind in KINDS if kind != "normal"]
    tensors += [(f"normal · 10^{power}", make("normal", usual, g, power)) for power in sorted({*POWERS} - {0})]
    tensors += [("normal", make("normal", usual, g, dtype=dtype)) for dtype in (*DTYPES[1:], torch.float64)]
    tensors += [("transposed", make("normal", (65, 33), g).t()), ("strided", make("normal", (33, 130), g)[:, ::2])]
    tensors += [("a parameter", nn.Parameter(make("normal", usual, g)))]
    return (*shapes(), *_named(tensors))


def _named(tensors: Iterable[Case]) -> tuple[Case, ...]:
    return tuple((f"{kind} {dtype_name(w.dtype)} {list(w.shape)}", w) for kind, w in tensors)


def matrices() -> Iterator[Case]:
    """Weights of layers, in each dtype. Some have rows that are not whole blocks."""
    g = torch.Generator().manual_seed(2)
    for dtype in DTYPES:
        for shape in ((48, 64), (17, 33)):
            yield f"weight {dtype_name(dtype)} {list(shape)}", make("normal", shape, g, dtype=dtype)


def spoiled() -> Iterator[Case]:
    """Tensors with a NaN or an Inf at the start, in the middle or at the end."""
    g = torch.Generator().manual_seed(3)
    for bad in (math.nan, math.inf, -math.inf):
        for at in (0, 70, 99):
            for dtype in DTYPES[:2]:
                w = make("normal", (100,), g, dtype=dtype)
                w[at] = bad
                yield f"{bad} at {at} of {dtype_name(dtype)} [100]", w
