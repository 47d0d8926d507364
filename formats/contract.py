"""The contract: properties that every format must have. Each is a function of a format and a tensor.

    naming, sourced, width, table                         check the format itself
    round_trip, counted, declared, zeros, finite          check what it makes of a tensor

A property raises `BrokenContract`, which says what was found and what was expected. These take milliseconds, and
`formats.get` checks them for every format of another package (`glance`). `qbench.testing.check_format` checks more.
"""

from collections.abc import Callable
from math import isfinite
from numbers import Real
from re import fullmatch
from typing import Any, TypeVar

import torch
from torch import Tensor

from .blockwise import SMALLEST
from .format import Codebook, Format, QuantizedTensor
from .modes import aside
from .scales import largest


class BrokenContract(AssertionError, ValueError):
    """Raised when a format violates the contract.

    It is an AssertionError, so tests fail, and a ValueError, so the command line reports it.
    """


_Asked = TypeVar("_Asked")
_Given = TypeVar("_Given")
Property = Callable[[Format, Tensor], None]
PLAIN = ("format", "bits", "block", "own_levels", "shape", "dtype")  #: of a QuantizedTensor, besides its tensors
TINY = 10 * SMALLEST  #: counts as zero: a short last block of zeros has the scale `SMALLEST`


def expect(holds: object, actual: object, expected: object) -> None:
    if not holds:
        raise BrokenContract(f"{actual}; expected {expected}")


def naming(fmt: Format, w: Tensor) -> None:
    """`name` has only letters, digits and _ . + - because it appears in tables and on command lines."""
    name = getattr(fmt, "name", None)
    expect(isinstance(name, str) and fullmatch(r"[\w.+-]+", name), f"name is {name!r}", "letters, digits and _ . + -")


def sourced(fmt: Format, w: Tensor) -> None:
    """`source` says where the format is defined."""
    source = getattr(fmt, "source", None)
    expect(isinstance(source, str) and source.strip(), f"source is {source!r}", "the paper or the code that defines it")


def width(fmt: Format, w: Tensor) -> None:
    """`bits` is an integer from 1 to 8, or 16 if a code is the weight itself."""
    bits = getattr(fmt, "bits", None)
    usual = isinstance(bits, int) and not isinstance(bits, bool) and (1 <= bits <= 8 or bits == 16)
    expect(usual, f"bits is {bits!r}", "an integer from 1 to 8")


def table(fmt: Format, w: Tensor) -> None:
    """There are 2^bits finite levels, one per code. They are the same for every tensor unless `own_levels` is set.

    `order` has every code once and sorts the levels. Each boundary lies between two neighbouring levels.
    """
    if fmt.bits == 16:
        return
    n = 2**fmt.bits
    if not fmt.own_levels:
        levels: Any = getattr(fmt, "levels", None)
        numbers = isinstance(levels, tuple | list) and all(isinstance(x, Real) and isfinite(x) for x in levels)
        expect(numbers, f"levels are {levels!r:.60}", "finite numbers")
        expect(len(levels) == n, f"there are {len(levels)} levels", f"{n}, one a code of {fmt.bits} bits")
    book = fmt.codebook(w.detach().reshape(-1).float())
    expect(isinstance(book, Codebook), f"codebook gives a {type(book).__name__}", "a Codebook")
    parts = {"levels": f"float32 [{n}]", "boundaries": f"float32 [{n - 1}]", "order": f"uint8 [{n}]"}
    for part, expected in parts.items():
        tensor = getattr(book, part)
        expect(_describe(tensor) == expected, f"the {part} of the codebook are {_describe(tensor)}", expected)
        expect(tensor.isfinite().all(), f"the {part} of the codebook hold NaN or Inf", "finite ones")
    expect(book.order.sort().values.tolist() == list(range(n)), f"order is {book.order.tolist()}", "every code once")
    ranked = book.levels[book.order.long()]
    between = (ranked[:-1] <= book.boundaries) & (book.boundaries <= ranked[1:])
    expect(between.all(), "order does not sort the levels, or a boundary is not between its two", "ranks that ascend")
    if not fmt.own_levels:
        same = torch.equal(book.levels.cpu(), torch.tensor(fmt.levels, dtype=torch.float32, device="cpu"))
        expect(same, "the codebook has other levels than the format", "the same, or own_levels = True")


def round_trip(fmt: Format, w: Tensor) -> None:
    """The decoded tensor is finite, and has the shape of the original and its dtype or the requested one."""
    q = fmt.quantize(w)
    expect(isinstance(q, QuantizedTensor), f"quantize gives a {type(q).__name__}", "a QuantizedTensor")
    attributes = (fmt.name, fmt.bits, fmt.block, fmt.own_levels, w.shape, w.dtype)
    for part, value in zip(PLAIN, attributes, strict=True):
        expect(getattr(q, part) == value, f"{part} of the quantized tensor is {getattr(q, part)!r}", repr(value))
    for dtype in (None, torch.float32, torch.bfloat16):
        back, expected = q.dequantize(dtype), f"{_word(dtype or w.dtype)} {list(w.shape)}"
        expect(_describe(back) == expected, f"dequantize({dtype or ''}) is {_describe(back)}", expected)
        bad = int((~back.float().isfinite()).sum())
        expect(not bad or dtype != torch.float32, f"{bad} decoded weights are NaN or Inf", "finite ones")


