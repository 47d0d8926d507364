"""The contract that every format keeps, the theory of its error, and the count of its bits."""

import math
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import formats
from formats import scales
from formats.packing import pack, packed_bytes, unpack
from qbench.testing import cases, check_format
from qbench.testing.check import ANY
from tests.formats.tensors import weights


@pytest.mark.parametrize("name", formats.names())
def test_contract(name):
    check_format(name)


@pytest.mark.parametrize("prop", ANY, ids=lambda prop: prop.__name__)
@pytest.mark.parametrize("name", formats.names())
@settings(max_examples=4, deadline=None)
@given(w=weights(), block=st.sampled_from([1, 5, 16, 64, 100, 4096]), dq=st.booleans())
def test_contract_on_any_tensor(name, prop, w, block, dq):
    f = formats.get(name, block=block, dq=dq)
    prop(f, cases.within(f, w))


@pytest.mark.parametrize("dq", [False, True])
@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q8_0"])
def test_what_a_scale_cannot_hold_raises_naming_the_tensor(name, dq):
    w = torch.full((64,), 1e9)
    with pytest.raises(
        ValueError, match=r"q_proj: holds numbers up to 1e\+09, whose scale or shift overflows torch.float16"
    ):
        formats.get(name, dq=dq).quantize(w, name="q_proj")


HUGE = [
    *((name, torch.float64, 1e300, r"beyond torch\.float32") for name in formats.names() if name != "none"),
    ("none", torch.float64, 1e300, r"beyond torch\.bfloat16"),
    ("none", torch.float32, 3.4e38, r"beyond torch\.bfloat16"),
    ("int4_asym", torch.float32, 3e38, r"whose scale or shift overflows torch\.float32"),
    ("q8_0", torch.float16, 65504, r"which as q8_0 decode beyond torch\.float16"),
]


@pytest.mark.parametrize(("name", "dtype", "top", "why"), HUGE)
def test_numbers_too_large_raise_naming_the_tensor_and_the_largest(name, dtype, top, why):
    w = torch.linspace(-top, top, 64, dtype=torch.float64).to(dtype)
    with pytest.raises(ValueError, match=rf"^q_proj: holds numbers up to {re.escape(f'{top:g}')}, {why}; [^\n]*$"):
        formats.get(name).quantize(w, name="q_proj")


@pytest.mark.parametrize("name", ["nf4", "fp4", "int4", "int8", "quantile"])
@pytest.mark.parametrize("dq", [False, True])
def test_numbers_as_large_as_fp32_has_them(name, dq):
    """Scales whose sum overflows, and a table from differences that do."""
    w = torch.full((4, 64), 1e38)
    assert torch.allclose(formats.get(name, dq=dq).quantize(w).dequantize(), w, rtol=1e-5)
    w = torch.linspace(-3.3e38, 3.3e38, 4096, dtype=torch.float64).float()
    q = formats.get(name, block=4096, dq=dq).quantize(w)
    back = formats.get(name, block=4096, dq=dq).quantize(w / 2**20).dequantize() * 2**20
    assert torch.allclose(q.dequantize(), back, rtol=1e-4, atol=1e33)


@pytest.mark.parametrize("dq", [False, True])
@pytest.mark.parametrize("name", formats.names())
@pytest.mark.parametrize("factor", [1.0, 1e5, 1e38, math.nan])
def test_what_decodes_to_inf_or_nan_is_told(name, dq, factor):
    """As of a checkpoint, whose levels and scales are finite whatever they make of a weight."""
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).clamp(-4, 4)
    q = formats.get(name, dq=dq).quantize(w)
    part = "codes" if q.levels is None else "levels"
    q = replace(q, **{part: getattr(q, part) * factor})
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert (
            q.is_finite(dtype)
            == bool(q.dequantize(dtype).isfinite().all())
            == (factor == 1 or (factor == 1e5 and dtype != torch.float16))
        ), dtype
    assert q.is_finite() == q.is_finite(w.dtype)


@pytest.mark.parametrize("dq", [False, True])
@pytest.mark.parametrize("part", ["scale", "shift"])
def test_a_scale_or_a_shift_that_is_nan_is_told(part, dq):
    q = formats.get("int4_asym", dq=dq).quantize(torch.randn(8, 64))
    getattr(q, part)[-1].fill_(torch.nan)
    assert not q.is_finite()


def test_unknown_names_are_answered_with_the_list():
    with pytest.raises(KeyError, match=r"nf5.*fp4.*nf4"):
        formats.get("nf5")
    with pytest.raises(ValueError, match=r"e9m9.*bnb, e2m1, e3m0"):
        formats.get("fp4", variant="e9m9")


def test_a_taken_name_is_refused():
    with pytest.raises(ValueError, match=r"'nf4' is taken, by formats\.nf4\.NF4"):
        formats.register("nf4")(formats.Format)
    with pytest.raises(ValueError, match=r"'a\.b': letters, digits"):
        formats.register("a.b")(formats.Format)


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


@pytest.mark.parametrize("n", [1, 1000, 32_768, 32_769, 65_535, 65_537, 200_001, 1_000_003])
def test_the_mean_is_that_of_two_threads_with_any_number_of_threads(n):
    before, generator = torch.get_num_threads(), torch.Generator().manual_seed(n)
    try:
        for _ in range(10):
            values = torch.rand(n, generator=generator)
            torch.set_num_threads(2)
            expected = values.mean()
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                assert torch.equal(scales.mean(values), expected), threads
    finally:
        torch.set_num_threads(before)


@settings(max_examples=100, deadline=None)
@given(bits=st.integers(1, 8), n=st.integers(0, 300), seed=st.integers(0, 2**32))
def test_packing(bits, n, seed):
    codes = torch.randint(0, 2**bits, (n,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert len(packed) == packed_bytes(n, bits) == -(n * bits // -8)
    assert torch.equal(unpack(packed, bits, n), codes)
    stream = "".join(f"{int(code):0{bits}b}" for code in codes).ljust(8 * len(packed), "0")
    assert packed.tolist() == [int(stream[i : i + 8], 2) for i in range(0, len(stream), 8)]
