"""Properties of a format alone: it encodes any tensor reproducibly and rounds to the nearest level."""

import torch
from torch import Tensor

from formats import Format
from formats.blockwise import SMALLEST, block_count, dequantize_reference, quantize_reference, reduce_blocks
from formats.contract import expect
from formats.packing import unpack
from formats.scales import decode_scales


def deterministic(fmt: Format, w: Tensor) -> None:
    """Quantizing a tensor twice gives the same bytes, and does not change the tensor."""
    before = w.detach().clone()
    first, second = fmt.quantize(w), fmt.quantize(before.clone())
    expect(_same(w.detach(), before), "quantize changes the tensor that it is given", "it as it was")
    same = [_same(a, b) for a, b in zip(first.stored, second.stored, strict=True)]
    expect(all(same), f"{same.count(False)} of {len(same)} stored tensors differ the second time", "the same bytes")


def layout_free(fmt: Format, w: Tensor) -> None:
    """A tensor that is not contiguous in memory gives the same weights as its contiguous copy."""
    flat = w.detach()
    spread = torch.stack([flat, -flat], -1)[..., 0]
    same = _same(fmt.quantize(spread).dequantize(), fmt.quantize(flat.contiguous()).dequantize())
    expect(same, "a strided tensor decodes to something else than its contiguous copy", "the same")


def refuses_non_finite(fmt: Format, w: Tensor) -> None:
    """A NaN or an Inf among the weights raises a ValueError that names the tensor."""
    try:
        q = fmt.quantize(w, name="layers.3.q_proj")
    except ValueError as error:
        expect("layers.3.q_proj" in str(error), f"the error says {str(error)!r}", "the name of the tensor in it")
    else:
        expect(False, f"it gave {_extent(q.dequantize(torch.float32))}", "a ValueError that names the tensor")


def refuses_integers(fmt: Format, w: Tensor) -> None:
    """Integers raise a TypeError."""
    try:
        fmt.quantize(torch.arange(4))
    except TypeError:
        return
    expect(False, "it took int64", "a TypeError")


def coded(fmt: Format, w: Tensor) -> None:
    """Codes are uint8, and each is an index into the levels."""
    q = fmt.quantize(w)
    if q.levels is None:
        return
    expect(q.codes.dtype == torch.uint8 and q.codes.dim() == 1, f"codes are {q.codes.dtype}", "uint8, one dimension")
    codes = unpack(q.codes, q.bits, q.numel)
    top = int(codes.max()) if len(codes) else 0
    expect(top < len(q.levels), f"there is a code {top}", f"codes below {len(q.levels)}, the number of levels")


def scaled(fmt: Format, w: Tensor) -> None:
    """There is one finite scale per block and, if the format is `shifted`, one finite shift per block."""
    q, n = fmt.quantize(w), block_count(w.numel(), fmt.block)
    if q.levels is None:
        return
    expect(bool(q.shift) == fmt.shifted, f"shifted is {fmt.shifted}", bool(q.shift))
    for kind, stored in (("scales", q.scale), ("shifts", q.shift)):
        values = decode_scales(stored) if stored else w.new_empty(0)
        expect(values.numel() == (n if stored else 0), f"there are {values.numel()} {kind}", f"{n}, one a block")
        expect(values.isfinite().all(), f"{kind} are NaN or Inf", "finite ones")


def nearest(fmt: Format, w: Tensor) -> None:
    """Each weight takes the nearest level, given the stored scale and shift, as computed in float64.

    Codes are chosen before scales and shifts are rounded to their stored dtype, so the tolerance includes that rounding.
    With double quantization the rounding is too large, so this is checked without it.
    """
    q, n = fmt.quantize(w), w.numel()
    if q.levels is None or fmt.dq or not n:
        return
    s, z = (_spread(stored, fmt.block, n) for stored in (q.scale, q.shift))
    x = w.detach().reshape(-1).float().double()
    levels = q.levels.double()
    chosen = (s * levels[unpack(q.codes, q.bits, n).long()] + z - x).abs()
    best = torch.stack([(s * level + z - x).abs() for level in levels]).amin(0)
    top, stored = levels.abs().max(), torch.finfo(fmt.scale_dtype)
    rounded = stored.eps if stored.bits < 32 else 0.0
    slack = (1e-5 + rounded) * s.abs() * top + (1e-6 + rounded) * (x.abs() + z.abs())  # rounding errors of fp32
    slack += max(SMALLEST, rounded * stored.tiny) * (1 + top)
    worst = int((chosen - best - slack).argmax())
    expect(
        (chosen <= best + slack).all(),
        f"weight {worst}, {x[worst]:.6g}, is off by {chosen[worst]:.3g} at the level that it takes",
        f"{best[worst]:.3g}, at the nearest",
    )


def idempotent(fmt: Format, w: Tensor) -> None:
    """If the scale is the absmax and −1 and 1 are levels, weights decoded in fp32 quantize to themselves."""
    q = fmt.quantize(w.detach().float())
    if q.levels is None or fmt.dq or q.shift or q.own_levels or not w.numel():
        return
    absmax = reduce_blocks(w.detach().reshape(-1).float(), fmt.block, lambda x: x.abs().amax(1))
    unit = float(q.levels.min()) == -1 and float(q.levels.max()) == 1
    small = ((absmax > 0) & (absmax < 1e-30)).any()  # fp32 may not hold all bits
    if small or not unit or not torch.equal(decode_scales(q.scale), absmax):
        return
    back = q.dequantize(torch.float32)
    again = fmt.quantize(back).dequantize(torch.float32)
    expect(torch.equal(again, back), f"{int((again != back).sum())} weights change the second time", "none")


def as_the_reference(fmt: Format, w: Tensor) -> None:
    """The kernels of this machine give the same bits as the reference: codes, scales and decoded weights."""
    q = fmt.quantize(w)
    if q.levels is None:
        return
    flat = w.detach().reshape(-1)
    flat = flat if flat.dtype in (torch.float32, torch.bfloat16, torch.float16) else flat.float()
    if type(fmt).quantize is Format.quantize:
        scale, shift = fmt.scale_and_shift(flat)
        book = fmt.codebook(flat)
        codes, scale = quantize_reference(flat, book.boundaries, book.order, fmt.bits, fmt.block, scale, shift)
        expect(torch.equal(q.codes, codes), f"{int((q.codes != codes).sum())} bytes of codes differ", "the reference's")
        expect(fmt.dq or torch.equal(q.scale[0], scale.to(fmt.scale_dtype)), "scales differ", "the reference's")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = dequantize_reference(q.codes, q.levels, q.scale, q.shift, q.bits, q.block, q.shape, dtype)
        decoded = q.dequantize(dtype)
        wrong = f"{int((decoded != expected).sum())} weights decoded to {dtype} differ"
        expect(_same(decoded, expected), wrong, "the reference's")


def _spread(stored: tuple[Tensor, ...], block: int, n: int) -> Tensor:
    """Repeat stored values, one per block, for each weight: fp64 [n]."""
    values = decode_scales(stored).double() if stored else torch.zeros(block_count(n, block), dtype=torch.float64)
    return values.repeat_interleave(block)[:n]


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal to the bit: −0 is not 0."""
    return a.dtype == b.dtype and torch.equal(a, b) and torch.equal(a.signbit(), b.signbit())


def _extent(w: Tensor) -> str:
    return f"weights from {float(w.min()):.3g} to {float(w.max()):.3g}"
