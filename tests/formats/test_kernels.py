"""The kernels of the machine give the bits of the plain PyTorch reference."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import formats
from formats import blockwise
from qbench.ops import cpu
from qbench.testing import cases
from qbench.testing.encoding import as_the_reference
from tests.formats.tensors import weights


@pytest.fixture(params=["avx512", "plain"], autouse=True)
def loops(request, monkeypatch):
    """Both sets of inner loops, where the machine has both."""
    if request.param == "avx512" and not cpu.AVX512:
        pytest.skip("this CPU has no AVX-512")
    monkeypatch.setattr(cpu, "AVX512", request.param == "avx512")


@pytest.mark.parametrize("name", [name for name in formats.names() if name != "none"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(w=weights(), block=st.sampled_from([1, 3, 16, 17, 32, 64, 128, 4096]), dq=st.booleans())
def test_equal_the_reference(name, w, block, dq):
    f = formats.get(name, block=block, dq=dq)
    as_the_reference(f, cases.within(f, w))


@pytest.mark.parametrize("bits", range(1, 9))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), n=st.integers(1, 700), block=st.sampled_from([5, 16, 64]))
def test_any_table_of_2_to_256_levels(bits, seed, n, block):
    generator = torch.Generator().manual_seed(seed)
    book = formats.Codebook.of(torch.rand(2**bits, generator=generator) * 2 - 1)
    w = torch.randn(n, generator=generator)
    arguments = w, book.boundaries, book.order, bits, block
    codes, scale = torch.ops.qbench.quantize(*arguments, None, None)
    expected = blockwise.quantize_reference(*arguments)
    assert torch.equal(codes, expected[0]) and torch.equal(scale, expected[1])
    arguments = codes, book.levels, [scale], [], bits, block, [n], torch.float32
    assert torch.equal(torch.ops.qbench.dequantize(*arguments), blockwise.dequantize_reference(*arguments))


def test_memory_goes_round_only_once_nobody_holds_it():
    first, second = (formats.get("nf4").quantize(torch.randn(1024, 1024)) for _ in range(2))
    held = first.dequantize()
    expected, part, place = held.clone(), held[3:5], held.data_ptr()
    del held
    assert second.dequantize().data_ptr() != place, "a view still holds it"
    assert torch.equal(part, expected[3:5])
    del part
    again = [second.dequantize() for _ in range(2)]
    assert again[0].data_ptr() != again[1].data_ptr() and torch.equal(*again)
