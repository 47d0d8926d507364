"""Times products with a packed weight, forward and backward, over formats, shapes and numbers of rows.

Two peers run in the same process on the same weights: bf16 weights with the device's own library, and bitsandbytes if it
is installed and has the format. Copies of a weight take turns, so that none is still in the last cache when it is used.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product as pairs
from statistics import median
from typing import Any

import torch
from torch import Tensor

import formats
from formats import QuantizedTensor
from qbench import ops  # noqa: F401  registers qbench::linear
from qbench.results.provenance import environment

from .timing import ceilings, copies_beyond_cache, relative_error, time_calls

#: the linear layers of Llama, [out_features, in_features] (arXiv 2302.13971, 2307.09288)
SHAPES = {
    "7B": {"attention": (4096, 4096), "gate, up": (11008, 4096), "down": (4096, 11008)},
    "70B": {
        "query, output": (8192, 8192),
        "key, value": (1024, 8192),
        "gate, up": (28672, 8192),
        "down": (8192, 28672),
    },
    "tiny": {"tiny": (96, 128)},
}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
OPS = ("linear", "linear_dx")
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Plan:
    """What to measure. models: keys of SHAPES. rows: numbers of rows of x. repeats: samples of each time."""

    formats: tuple[str, ...]
    dq: tuple[bool, ...] = (False, True)
    block: int = 64
    models: tuple[str, ...] = ("7B", "70B")
    rows: tuple[int, ...] = ROWS
    repeats: int = 10

    def steps(self) -> int:
        """How often `measure` reports."""
        return sum(len(SHAPES[model]) for model in self.models) * (1 + len(self.formats) * len(self.dq))


def measure(plan: Plan, device: torch.device, report: Callable[[dict, str], None]) -> dict:
    """Run a plan. report: called plan.steps() times, with the results so far and a description of the latest.

    Returns {environment, ceilings, plan, cases}; a case has {model, layer, shape, op, rows, format, dq, nbytes, error,
    samples: seconds a call}. The formats of the peers are "bf16" and, for example, "bitsandbytes nf4". `op` is linear,
    linear_dx or dequantize (to bf16).
    """
    cases: list[dict] = []
    result = {"environment": environment(device), "ceilings": ceilings(device), "plan": vars(plan), "cases": cases}
    for model in plan.models:
        for layer, shape in SHAPES[model].items():
            place = {"model": model, "layer": layer, "shape": list(shape)}
            torch.manual_seed(0)
            w = torch.randn(shape, device=device).to(DTYPE)
            cases += [place | case for case in _time_bf16(w, plan)]
            report(result, f"{model} {layer}, bf16")
            for name, dq in pairs(plan.formats, plan.dq):
                cases += [place | case for case in _time_packed(name, dq, w, plan)]
                report(result, f"{model} {layer}, {name}{' + dq' * dq}")
    return result


def _iterate_inputs(w: Tensor, plan: Plan) -> Iterator[tuple[str, int, Tensor]]:
    """Yield (op, M, x of M rows) for every op and M."""
    for op, rows in pairs(OPS, plan.rows):
        yield op, rows, torch.randn(rows, w.shape[1 if op == "linear" else 0], device=w.device).to(DTYPE)


def _time_bf16(w: Tensor, plan: Plan) -> Iterator[dict]:
    copies = [w] + [w.clone() for _ in range(copies_beyond_cache(w.device, w.nbytes) - 1)]
    for op, rows, x in _iterate_inputs(w, plan):
        multiply = torch.nn.functional.linear if op == "linear" else torch.matmul
        calls = [partial(multiply, x, c) for c in copies]
        yield _make_case("bf16", False, w.nbytes, op, rows, time_calls(w.device, calls, plan.repeats))


def _time_packed(name: str, dq: bool, w: Tensor, plan: Plan) -> Iterator[dict]:
    q = formats.get(name, block=plan.block, dq=dq).quantize(w)
    exact = q.dequantize(torch.float32).double()
    copies = [q] + [_copy_weight(q) for _ in range(copies_beyond_cache(w.device, q.nbytes) - 1)]
    peers = _Bitsandbytes.of(name, dq, w, plan)
    samples = time_calls(w.device, [partial(c.dequantize, DTYPE) for c in copies], plan.repeats)
    yield _make_case(name, dq, q.nbytes, "dequantize", 0, samples, relative_error(q.dequantize(DTYPE), exact))
    if peers:
        yield _make_case(
            peers.name, dq, q.nbytes, "dequantize", 0, time_calls(w.device, peers.dequantize(), plan.repeats)
        )
    for op, rows, x in _iterate_inputs(w, plan):
        expected = x.double() @ (exact.t() if op == "linear" else exact)
        calls: list[Callable[[], Tensor]] = [partial(_multiply, op, x, c) for c in copies]
        error = relative_error(calls[0](), expected)
        yield _make_case(name, dq, q.nbytes, op, rows, time_calls(w.device, calls, plan.repeats), error)
        if peers:
            calls = peers.multiply(op, x)
            error = relative_error(calls[0](), expected)
            yield _make_case(peers.name, dq, q.nbytes, op, rows, time_calls(w.device, calls, plan.repeats), error)


def _make_case(
    name: str, dq: bool, nbytes: int, op: str, rows: int, samples: list[float], error: float | None = None
) -> dict:
    return {"format": name, "dq": dq, "nbytes": nbytes, "op": op, "rows": rows, "error": error, "samples": samples}


def _copy_weight(q: QuantizedTensor) -> QuantizedTensor:
    scale, shift = (tuple(t.clone() for t in stored) for stored in (q.scale, q.shift))
    return replace(q, codes=q.codes.clone(), scale=scale, shift=shift)


def _multiply(op: str, x: Tensor, q: QuantizedTensor) -> Tensor:
    weight = q.codes, q.levels, list(q.scale), list(q.shift), q.bits, q.block, *q.shape
    return getattr(torch.ops.qbench, op)(x, *weight)


@dataclass
class _Bitsandbytes:
    """The same weight in bitsandbytes, with the product of its Linear4bit."""

    name: str
    copies: list

    @classmethod
    def of(cls, name: str, dq: bool, w: Tensor, plan: Plan) -> "_Bitsandbytes | None":
        try:
            from bitsandbytes import functional
        except ImportError:
            return None
        if name not in ("nf4", "fp4"):
            return None

        def quantize() -> tuple[Tensor, Any]:
            return functional.quantize_4bit(w, blocksize=plan.block, compress_statistics=dq, quant_type=name)

        codes, state = quantize()
        others = [quantize() for _ in range(copies_beyond_cache(w.device, codes.nbytes) - 1)]
        return cls(f"bitsandbytes {name}", [(codes, state), *others])

    def dequantize(self) -> list[Callable[[], Tensor]]:
        from bitsandbytes import functional

        return [partial(functional.dequantize_4bit, c, s) for c, s in self.copies]

    def multiply(self, op: str, x: Tensor) -> list[Callable[[], Tensor]]:
        import bitsandbytes
        from bitsandbytes import functional

        if op == "linear":
            return [partial(bitsandbytes.matmul_4bit, x, c.t(), quant_state=s) for c, s in self.copies]

        def backward(codes: Tensor, state: Any) -> Tensor:
            return x @ functional.dequantize_4bit(codes, state).to(x.dtype)

        return [partial(backward, c, s) for c, s in self.copies]


def median_times(result: dict, **where: object) -> dict[tuple, float]:
    """Median seconds by (model, layer, op, rows) of the cases with the given values, such as format="nf4"."""
    return {
        (case["model"], case["layer"], case["op"], case["rows"]): median(case["samples"])
        for case in result["cases"]
        if all(case[key] == value for key, value in where.items())
    }
