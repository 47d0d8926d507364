"""Speed of qbench and bitsandbytes in the same run: python -m pytest tests/test_speed.py. Compare medians within a group.

Weights are 4096 × 4096, block 64, with PyTorch's number of threads. No test asserts a time.
"""

import pytest
import torch
from torch import nn

import formats
from qbench.model.quant_linear import QuantLinear

bnb_nn = pytest.importorskip("bitsandbytes.nn", reason="bitsandbytes is in the test extra")
bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is in the test extra")
FORMATS = ["nf4", "fp4", "int4_asym", "int8", "quantile"]


@pytest.fixture(scope="module")
def w():
    return torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))


@pytest.mark.benchmark(group="quantize fp32", warmup=True, min_rounds=5, max_time=0.5)
@pytest.mark.parametrize("name", FORMATS)
def test_quantize(benchmark, w, name):
    fmt = formats.get(name)
    benchmark.extra_info["weights"] = w.numel()
    assert benchmark(fmt.quantize, w).numel == w.numel()


@pytest.mark.benchmark(group="quantize fp32", warmup=True, min_rounds=3, max_time=0.5)
def test_quantize_bitsandbytes_nf4(benchmark, w):
    benchmark(bnb.quantize_4bit, w, blocksize=64, quant_type="nf4")


@pytest.mark.benchmark(group="dequantize to bf16", warmup=True, min_rounds=15, max_time=0.5)
@pytest.mark.parametrize("dq", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_dequantize(benchmark, w, name, dq):
    q = formats.get(name, dq=dq).quantize(w)
    assert benchmark(q.dequantize, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.benchmark(group="dequantize to bf16", warmup=True, min_rounds=15, max_time=0.5)
def test_dequantize_bitsandbytes_nf4(benchmark, w):
    codes, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    state.dtype = torch.bfloat16
    benchmark(bnb.dequantize_4bit, codes, state)


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def x(request):
    return torch.randn(1, 4096, generator=torch.Generator().manual_seed(1)).to(request.param)


@pytest.mark.benchmark(group="product with one row", warmup=True, min_rounds=50, max_time=0.5)
@pytest.mark.parametrize("dq", [False, True])
@torch.inference_mode()
def test_one_row(benchmark, w, x, dq):
    layer = QuantLinear(formats.get("nf4", dq=dq).quantize(w))
    assert benchmark(layer, x).dtype == x.dtype


@pytest.mark.benchmark(group="product with one row", warmup=True, min_rounds=50, max_time=0.5)
@pytest.mark.parametrize("dq", [False, True])
@torch.inference_mode()
def test_one_row_bitsandbytes_nf4(benchmark, w, x, dq):
    linear = bnb_nn.Linear4bit(4096, 4096, bias=False, compute_dtype=x.dtype)
    linear.weight = bnb_nn.Params4bit(w, requires_grad=False, quant_type="nf4", blocksize=64, compress_statistics=dq)
    benchmark(linear.to("cpu").eval(), x)


@pytest.mark.benchmark(group="product with 512 rows, forward and backward", warmup=True, min_rounds=5, max_time=0.5)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("packed", [True, False], ids=["nf4", "plain"])
def test_many_rows(benchmark, w, dtype, packed):
    plain = nn.Linear(4096, 4096, bias=False, dtype=dtype).requires_grad_(False)
    layer = QuantLinear(formats.get("nf4", dq=True).quantize(w)) if packed else plain
    x = torch.randn(512, 4096, dtype=dtype, requires_grad=True)
    benchmark(lambda: layer(x).sum().backward())
