"""Any finite tensor quantizes to a finite one, with the same bytes at any number of threads, or is refused by its name."""

import hashlib
import math
from collections import Counter

import pytest
import torch
from torch import Tensor

import formats
from qbench.testing.cases import within

BLOCKS = (1, 2, 3, 16, 32, 64, 100, 4096)
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
BITS = {torch.float64: torch.int64, torch.float32: torch.int32}  # of the others int16
MANY = 70_001  # weights: with a block of 1 or 2 the mean of their scales is more than one sum
NAME = "layers.3.q_proj"


def pick(options, generator: torch.Generator):
    return options[int(torch.randint(len(options), (), generator=generator))]


def any_bits(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Numbers of any exponent, subnormal ones and negative zeros among them; what is not finite becomes 1."""
    kind = BITS.get(dtype, torch.int16)
    word = torch.iinfo(kind)
    w = torch.randint(word.min, word.max, shape, generator=generator, dtype=kind).view(dtype)
    return w.where(w.isfinite(), 1)


def near(most: float, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal numbers, the largest of which is a power of two below `most`, or `most` itself."""
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    w = w / (float(w.abs().max()) or 1.0) if w.numel() else w
    return (w * (most * 2.0 ** -int(torch.randint(4, (), generator=generator)))).clamp(-most, most).to(dtype)


def tensor(generator: torch.Generator) -> Tensor:
    """One of any dtype, shape and kind."""
    dtype, kind = (
        pick(DTYPES, generator),
        pick(("bits", "huge", "fp32", "fp16", "tiny", "constant", "outlier"), generator),
    )
    shape = pick(((), (0,), (1,), (2, 0, 3), (7,), (5, 3, 29), (33, 65), (64, 64), (64, 64)), generator)
    shape = (MANY,) if int(torch.randint(100, (), generator=generator)) == 0 else shape
    info = torch.finfo(dtype)
    if kind in ("bits", "constant"):
        w = any_bits(shape, dtype, generator)
        return w if kind == "bits" or not w.numel() else torch.full(shape, float(w.view(-1)[0]), dtype=dtype)
    if kind == "outlier":
        w = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        if w.numel():
            w.view(-1)[-1] = any_bits((), dtype, generator)
        return w
    most = {"huge": info.max, "fp32": torch.finfo(torch.float32).max, "fp16": 65504.0, "tiny": 8 * info.smallest_normal}
    return near(min(most[kind], info.max), shape, dtype, generator)


def quantized(fmt: formats.Format, w: Tensor, threads: int) -> tuple[formats.QuantizedTensor | None, bytes]:
    """What the format makes of `w`, and a digest of its bytes; None and the words of a refusal."""
    torch.set_num_threads(threads)
    try:
        q = fmt.quantize(w, name=NAME)
    except ValueError as error:
        return None, str(error).encode()
    digest = hashlib.blake2b()
    for part in (*q.stored, q.dequantize(torch.float32), q.dequantize()):
        if part.numel():  # the strides of others are not those of bytes
            digest.update(part.reshape(-1).view(torch.uint8).numpy())
    return q, digest.digest()


def check(number: int) -> str:
    """Holds one tensor to it, and says what became of the tensor."""
    generator = torch.Generator().manual_seed(number)
    name, block, dq = pick(formats.names(), generator), pick(BLOCKS, generator), bool(pick((0, 1), generator))
    fmt, w = formats.get(name, block=block, dq=dq), tensor(generator)
    top = float(w.abs().max()) if w.numel() else 0.0
    case = f"tensor {number}: {fmt} of {w.dtype} {list(w.shape)} up to {top:g}"
    assert math.isfinite(top), case
    q, stored = quantized(fmt, w, threads=1)
    assert quantized(fmt, w, threads=2)[1] == stored, f"{case}: other bytes with two threads"
    if q is None:
        assert stored.startswith(NAME.encode()) and b"\n" not in stored, f"{case}: {stored}"
        assert not torch.equal(within(fmt, w), w), f"{case}: refused, although it holds such: {stored}"
        return "refused"
    for dtype in (torch.float32, w.dtype):
        assert q.dequantize(dtype).isfinite().all() and q.is_finite(dtype), f"{case}: NaN or Inf in {dtype}"
    return "finite"


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


COUNTS = [300, pytest.param(20_000, marks=pytest.mark.thorough)]


@pytest.mark.parametrize("count", COUNTS)
def test_finite_or_refused_and_the_same_bytes_with_any_number_of_threads(count):
    became = Counter(map(check, range(count)))
    print(f"{count} tensors: {became['finite']} finite, {became['refused']} refused by name")
    assert became["finite"] > 3 * became["refused"] > 0
