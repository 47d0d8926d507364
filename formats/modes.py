"""Helpers that give the same bits in every mode of PyTorch: inference mode, fake tensors, default devices, `torch.func`.

In such a mode PyTorch makes tensors that autograd refuses, that hold no numbers, or that are on another device. A cached
tensor must not depend on the mode in which it was made. Every mode but the default dtype belongs to a thread. So cached
tensors are made in a thread of their own (`kept`), and every tensor gets an explicit dtype and device.
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
    """Call `function` in a new thread, which is in no mode, on the CUDA stream of this thread."""
    stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None

    def work() -> _Result:
        with torch.cuda.stream(stream) if stream else nullcontext():
            return function(*args, **kwargs)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()


def kept(make: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Decorate a function that makes a table: cache its results, and make them outside all modes."""

    def make_aside(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        return aside(make, *args, **kwargs)

    once: Any = lru_cache(make_aside)
    return wraps(make)(once)


def normal(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Decorate a function so that autograd accepts the tensors it makes, even in inference mode."""

    @wraps(function)
    def call(*args: _Given.args, **kwargs: _Given.kwargs) -> _Result:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False):
            return function(*args, **kwargs)

    return call


def is_fake(t: Tensor) -> bool:
    """Whether `t` is a fake tensor, which holds no numbers whatever its device."""
    return isinstance(t, FakeTensor)


def faking() -> bool:
    """Whether a fake mode is active, so that new tensors are fake."""
    return bool(torch._C._len_torch_dispatch_stack()) and is_fake(torch.empty(0, device="cpu"))
