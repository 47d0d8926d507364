"""Products refuse wrong arguments in one line, before a launch, and fall back to PyTorch if no kernel can run."""

import warnings

import pytest
import torch

import formats
from qbench.ops import cuda

N, K = 48, 80


@pytest.fixture(params=["linear", "linear_dx"])
def op(request):
    return request.param


@pytest.fixture
def weight():
    q = formats.get("nf4", block=32, dq=True).quantize(torch.randn(N, K))
    return [q.codes, q.levels, list(q.scale), list(q.shift), q.bits, q.block, N, K]


def call(op, x, weight, where=torch.ops.qbench):
    return getattr(where, op)(x, *weight)


@pytest.mark.parametrize("where", [torch.ops.qbench, cuda])
def test_bad_input_is_named(op, weight, where):
    right = K if op == "linear" else N
    with pytest.raises(ValueError, match=rf"{op}: \[3, 7\] .* {right} features"):
        call(op, torch.randn(3, 7), weight, where)
    with pytest.raises(ValueError, match=rf"{op}: \[\] .* {right} features"):
        call(op, torch.tensor(1.0), weight, where)
    with pytest.raises(TypeError, match=rf"{op}: torch.int64 .* floating-point"):
        call(op, torch.ones(3, right, dtype=torch.int64), weight, where)
    with pytest.raises(ValueError, match=rf"{op}: .* bytes do not hold 48 × 80 codes of 4 bits"):
        call(op, torch.randn(3, right), [weight[0][:-1], *weight[1:]], where)


def test_devices_that_differ_are_named(op, weight):
    weight[1] = weight[1].to("meta")
    with pytest.raises(ValueError, match=rf"{op}: .* cpu .* meta"):
        call(op, torch.randn(3, K if op == "linear" else N), weight, cuda)


@pytest.mark.parametrize("rows", [(0,), (2, 0), ()])
def test_any_leading_shape(op, weight, rows):
    inner, outer = (K, N) if op == "linear" else (N, K)
    y = call(op, torch.randn(*rows, inner), weight)
    assert y.shape == (*rows, outer)


def test_a_device_without_kernels_says_so_once(weight, monkeypatch):
    """As on a GPU that is too old, or where Triton is not installed."""
    monkeypatch.setitem(__import__("sys").modules, "qbench.ops.kernels", None)
    monkeypatch.delattr("qbench.ops.kernels", raising=False)
    cuda._kernels.cache_clear()
    x = torch.randn(3, K)
    try:
        with pytest.warns(RuntimeWarning, match="Triton cannot be imported") as caught:
            y = cuda.linear(x, *weight)
            cuda.linear(x, *weight)
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            codes, scale = cuda.quantize(torch.randn(100), *_book(), 4, 32)
        assert len(codes) == 50 and len(scale) == 4
    finally:
        cuda._kernels.cache_clear()
    assert torch.allclose(y, torch.ops.qbench.linear(x, *weight), rtol=1e-4, atol=1e-4)


def _book():
    book = formats.get("nf4").codebook(torch.zeros(1))
    return book.boundaries, book.order
