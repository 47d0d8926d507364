"""python tests/formats/in_mode.py MODE FILE: what comes first in this process, in a mode of PyTorch, and after it.

In the mode `formats` is imported, each format quantizes and decodes, tells its tables and makes room for a checkpoint.
After it comes all of that again, and a step of training through each format and with the 8-bit optimizer. MODE "plain"
writes what it finds to FILE, others compare.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

CPU = torch.device("cpu")
MODE, FILE = sys.argv[1:]
WEIGHTS = [torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((40, 128), (7, 33))]


@contextmanager
def default_device():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


MODES = {
    "plain": nullcontext,
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "device": lambda: torch.device("meta"),
    "default_device": default_device,
    "fake": FakeTensorMode,
    "fake_beside_others": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "autocast": lambda: torch.autocast("cpu"),
    "thread": nullcontext,
    "fork": nullcontext,
    "torch_func": nullcontext,
}


def all_formats():
    import formats

    names = [*formats.names(), "tests.formats.ternary.Ternary"]  # one of a package of its own is held to the contract
    return [formats.get(name, block=32, dq=dq) for name in names for dq in (False, True)]


def quantized() -> list[Tensor]:
    """Every table, and all that is stored."""
    from formats.scales import dynamic_map
    from qbench.training.optim import states

    tensors = [dynamic_map(CPU, signed) for signed in (True, False)]
    books = [states.codebook(CPU, signed) for signed in (True, False)]
    for f in all_formats():
        books += [f.codebook(WEIGHTS[0])] if f.bits < 16 and not f.own_levels else []
        for w in WEIGHTS:
            q, e = f.quantize(w), f.empty(w.shape, w.dtype, "cpu")
            assert q.nbytes == e.nbytes == f.count_bytes(w.numel()) and e.device == CPU
            tensors += q.stored
    return tensors + [part for book in books for part in (book.levels, book.boundaries, book.order)]


def decoded() -> list[Tensor]:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    return [f.quantize(w).dequantize(dtype) for f in all_formats() for w in WEIGHTS for dtype in dtypes]


def trained() -> list[Tensor]:
    from qbench.model.quant_linear import QuantLinear
    from qbench.training.optim import PagedAdamW

    tensors, w = [], WEIGHTS[0]
    for f in all_formats():
        layer = QuantLinear(f.quantize(w))
        x = w[:5].clone().requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        tensors += [y.detach(), x.grad]
    p = torch.nn.Parameter(w.clone())
    optimizer = PagedAdamW([p], bits=8)
    for _ in range(2):
        p.grad = w * p.detach()
        optimizer.step()
    state = optimizer.state_dict()["state"][0]
    return [*tensors, p.detach(), *(state[name] for name in sorted(state))]


def check(tensors: list[Tensor], expected: list[Tensor], later: bool) -> None:
    assert len(tensors) == len(expected)
    for number, (a, b) in enumerate(zip(tensors, expected, strict=True)):
        assert type(a) is Tensor and a.dtype == b.dtype and torch.equal(a, b), number
        assert not later or not a.is_inference(), number


def main() -> None:
    kept, made, steps = [], [], []
    with MODES[MODE]():
        if MODE == "torch_func":  # within it, to read a tensor may be refused

            def transformed(x):
                with suppress(RuntimeError):
                    quantized()
                return x.sum()

            torch.func.grad(transformed)(torch.ones(3))
        elif MODE == "thread":
            with ThreadPoolExecutor(1) as thread:
                kept, made = thread.submit(quantized).result(), thread.submit(decoded).result()
        else:
            kept = quantized()
            if MODE == "fork" and (pid := os.fork()):
                os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            if not MODE.startswith("fake"):
                made = decoded()
            if MODE in ("plain", "device", "default_device", "bfloat16", "float64"):
                steps = trained()
    if MODE == "plain":
        torch.save((kept, made, steps), FILE)
    expected = torch.load(FILE)
    for tensors, wanted, later in zip((kept, made, steps), expected, (True, False, True), strict=True):
        check(tensors or wanted, wanted, later)
    for find, wanted in zip((quantized, decoded, trained), expected, strict=True):
        check(find(), wanted, later=True)


main()
