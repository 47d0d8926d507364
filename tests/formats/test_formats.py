"""The contract that every format keeps, the theory of its error, and the count of its bits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import formats
from formats import scales
from formats.packing import pack, packed_bytes, unpack
from tests.formats.tensors import weights, within

QUANTIZED = [name for name in formats.names() if name != "none"]


@pytest.mark.parametrize("name", formats.names())
@settings(max_examples=40, deadline=None)
@given(w=weights(), block=st.sampled_from([1, 5, 16, 64, 100, 4096]), dq=st.booleans())
def test_contract(name, w, block, dq):
    f = formats.get(name, block=block, dq=dq)
    w = within(f, w)
    q = f.quantize(w)
    back = q.dequantize()
    assert back.shape == w.shape and back.dtype == w.dtype
    assert q.dequantize(torch.float32).isfinite().all()
    assert q.nbytes == f.count_bytes(w.numel()) == sum(t.nbytes for t in q.stored)
    assert [(t.dtype, t.shape) for t in q.stored] == [(t.dtype, t.shape) for t in f.empty(w.shape, w.dtype).stored]
    assert q.bits_per_parameter == 8 * q.nbytes / w.numel()
    again = f.quantize(w.clone())
    assert all(torch.equal(a, b) for a, b in zip(q.stored, again.stored, strict=True)), "deterministic"


@pytest.mark.parametrize("name", QUANTIZED)
@settings(max_examples=30, deadline=None)
@given(w=weights(dtypes=(torch.float32,)), block=st.sampled_from([16, 64]))
def test_error_stays_within_half_a_gap_of_the_levels(name, w, block):
    f = formats.get(name, block=block)
    w = within(f, w)
    q = f.quantize(w)
    stored = q.scale[0], (q.shift or (torch.zeros(len(q.scale[0])),))[0]
    scale, shift = (values.float().repeat_interleave(block)[: w.numel()] for values in stored)
    ranked = q.levels.sort().values
    low, high = float(ranked[0]), float(ranked[-1])
    span = {"int4_asym": (0, 1), "q4_0": (-8, 8), "q4_1": (0, 15), "q8_0": (-127, 127)}.get(name, (-1, 1))
    reach = max(float(ranked.diff().max()) / 2, span[1] - high, low - span[0])
    error, flat = (q.dequantize() - w).abs().view(-1), w.reshape(-1)
    told = torch.finfo(f.scale_dtype)  # rounding a scale moves every level; below the least it is lost
    largest = (flat.abs() + 2 * shift.abs()) * (1e-6 + told.eps * (told.bits < 32))
    assert (error <= scale.abs() * reach * (1 + 1e-5) + largest + max(map(abs, span)) * max(told.tiny, 1e-38)).all()


@pytest.mark.parametrize("name", formats.names())
@pytest.mark.parametrize("dq", [False, True])
@pytest.mark.parametrize("shape", [(64,), (3, 65), (0,), (1,), (), (2, 0, 3)])
def test_zeros_decode_to_zero(name, dq, shape):
    q = formats.get(name, block=16, dq=dq).quantize(torch.zeros(shape))
    assert torch.equal(q.dequantize(), torch.zeros(shape))


@pytest.mark.parametrize("name", formats.names())
def test_a_zero_block_among_others(name):
    w = torch.randn(4, 64)
    w[1] = 0
    assert (formats.get(name, block=64).quantize(w).dequantize()[1] == 0).all()


@pytest.mark.parametrize("name", formats.names())
def test_layout_does_not_matter(name):
    w = torch.randn(48, 36)
    f = formats.get(name, block=32)
    assert torch.equal(f.quantize(w.t()).dequantize(), f.quantize(w.t().contiguous()).dequantize())
    assert torch.equal(f.quantize(w[:, ::2]).dequantize(), f.quantize(w[:, ::2].clone()).dequantize())


@pytest.mark.parametrize("dq", [False, True])
@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q8_0"])
def test_what_a_scale_cannot_hold_raises_naming_the_tensor(name, dq):
    w = torch.full((64,), 1e9)
    with pytest.raises(ValueError, match=r"q_proj: holds values whose scale or shift overflows torch.float16"):
        formats.get(name, dq=dq).quantize(w, name="q_proj")


@pytest.mark.parametrize("name", formats.names())
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 70, 99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf_raise_naming_the_tensor(name, bad, at, dtype):
    w = torch.randn(100).to(dtype)
    w[at] = bad
    with pytest.raises(ValueError, match=r"layers\.3\.q_proj.*(NaN|Inf)"):
        formats.get(name).quantize(w, name="layers.3.q_proj")


@pytest.mark.parametrize("name", formats.names())
def test_integers_are_refused(name):
    with pytest.raises(TypeError, match=r"floating.*int64"):
        formats.get(name).quantize(torch.arange(4))


@pytest.mark.parametrize("block", [0, -3, 7.5, "64", True, None])
def test_bad_block(block):
    with pytest.raises(ValueError, match="block must be a positive integer"):
        formats.get("nf4", block=block)


def test_unknown_names_are_answered_with_the_list():
    with pytest.raises(KeyError, match=r"nf5.*fp4.*nf4"):
        formats.get("nf5")
    with pytest.raises(ValueError, match=r"e9m9.*bnb, e2m1, e3m0"):
        formats.get("fp4", variant="e9m9")


def test_a_taken_name_is_refused():
    with pytest.raises(ValueError, match="nf4"):
        formats.register("nf4")(formats.Format)


def test_variants_are_kept_apart_by_name():
    for variant, name in [("bnb", "fp4"), ("e2m1", "fp4_e2m1"), ("e3m0", "fp4_e3m0")]:
        assert formats.get("fp4", variant=variant).name == name == formats.get(name).name
    assert formats.get("int4", symmetric=False).name == "int4_asym"


# dB on N(0, 1), fp32 scales; Monte-Carlo values of an independent implementation
SQNR = [
    ("nf4", 32, 21.18), ("nf4", 64, 20.73), ("nf4", 128, 20.39), ("nf4", 256, 20.12), ("nf4", 1024, 19.64),
    ("int4", 64, 19.36), ("fp4_e2m1", 64, 19.52), ("fp4", 64, 18.28), ("fp4_e3m0", 64, 14.51),
    ("int4_asym", 64, 20.95), ("int4_asym", 128, 20.02), ("q4_0", 32, 21.32), ("q4_1", 32, 22.14),
]  # fmt: skip


def sqnr(w, back):
    return 10 * math.log10(float(w.double().square().sum() / (w - back).double().square().sum()))


@pytest.mark.parametrize(("name", "block", "expected"), SQNR)
def test_theory(name, block, expected):
    w = torch.randn(2**22, generator=torch.Generator().manual_seed(1))
    assert sqnr(w, formats.get(name, block=block).quantize(w).dequantize()) == pytest.approx(expected, abs=0.03)


def test_double_quantization_costs_little():
    w = torch.randn(2**22, generator=torch.Generator().manual_seed(1))
    assert sqnr(w, formats.get("nf4", dq=True).quantize(w).dequantize()) == pytest.approx(20.727, abs=0.03)


# mean absolute error of randn, as bitsandbytes' own tests state it
@pytest.mark.parametrize(
    ("name", "block", "expected"),
    [("nf4", 64, 0.072798), ("nf4", 4096, 0.092547), ("fp4", 64, 0.096543), ("fp4", 4096, 0.129536)],
)
def test_mean_absolute_error(name, block, expected):
    w = torch.randn(2048, 2048, generator=torch.Generator().manual_seed(2))
    error = (w - formats.get(name, block=block).quantize(w).dequantize()).abs().mean()
    assert float(error) == pytest.approx(expected, rel=0.01)


def test_blocks_that_span_rows():
    w = torch.randn(576, 576, generator=torch.Generator().manual_seed(0))
    assert sqnr(w, formats.get("nf4", block=128).quantize(w).dequantize()) == pytest.approx(20.40, abs=0.1)


def test_bits_from_the_bytes():
    w = torch.randn(4096, 1024)
    assert formats.get("nf4").quantize(w).bits_per_parameter == 4.5
    offset = 8 * 4 / w.numel()
    assert formats.get("nf4", dq=True).quantize(w).bits_per_parameter == 4.126953125 + offset
    assert formats.get("int8").quantize(w).bits_per_parameter == 8.5
    assert formats.get("int4", symmetric=False).quantize(w).bits_per_parameter == 5.0
    assert formats.get("quantile").quantize(w).bits_per_parameter == 4.5 + 8 * 64 / w.numel(), "pays for its table"
    assert formats.get("none").quantize(w).bits_per_parameter == 16.0
    files = {name: formats.get(name, block=32).quantize(w).bits_per_parameter for name in ("q4_0", "q4_1", "q8_0")}
    assert files == {"q4_0": 4.5, "q4_1": 5.0, "q8_0": 8.5}, "scales and shifts of 16 bits"
    assert formats.get("q8_0", dq=True).quantize(w).bits_per_parameter == 8.126953125 + offset


def test_the_quantile_table_is_equation_4():
    w = torch.randn(2**20, generator=torch.Generator().manual_seed(3))
    points = torch.quantile(w.double(), torch.arange(1, 17, dtype=torch.float64) / 17)
    expected = torch.cat([(points[:-1] + points[1:]) / 2, torch.zeros(1)]).sort().values
    levels = formats.get("quantile").quantize(w).levels
    assert (levels - expected / expected.abs().max()).abs().max() < 1e-6


def test_quantile_keeps_the_large_weights_of_a_sparse_tensor():
    w = torch.zeros(1000)
    w[[3, 500]] = torch.tensor([2.0, -2.0])
    assert torch.equal(formats.get("quantile").quantize(w).dequantize(), w)


def test_the_dynamic_map():
    levels = scales.dynamic_map()
    assert len(levels) == 256 and levels.unique().numel() == 256
    assert float(levels[0]) == pytest.approx(-0.99296875) and float(levels[-1]) == 1.0 and 0.0 in levels


@settings(max_examples=100, deadline=None)
@given(bits=st.integers(1, 8), n=st.integers(0, 300), seed=st.integers(0, 2**32))
def test_packing(bits, n, seed):
    codes = torch.randint(0, 2**bits, (n,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert len(packed) == packed_bytes(n, bits) == -(n * bits // -8)
    assert torch.equal(unpack(packed, bits, n), codes)
    stream = "".join(f"{int(code):0{bits}b}" for code in codes).ljust(8 * len(packed), "0")
    assert packed.tolist() == [int(stream[i : i + 8], 2) for i in range(0, len(stream), 8)]
