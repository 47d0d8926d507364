"""check_format passes what keeps the contract, and names what does not: property, input, what was expected."""

import re
from dataclasses import replace

import pytest
import torch

import formats
from formats import BrokenContract, Codebook, Format, QuantizedTensor
from formats.blockwise import reduce_blocks
from formats.contract import glance
from qbench.testing import check_format, properties


class Ternary(Format):
    name, bits, source = "ternary_to_test", 2, "−1, 0, 1 and a spare code"
    levels = (-1.0, 0.0, 1.0, 1.0)


class HalfScale(Ternary):
    """A scale rule of its own, stored in bf16, levels in an order of its own, and one block size."""

    name, bits, scale_dtype = "half_scale_to_test", 3, torch.bfloat16
    levels = (0.0, -1.0, 0.2, -0.2, 0.5, -0.5, 1.0, 0.7)

    def __init__(self, block: int = 64, dq: bool = False):
        super().__init__(block, dq)
        if block != 64:
            raise ValueError("block: 64 is accepted")

    def scale_and_shift(self, w):
        return reduce_blocks(w, self.block, lambda x: x.abs().amax(1)).float() / 2, None


class Blockless(Ternary):
    name, fixed = "blockless_to_test", {"block": 8, "dq": False}


class TwoWords(Ternary):
    name = "two words"


class Anonymous(Ternary):
    source = ""


class NineBits(Ternary):
    bits = 9


class HalfABit(Ternary):
    bits = 1.5


class Short(Ternary):
    levels = (-1.0, 0.0, 1.0)


class Infinite(Ternary):
    levels = (-1.0, 0.0, 1.0, float("inf"))


class Unsorted(Ternary):
    def codebook(self, w):
        return replace(super().codebook(w), order=torch.arange(3, -1, -1, dtype=torch.uint8))


class Forgetful(Ternary):
    """A table a tensor, without saying so."""

    def codebook(self, w):
        return Codebook.of(torch.tensor([-1.0, 0.0, 0.5 + 0.1 * w.numel() % 0.5, 1.0]))


class Float32(Ternary):
    def quantize(self, w, name="tensor"):
        return super().quantize(w.float(), name)


class Uncounted(Ternary):
    def count_bytes(self, n):
        return n // 4


class HalfStored(Ternary):
    def quantize(self, w, name="tensor"):
        q = super().quantize(w, name)
        return replace(q, scale=(q.scale[0].bfloat16(),)) if not self.dq else q


class NeverZero(Ternary):
    levels = (-1.0, -0.5, 0.5, 1.0)

    def scale_and_shift(self, w):
        return reduce_blocks(w, self.block, lambda x: x.abs().amax(1)).float() + 1e-3, None


class Random(Ternary):
    def scale_and_shift(self, w):
        scale = reduce_blocks(w, self.block, lambda x: x.abs().amax(1)).float()
        return scale * (1 + torch.rand_like(scale)), None


class InPlace(Ternary):
    def quantize(self, w, name="tensor"):
        w.detach().mul_(1.0 if not w.numel() else 0.5)
        return super().quantize(w, name)


class ByMemory(Ternary):
    def quantize(self, w, name="tensor"):
        return super().quantize(w.detach().as_strided(w.shape, torch.empty(w.shape).stride()), name)


class Shifty(Ternary):
    def scale_and_shift(self, w):
        scale = reduce_blocks(w, self.block, lambda x: x.abs().amax(1)).float()
        return scale, torch.zeros_like(scale)


class TowardsZero(Ternary):
    def codebook(self, w):
        return replace(super().codebook(w), boundaries=torch.tensor([-0.9, 0.9, 1.0]))


class TowardsZeroInHalf(TowardsZero):
    """Rounding scales leaves little undecided."""

    scale_dtype = torch.float16


class Tolerant(Ternary):
    """The largest of the numbers, whatever else is there."""

    def scale_and_shift(self, w):
        w = w.nan_to_num(0.0, 0.0, 0.0)
        return reduce_blocks(w, self.block, lambda x: x.abs().amax(1)).float(), None


class Nameless(Ternary):
    def quantize(self, w, name="tensor"):
        return super().quantize(w)


class Rounding(Ternary):
    def quantize(self, w, name="tensor"):
        return super().quantize(w.float() if not w.is_floating_point() else w, name)


class AnyBlock(Ternary):
    def __init__(self, block=64, dq=False):
        super().__init__(64, dq)


class Refusing(Ternary):
    def __init__(self, block=64, dq=False):
        raise ValueError("never")


class Demanding(Ternary):
    def __init__(self, block, dq, strength):
        super().__init__(block, dq)


class Louder(QuantizedTensor):
    def dequantize(self, dtype=None):
        return super().dequantize(dtype) * 2


class Boundless(Ternary):
    """What is stored is made larger after it was seen to be finite."""

    def quantize(self, w, name="tensor"):
        q = super().quantize(w, name)
        return replace(q, scale=(q.scale[0] * 1.5, *q.scale[1:]) if not self.dq else q.scale)


class ItsOwnDecoder(Ternary):
    def quantize(self, w, name="tensor"):
        return Louder(**vars(super().quantize(w, name)))


