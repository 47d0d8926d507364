"""q4_0, q4_1 and q8_0 with blocks of 32 store what GGUF files do, to the last bit; llama.cpp's package is the oracle."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import formats
from formats.blockwise import SMALLEST
from formats.packing import unpack
from qbench.testing.cases import within
from tests.formats.tensors import weights

gguf = pytest.importorskip("gguf", reason="gguf is in the test extra")
NAMES = ["q4_0", "q4_1", "q8_0"]


def theirs(name: str, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """What the package makes of w: codes [n], decoded weights fp32 [n], and d (and m), fp16 [n / 32]."""
    kind = gguf.GGMLQuantizationType[name.upper()]
    with np.errstate(all="ignore"):  # of blocks whose d has no reciprocal
        raw = gguf.quants.quantize(w.float().numpy(), kind)
    blocks = torch.from_numpy(raw).reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
    count = 2 if name == "q4_1" else 1
    numbers = blocks[:, : 2 * count].contiguous().view(torch.float16)
    codes = blocks[:, 2 * count :]
    codes = codes if name == "q8_0" else torch.cat([codes & 15, codes >> 4], 1)
    return codes.reshape(-1), torch.from_numpy(gguf.quants.dequantize(raw, kind)), list(numbers.unbind(1))


def check(name: str, w: torch.Tensor) -> None:
    f = formats.get(name, block=32)
    q = f.quantize(w)
    codes, decoded, numbers = theirs(name, w)
    scale, *shift = numbers
    assert torch.equal(q.scale[0].view(torch.int16), scale.contiguous().view(torch.int16)), "scale, its sign included"
    assert len(q.shift) == len(shift) and all(map(torch.equal, q.shift, shift)), (
        "shift; of −0 and 0 either is the least"
    )
    d = f.scale_and_shift(w.reshape(-1))[0].abs()
    comparable = ((d == 0) | (d >= SMALLEST)).repeat_interleave(32)  # a subnormal d is 0 in fp16, whatever the codes
    assert torch.equal(unpack(q.codes, q.bits, w.numel())[comparable], codes[comparable]), "codes"
    assert torch.equal(
        q.dequantize(torch.float32)[comparable.view(w.shape)], decoded.view(w.shape)[comparable.view(w.shape)]
    )


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=100, deadline=None)
@given(w=weights())
def test_stores_the_same_bits(name, w):
    flat = within(formats.get(name), w).reshape(-1)
    check(name, torch.nn.functional.pad(flat, (0, -len(flat) % 32)).view(-1, 32))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stores_the_same_bits_on_a_large_matrix(name, dtype):
    w = torch.randn(1031, 1536, generator=torch.Generator().manual_seed(1))
    check(name, (w * 0.02).to(dtype))


@pytest.mark.parametrize("name", NAMES)
def test_next_to_every_boundary(name):
    """Blocks whose scale is 1, and weights on each boundary of the format, before it and after it."""
    f = formats.get(name, block=32)
    edges = torch.tensor(f.boundaries)
    edges = torch.cat([edges, *(torch.nextafter(edges, torch.tensor(to)) for to in (-torch.inf, torch.inf))])
    edges = torch.nn.functional.pad(edges, (0, -len(edges) % 30))
    ends = {"q4_0": (-8.0, -8.0), "q4_1": (0.0, 15.0), "q8_0": (127.0, 127.0)}[name]
    edges = edges.clamp(*{"q4_0": (-8, 7), "q4_1": (0, 15), "q8_0": (-127, 127)}[name])
    w = torch.cat([edges.view(-1, 30), torch.tensor(ends).expand(len(edges) // 30, 2)], 1)
    assert (f.scale_and_shift(w.view(-1))[0] == 1).all()
    check(name, w)
