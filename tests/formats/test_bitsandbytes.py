"""nf4 and fp4 store what bitsandbytes stores, to the last bit: codes, absmax, nested codes, nested absmax and offset.

Only its quantization is the oracle: its CPU decode is wrong where a row is not a whole number of blocks (0.50.2). It has
two threads, as what it stores depends on their number beyond 32,768 blocks.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import formats
from qbench.testing.cases import within
from tests.formats.tensors import weights

bnb = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is in the test extra")

BLOCKS = [32, 64, 128, 256, 512, 1024, 2048, 4096]


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def check(w: torch.Tensor, name: str, block: int, dq: bool) -> None:
    codes, state = bnb.quantize_4bit(w, blocksize=block, quant_type=name, compress_statistics=dq)
    q = formats.get(name, block=block, dq=dq).quantize(w)
    assert same(q.codes, codes), "codes"
    if dq:
        nested_codes, nested_absmax, offset = q.scale
        assert same(offset, state.offset), "offset"
        assert same(nested_absmax, state.state2.absmax), "nested absmax"
        assert same(nested_codes, state.absmax), "nested codes"
    else:
        assert same(q.scale[0], state.absmax), "absmax"
    assert same(q.levels, state.code), "levels"


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("dq", [False, True])
@settings(max_examples=150, deadline=None)
@given(w=weights(), block=st.sampled_from(BLOCKS))
def test_stores_the_same_bits(name, dq, w, block):
    check(within(formats.get(name), w), name, block, dq)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("dq", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stores_the_same_bits_on_a_large_matrix(name, block, dq, dtype):
    w = torch.randn(1031, 1537, generator=torch.Generator().manual_seed(block))
    check((w * 0.02).to(dtype), name, block, dq)


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_stores_the_same_bits_at_every_bf16_value(name):
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    finite = every[every.isfinite()]
    check(finite, name, 64, False)
    check(finite[finite.abs() < 1e34], name, 64, True)  # beyond, the sum of its scales is Inf to bitsandbytes


@pytest.mark.parametrize("blocks", [50_001, 65_536, 65_537])
@pytest.mark.parametrize("seed", [0, 1])
def test_stores_the_same_bits_of_many_blocks_with_any_number_of_threads(blocks, seed):
    """Up to 65,536 blocks bitsandbytes stores the same with more than two threads."""
    fmt, w = (
        formats.get("nf4", block=32, dq=True),
        torch.randn(blocks * 32, generator=torch.Generator().manual_seed(seed)),
    )
    check(w, "nf4", 32, True)
    expected = fmt.quantize(w).stored
    for threads in (1, 8):
        torch.set_num_threads(threads)
        assert all(map(same, fmt.quantize(w).stored, expected)), threads
    if blocks <= 65_536:
        check(w, "nf4", 32, True)
