"""QuantLinear computes with the packed weight: forward, backward, what it keeps, and under torch.compile."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import formats
from qbench.layers import QuantLinear, weight_of
from qbench.testing.harness import TOLERANCE


def make(name="nf4", dq=False, out_features=48, in_features=80, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features, bias=bias, dtype=dtype)
    return linear, QuantLinear(formats.get(name, block=32, dq=dq).quantize(linear.weight), linear.bias)


@pytest.mark.parametrize("name", ["nf4", "fp4", "int4_asym", "quantile", "int8"])
@pytest.mark.parametrize("dq", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("rows", "in_features"), [(1, 32), (1, 96), (1, 1024), (1, 80), (3, 96), (200, 96)])
def test_few_and_many_rows_against_float64(name, dq, dtype, rows, in_features):
    _, layer = make(name, dq, in_features=in_features, dtype=dtype)
    x = torch.randn(1, rows, in_features, dtype=dtype, requires_grad=True)
    y = layer(x)
    w = layer.packed.dequantize(torch.float32).double()
    expected = x.detach().double() @ w.t() + layer.bias.double()
    assert y.dtype == dtype and y.shape == (1, rows, 48)
    assert (y.double() - expected).norm() < TOLERANCE[dtype] * expected.norm()
    y.sum().backward()
    expected_dx = w.sum(0).expand(1, rows, -1)
    assert x.grad.dtype == dtype and (x.grad.double() - expected_dx).norm() < TOLERANCE[dtype] * expected_dx.norm()


@pytest.mark.parametrize("name", ["nf4", "int4_asym"])
def test_a_large_weight_on_any_number_of_threads(name):
    torch.manual_seed(0)
    w, x = torch.randn(2000, 2048), torch.randn(2048)
    layer = QuantLinear(formats.get(name, dq=True).quantize(w))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append((formats.get(name).quantize(w).codes, layer.packed.dequantize(), layer(x)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(one, same) for one, same in zip(found[0], other, strict=True))
    expected = found[0][1].double() @ x.double()
    assert (found[0][2].double() - expected).norm() < 1e-5 * expected.norm()


def test_gradient_by_finite_differences():
    _, layer = make(dtype=torch.float64, bias=False)
    x = torch.randn(2, 80, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)


@pytest.mark.parametrize("name", ["nf4", "int4_asym", "quantile"])
def test_backward_keeps_only_the_packed_weight(name):
    _, layer = make(name, dq=True, bias=False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(torch.randn(4, 80, requires_grad=True))
    own = {t.data_ptr() for t in layer.buffers()}
    assert kept and all(t.data_ptr() in own for t in kept)


def test_replaces_conv1d():
    torch.manual_seed(0)
    conv = Conv1D(48, 80)
    layer = QuantLinear(formats.get("int8").quantize(weight_of(conv)), conv.bias)
    x = torch.randn(7, 80)
    assert (layer(x) - conv(x)).norm() < 0.01 * conv(x).norm()


def test_the_baseline_is_the_layer_itself():
    linear, layer = make("none", dtype=torch.bfloat16)
    x = torch.randn(4, 80, dtype=torch.bfloat16)
    assert (layer(x) - linear(x)).norm() <= 0.01 * linear(x).norm()
    assert torch.equal(layer.packed.dequantize(), linear.weight)


@pytest.mark.parametrize("name", formats.names())
def test_another_dtype_leaves_the_packed_weight_alone(name):
    _, layer = make(name, dq=True, dtype=torch.bfloat16)
    before = layer.packed.dequantize(torch.float32)
    layer.to(torch.float16)
    assert torch.equal(layer.packed.dequantize(torch.float32), before)
    assert layer.bias.dtype == torch.float16


@pytest.mark.parametrize("name", ["nf4", "int4_asym"])
def test_state_dict_round_trip(name):
    _, layer = make(name, dq=True)
    _, other = make(name, dq=True)
    for buffer in other.buffers():
        if buffer is not other.levels:
            buffer.zero_()
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 80)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("dq", [False, True])
def test_compiles_without_a_graph_break(dq):
    _, layer = make(dq=dq)
    x = torch.randn(4, 80, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    y.sum().backward()
    dx, x.grad = x.grad.clone(), None
    layer(x).sum().backward()
    assert torch.equal(y, layer(x)) and torch.allclose(dx, x.grad)


@pytest.mark.parametrize("name", ["nf4", "int4_asym"])
def test_ops_keep_torch_librarys_promises(name):
    _, layer = make(name, dq=True)
    q = layer.packed
    w = (q.codes, q.levels, list(q.scale), list(q.shift), q.bits, q.block)
    x = torch.randn(3, 80, requires_grad=True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.qbench.linear, (x, *w, *q.shape), test_utils=tests)
    torch.library.opcheck(torch.ops.qbench.linear_dx, (torch.randn(3, 48), *w, *q.shape), test_utils=tests)
    torch.library.opcheck(torch.ops.qbench.dequantize, (*w, list(q.shape), torch.float32), test_utils=tests)
    book = formats.get(name).codebook(x)
    arguments = (x.detach(), book.boundaries, book.order, 4, 64, None, None)
    torch.library.opcheck(torch.ops.qbench.quantize, arguments, test_utils=tests)
