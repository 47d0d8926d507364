"""The same bits in every mode of PyTorch: inference mode, fake tensors, default devices, transforms of `torch.func`.

A mode changes what PyTorch makes: tensors that autograd refuses, that hold nothing, that lie elsewhere. What is kept for
later calls must not know in which mode it was made. All modes belong to a thread, but for the default dtype: so **what is
kept is made in a thread of its own** (`kept`), and every tensor that is made here is told its dtype and device.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import lru_cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def aside(function: Callable[_Given, _Result], *args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
    """What `function` returns or raises, in a thread that is in no mode; on a GPU, on the stream of this one."""
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def work() -> _Result:
        with torch.cuda.stream(stream) if stream else nullcontext():
            return function(*args, **kwargs)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def kept(make: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Decorate a function that makes a table: it is made once for each choice of arguments, in no mode."""

    def make_aside(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        return aside(make, *args, **kwargs)

    once: Any = lru_cache(make_aside)
    return wraps(make)(once)


def normal(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Decorate a function that makes tensors for later: autograd takes them, even those of inference mode."""

    @wraps(function)
    def call(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False):
            return function(*args, **kwargs)

    return call


def is_fake(t: Tensor) -> bool:
    """Whether a tensor of a fake mode, which holds nothing on any device."""
    return isinstance(t, FakeTensor)


def faking() -> bool:
    """Whether all that is made here is fake."""
    return bool(torch._C._len_torch_dispatch_stack()) and is_fake(torch.empty(0, device="cpu"))