def counted(fmt: Format, w: Tensor) -> None:
    """`nbytes`, `bits_per_parameter` and `count_bytes` agree with the bytes that are stored, and codes are packed."""
    q = fmt.quantize(w)
    held = sum(tensor.numel() * tensor.element_size() for tensor in q.stored)
    expect(q.nbytes == held, f"nbytes is {q.nbytes}", f"{held}, the bytes of what is stored")
    count = fmt.count_bytes(w.numel())
    expect(count == held, f"count_bytes({w.numel()}) is {count}", f"{held}, the bytes of what is stored")
    bits = 8 * held / w.numel() if w.numel() else 0.0
    expect(q.bits_per_parameter == bits, f"bits_per_parameter is {q.bits_per_parameter}", bits)
    least = -(w.numel() * fmt.bits // -8)
    expect(q.codes.nbytes == least, f"the codes take {q.codes.nbytes} bytes", f"{least}, packed")


def declared(fmt: Format, w: Tensor) -> None:
    """`empty` has the same tensors as `quantize` stores, with the same dtypes, shapes and levels."""
    q, e = fmt.quantize(w), fmt.empty(w.shape, w.dtype, w.device)
    for part in ("codes", "scale", "shift", "levels"):
        actual, expected = (", ".join(map(_describe, _tensors(getattr(side, part)))) or "none" for side in (e, q))
        expect(actual == expected, f"{part} of empty: {actual}", f"{expected}, as quantized")
    for part in PLAIN:
        actual, expected = getattr(e, part), getattr(q, part)
        expect(actual == expected, f"{part} of empty is {actual!r}", f"{expected!r}, as quantized")
    if q.levels is not None and e.levels is not None and not q.own_levels:
        expect(torch.equal(e.levels, q.levels), "empty has other levels than what is quantized", "the same")


def zeros(fmt: Format, w: Tensor) -> None:
    """A tensor of zeros decodes to zeros. Without double quantization, so does a block of zeros among others."""
    flat = w.detach().reshape(-1).clone()
    last = (flat.numel() - 1) // fmt.block
    for which in sorted({0, last // 2, last}) if flat.numel() and not fmt.dq else ():
        block, among = slice(which * fmt.block, (which + 1) * fmt.block), flat.clone()
        among[block] = 0
        actual = largest(fmt.quantize(among.view(w.shape)).dequantize().reshape(-1)[block])
        expect(actual <= TINY, f"block {which} of zeros decodes to {actual:.3g}", "zeros")
    actual = largest(fmt.quantize(torch.zeros_like(flat).view(w.shape)).dequantize())
    expect(actual <= TINY, f"zeros decode to {actual:.3g}", "zeros")


def finite(fmt: Format, w: Tensor) -> None:
    """Weights up to the largest number of their dtype, or of fp32, decode to finite ones, in fp32 and in that dtype.

    Otherwise `quantize` raises a ValueError of one line that names the tensor.
    """
    flat = w.detach().double()
    flat = flat / (float(flat.abs().amax()) or 1.0) if w.numel() else flat
    for most in {torch.finfo(w.dtype).max, min(torch.finfo(w.dtype).max, torch.finfo(torch.float32).max)}:
        for share in (1, 0.97, 0.5, 0.3, 0.01):
            for values in (flat, torch.ones_like(flat)):
                _finite(fmt, (values * (most * share)).clamp(-most, most).to(w.dtype), most * share)


def _finite(fmt: Format, huge: Tensor, most: float) -> None:
    try:
        q = fmt.quantize(huge, name="layers.3.q_proj")
    except ValueError as error:
        is_named = "layers.3.q_proj" in str(error) and "\n" not in str(error)
        expect(is_named, f"the error says {str(error)!r}", "a line with the name of the tensor in it")
        return
    for dtype in (torch.float32, huge.dtype):
        bad = int((~q.dequantize(dtype).isfinite()).sum())
        expect(not bad, f"of weights up to {most:.6g} {bad} decode to NaN or Inf in {dtype}", "none")


#: the properties that all others rely on
BRIEF = (naming, sourced, width, table, round_trip, counted, declared, zeros)


def failure(prop: Callable[[_Asked, _Given], None], fmt: _Asked, w: _Given, on: str) -> BrokenContract | None:
    """Returns in one line how a format breaks a property on a tensor; None if it does not."""
    try:
        prop(fmt, w)
    except Exception as error:
        raised = "" if isinstance(error, BrokenContract) else f"it raised {type(error).__name__}: "
        failed = BrokenContract(f"{prop.__name__}: on {on}: {raised}{first_line(error)}")
        failed.__cause__ = error
        return failed
    return None


def glance(fmt: Format, name: str) -> None:
    """Check the properties that everything else relies on. Raises BrokenContract, in one line."""
    if failed := aside(_first_failure, fmt):
        raise BrokenContract(f"{name} breaks the contract of a format: {failed}") from failed.__cause__


def _first_failure(fmt: Format) -> BrokenContract | None:
    w = torch.linspace(-1, 1, min(2 * fmt.block + 3, 515), dtype=torch.float32, device="cpu").view(1, -1)
    asked = (failure(prop, fmt, w, f"{w.numel()} weights from −1 to 1") for prop in (*BRIEF, finite))
    return next(filter(None, asked), None)


def first_line(error: BaseException) -> str:
    """Returns the first line of the message of an exception, or its type if it has no message."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)


def _tensors(part: object) -> list[object]:
    return [] if part is None else list(part) if isinstance(part, tuple | list) else [part]


def _describe(tensor: object) -> str:
    return f"{_word(tensor.dtype)} {list(tensor.shape)}" if isinstance(tensor, Tensor) else f"a {type(tensor).__name__}"


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
