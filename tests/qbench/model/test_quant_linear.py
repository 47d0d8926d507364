"""QuantLinear computes with the packed weight: forward, backward, what it saves, under torch.compile."""

import copy
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import formats
from qbench.model.quant_linear import PackedParameter, QuantLinear
from qbench.model.selection import weight_of
from qbench.ops import cuda
from qbench.testing.harness import TOLERANCE

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


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
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((formats.get(name).quantize(w).codes, layer.packed.dequantize(), layer(x)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(first, same) for first, same in zip(results[0], other, strict=True))
    expected = results[0][1].double() @ x.double()
    assert (results[0][2].double() - expected).norm() < 1e-5 * expected.norm()


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
    own = {t.data_ptr() for t in (*layer.parameters(), layer.packed.levels)}
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
    for parameter in other.parameters():
        parameter.zero_()
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


STATES = {
    "fp4": {"name": "fp4"},
    "another block": {"block": 64},
    "another block, as many scales": {"block": 4000},  # both have one block
    "scales stored in another way": {"dq": True},
    "scales of another dtype": {"name": "q4_0"},
    "a shift": {"name": "int4_asym"},
}


@pytest.mark.parametrize("case", STATES)
@pytest.mark.parametrize("through_a_file", [False, True])
def test_the_state_of_another_format_is_refused_by_name(case, through_a_file, tmp_path):
    block = 3840 if "as many" in case else 32
    w = torch.randn(48, 80)
    ours = {"name": "nf4", "block": block}
    layer = QuantLinear(formats.get(**ours).quantize(w))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    state = QuantLinear(formats.get(**ours | STATES[case]).quantize(w)).state_dict()
    if through_a_file:
        save_file(state, tmp_path / "state.safetensors")
        state = load_file(tmp_path / "state.safetensors")
    other = (ours | STATES[case])["name"]
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=rf"QuantLinear: the state is of {other} .*; accepted: nf4 of"):
            layer.load_state_dict(state, strict=strict)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_without_a_name_tensors_that_do_not_fit_are_refused():
    w = torch.randn(48, 80)
    layer = QuantLinear(formats.get("nf4", block=32, dq=True).quantize(w))
    state = QuantLinear(formats.get("nf4", block=32).quantize(w)).stored_tensors()
    with pytest.raises(RuntimeError, match=r"scale is float32 \[120\]; accepted: uint8 \[120\], of nf4"):
        layer.load_state_dict(state, strict=False)


@pytest.mark.parametrize("name", formats.names())
@pytest.mark.parametrize("dq", [False, True])
@pytest.mark.parametrize("way", ["state dict", "file", "packed checkpoint", "assigned"])
def test_built_on_meta_and_filled(name, dq, way, tmp_path):
    fmt = formats.get(name, block=32, dq=dq)
    expected = QuantLinear(fmt.quantize(torch.randn(48, 80)), torch.randn(48))
    state = expected.stored_tensors() if way == "packed checkpoint" else expected.state_dict()
    if way == "file":
        save_file(state, tmp_path / "state.safetensors")
        state = load_file(tmp_path / "state.safetensors")
    with torch.device("meta"):
        layer = QuantLinear(fmt.empty(torch.Size((48, 80)), torch.float32), torch.empty(48))
    if way != "assigned":
        layer.to_empty(device="cpu")
    layer.load_state_dict(state, strict=True, assign=way == "assigned")
    x = torch.randn(3, 80, requires_grad=True)
    assert torch.equal(layer(x), expected(x)) and torch.equal(layer.weight, expected.weight)
    layer(x).sum().backward()
    assert all(type(p) is PackedParameter for n, p in layer.named_parameters() if n != "bias")


def test_a_format_without_a_name_travels_with_its_levels():
    class Odd(formats.Format):
        name, bits, source = "odd", 2, "this test"
        levels = (-1.0, -0.25, 0.5, 1.0)

    fmt = Odd(block=32)
    expected = QuantLinear(fmt.quantize(torch.randn(48, 80)))
    layer = QuantLinear(fmt.empty(torch.Size((48, 80)), torch.float32)).to_empty(device="cpu")
    with pytest.raises(ValueError, match="a tensor on cpu meets a weight on meta"):
        layer(torch.randn(2, 80))
    layer.load_state_dict(expected.state_dict())
    assert torch.equal(layer(torch.ones(2, 80)), expected(torch.ones(2, 80)))