class Nonlinear(Ternary):
    """Negative weights are moved: what is decoded is not what it stands for."""

    def scale_and_shift(self, w):
        raise RuntimeError("no\nscale")


BROKEN = {
    TwoWords: ("naming", r"name is 'two words'; expected letters, digits and _"),
    Anonymous: ("sourced", r"source is ''"),
    NineBits: ("width", r"bits is 9; expected an integer from 1 to 8"),
    HalfABit: ("width", r"bits is 1\.5"),
    Short: ("table", r"there are 3 levels; expected 4, one a code of 2 bits"),
    Infinite: ("table", r"levels are .*inf.*; expected finite numbers"),
    Unsorted: ("table", r"order does not sort the levels"),
    Forgetful: ("table", r"other levels than the format; expected the same, or own_levels = True"),
    Float32: ("round_trip", r"dtype of the quantized tensor is torch\.float32; expected torch\.bfloat16"),
    Uncounted: ("counted", r"count_bytes\(1\) is 0; expected 5, the bytes of what is stored"),
    HalfStored: ("declared", r"scale of empty: float32 \[\d+\]; expected bfloat16 \[\d+\], as quantized"),
    NeverZero: ("zeros", r"block 0 of zeros decodes to .*; expected zeros"),
    Random: ("deterministic", r"\d of 2 stored tensors differ the second time; expected the same bytes"),
    InPlace: ("deterministic", r"quantize changes the tensor that it is given"),
    ByMemory: ("layout_free", r"a strided tensor decodes to something else than its contiguous copy"),
    Shifty: ("declared", r"shift of empty: none; expected float32 \[\d+\], as quantized"),
    TowardsZero: ("nearest", r"weight \d+, .* is off by .* at the level that it takes; expected .*, at the nearest"),
    TowardsZeroInHalf: ("nearest", r"weight \d+, .* is off by .*; expected .*, at the nearest"),
    Tolerant: (
        "refuses_non_finite",
        r"on .*nan at 0 of float32 \[100\]: it gave weights from .*; expected a ValueError",
    ),
    Nameless: ("refuses_non_finite", r"the error says 'tensor: holds .*'; expected the name of the tensor in it"),
    Rounding: ("refuses_integers", r"it took int64; expected a TypeError"),
    AnyBlock: ("refuses_blocks", r"block=0 is taken; expected a ValueError"),
    Refusing: ("is_made", r"on block=64: it raised ValueError: never"),
    Demanding: ("is_made", r"it raised TypeError: .* missing 1 required positional argument: 'strength'"),
    Boundless: ("finite", r"of weights up to .* decode to NaN or Inf in torch\.float32; expected none"),
    ItsOwnDecoder: ("layered", r"a layer decodes to other weights; expected the same"),
    Nonlinear: ("round_trip", r"it raised RuntimeError: no"),
}


@pytest.mark.parametrize("cls", BROKEN, ids=lambda cls: cls.__name__)
def test_what_is_broken_is_named_with_its_input_and_what_was_expected(cls):
    prop, message = BROKEN[cls]
    of_the_class = prop in ("is_made", "refuses_blocks")
    with pytest.raises(BrokenContract) as raised:
        check_format(cls if of_the_class else cls(block=16))
    first, *lines = str(raised.value).splitlines()
    assert first.endswith(" breaks the contract of a format:")
    (line,) = [line for line in lines if line.startswith(f"  {prop}: ")]
    assert re.search(message, line), line
    assert prop in properties() and (of_the_class or ": on block=16 dq=false, " in line)


@pytest.mark.parametrize("cls", [HalfScale, Blockless])
def test_what_keeps_the_contract_passes(cls):
    check_format(cls)


def test_a_format_alone_is_asked_as_it_is():
    check_format(Ternary(block=7, dq=True))
    with pytest.raises(
        AssertionError, match=r"^two words\(block=7, dq=True\) breaks .*\n  naming: on block=7 dq=true, "
    ):
        check_format(TwoWords(block=7, dq=True))


def test_each_property_is_told():
    asked = properties()
    assert len(asked) == 22 and all(words.endswith(".") and "\n" not in words for words in asked.values())


def test_a_glance_is_a_line_and_our_own_pass_it():
    with pytest.raises(
        BrokenContract, match=r"^it breaks the contract of a format: table: on 131 weights .*3 levels.*$"
    ):
        glance(Short(), "it")
    with pytest.raises(BrokenContract, match=r"^it .*: round_trip: on .*: it raised RuntimeError: no$"):
        glance(Nonlinear(), "it")
    with pytest.raises(BrokenContract, match=r"^it .*: finite: on .* decode to NaN or Inf in torch\.float32; "):
        glance(Boundless(), "it")
    for name in formats.names():
        for block in (1, 64, 1000):
            for dq in (False, True):
                glance(formats.get(name, block=block, dq=dq), name)


def test_a_broken_format_is_refused_wherever_it_is_asked_for():
    with pytest.raises(ValueError, match=rf"^{__name__}\.Short breaks the contract .*: table: "):
        formats.get(f"{__name__}.Short")
    name = f"{__name__}.Ternary"
    assert formats.get(name, dq=True).arguments == {"name": name, "block": 64, "dq": True}
