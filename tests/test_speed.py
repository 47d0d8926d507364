"""Speed beside bitsandbytes in the same run: python -m pytest tests/test_speed.py; compare medians within a group.

4096 × 4096 weights, block 64, as many threads as PyTorch takes. Nothing here asserts a time.
"""

import pytest
import torch

import formats

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