WRITES = {
    "mul_": lambda w: w.mul_(2),
    "+=": lambda w: exec("w += 1", {"w": w}),
    "/=": lambda w: exec("w[1] /= 2", {"w": w}),
    "an element": lambda w: w.__setitem__((0, 0), 1.0),
    "copy_": lambda w: w.copy_(torch.zeros_like(w)),
    "out=": lambda w: torch.add(torch.ones(48, 80), 1, out=w),
    "foreach": lambda w: torch._foreach_mul_([w], 2),
    "init": lambda w: nn.init.normal_(w),
    "data": lambda w: setattr(w, "data", torch.zeros(48, 80)),
    "in data": lambda w: w.data.mul_(2),
    "a row": lambda w: w[3].zero_(),
    "a view": lambda w: w.t().detach().view(80, 48).fill_(0),
    "rows": lambda w: w.unbind()[1].add_(1),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_to_a_packed_weight_is_refused(write):
    _, layer = make(bias=False)
    before = layer.weight.clone()
    with pytest.raises(TypeError, match="a packed weight cannot be changed"):
        WRITES[write](layer.weight)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("value", [torch.ones(48, 80), nn.Parameter(torch.ones(48, 80))])
def test_another_weight_is_refused(value):
    _, layer = make()
    with pytest.raises(TypeError, match="a packed weight cannot be changed"):
        layer.weight = value


def test_a_packed_weight_is_read_like_any_tensor():
    _, layer = make(bias=False)
    w = layer.weight
    assert type(w + 1) is torch.Tensor and type(w @ w.t()) is torch.Tensor and type(w.clone().mul_(2)) is torch.Tensor
    assert w.to_sparse().to_dense().equal(w)  # made without a storage
    assert torch.zeros(48, 80).copy_(w).equal(w) and torch.ones(48, 80).add_(w).equal(w + 1)
    x = torch.randn(2, 80, requires_grad=True)
    nn.functional.linear(x, w).sum().backward()
    assert torch.allclose(x.grad, w.sum(0).expand(2, -1), atol=1e-5)


def test_nothing_trains_or_casts_a_packed_weight():
    _, layer = make("q4_0", dtype=torch.float16, bias=False)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert layer.scale.dtype == torch.float16
    for p in layer.parameters():
        p.data = p.data.to(torch.float32)  # as prepare_model_for_kbit_training does
    for cast in (layer.double, layer.bfloat16, lambda: layer.type(torch.float32), layer.half):
        cast()
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    with pytest.raises(TypeError, match=r"float16 does not accept values of torch.float32"):
        layer.scale.data = torch.full((120,), 0.3)
    for train in (lambda: layer.requires_grad_(True), lambda: setattr(layer.codes, "requires_grad", True)):
        with pytest.raises(TypeError, match="a packed weight cannot be trained"):
            train()
    layer.requires_grad_(False)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert all(type(p) is PackedParameter for name, p in other.named_parameters() if name != "bias")
        assert torch.equal(other(torch.ones(1, 80)), layer(torch.ones(1, 80)))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
@pytest.mark.parametrize("name", ["nf4", "int8", "int4_asym", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 100])
def test_under_autocast_it_is_a_linear(device, name, dtype, autocast, rows):
    """Forward, and backward outside of autocast, equal nn.Linear with the decoded weight: dtypes and values."""
    linear, layer = make(name, dq=name != "none", dtype=dtype)
    linear.weight.data = layer.packed.dequantize()
    linear, layer = linear.to(device).requires_grad_(False), layer.to(device)
    results = []
    for module in (linear, layer):
        torch.manual_seed(1)
        x = torch.randn(rows, 80).to(device, dtype).requires_grad_()
        with torch.autocast(device, autocast):
            y = module(x)
        y.float().square().sum().backward()
        results.append((y, x.grad))
    for wanted, got in zip(*results, strict=True):
        assert got.dtype == wanted.dtype
        assert (got - wanted).norm() <= 0.02 * wanted.norm()
    assert results[0][0].dtype == autocast


def test_autocast_leaves_float64_and_what_is_switched_off():
    _, layer = make(bias=False, dtype=torch.float64)
    x = torch.randn(3, 80, dtype=torch.float64)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)
        with torch.autocast("cpu", enabled=False):
            assert layer(x.float()).dtype == torch.float32
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        assert compiled(x.float()).dtype == torch.bfloat16


@pytest.mark.parametrize("where", ["ops", "triton"])
def test_second_derivatives_by_finite_differences(where, monkeypatch):
    """With the kernels of this machine, and with those of a GPU in Triton's interpreter."""
    if where == "triton" and not torch.cuda.is_available():
        library = torch.library.Library("qbench", "IMPL")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a kernel has been replaced
            for op in ("linear", "linear_dx"):
                library.impl(op, getattr(cuda, op), "CPU", allow_override=True)
        monkeypatch.setattr(library, "_destroy", library._destroy)
    _, layer = make(bias=False)
    w = layer.packed.dequantize().double()
    x = torch.randn(3, 80, requires_grad=True)
    try:
        (dx,) = torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(dx.square().sum(), x)
    finally:
        if where == "triton" and not torch.cuda.is_available():
            library._destroy()
    exact = x.detach().double().requires_grad_()
    (dx,) = torch.autograd.grad((exact @ w.t()).pow(3).sum(), exact, create_graph=True)
    (wanted,) = torch.autograd.grad(dx.square().sum(), exact)
    assert wanted.norm() > 1 and (second - wanted).norm() < 1e-4 * wanted.norm()


def test_scales_that_were_cast_are_refused():
    """Some frameworks cast all tensors that they gather."""
    _, layer = make()
    layer._parameters["scale"] = nn.Parameter(layer.scale.bfloat16(), requires_grad=False)
    with pytest.raises(
        TypeError, match=r"scale of a packed weight has been cast to torch.bfloat16; accepted: torch.fl"
    ):
        layer(torch.randn(2, 80))


def test_a_gradient_for_scales_is_refused():
    q = formats.get("nf4", block=32).quantize(torch.randn(48, 80))
    scale = q.scale[0].clone().requires_grad_()
    with pytest.raises(TypeError, match="a packed weight cannot be trained"):
        torch.ops.qbench.linear(torch.randn(2, 80), q.codes, q.levels, [scale], [], 4, 32, 48, 80)


def test_what_comes_out_may_be_changed_in_place():
    _, layer = make()
    x = torch.randn(3, 80, requires_grad=True)
    y = layer(x)
    y += 1
    y[0].mul_(2)
    y.sum().backward()
    assert torch.allclose(x.grad[0], 2 * x.grad[1])


def test_what_inference_mode_made_is_trained_on():
    with torch.inference_mode():
        layer = QuantLinear(formats.get("nf4", block=32, dq=True).quantize(torch.randn(48, 80)), torch.randn(48))
        layer(torch.randn(2, 80))
    x = torch.randn(2, 80, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.norm() > 0
