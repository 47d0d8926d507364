"""FP4: 4-bit floating point, a sign and seven magnitudes. Three tables have this name; each is a format here.

    fp4        bitsandbytes' own (variant bnb): 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1, in its own order of codes
    fp4_e2m1   2 exponent bits, 1 mantissa bit: 0, .5, 1, 1.5, 2, 3, 4, 6 over 6 (OCP MX specification 1.0, section 5.3.3)
    fp4_e3m0   3 exponent bits: 0, 2^−6, 2^−5 … 1

QLoRA's Table 2 compares E2M1 and E3M0 (arXiv 2305.14314); its Table 3, run with bitsandbytes, uses the first. All have a
code for +0 and one for −0, so 15 distinct levels. The scale is the absmax of the block.
"""

from . import register
from .format import Format

MAGNITUDES = {
    "bnb": tuple(m / 12 for m in (0, 0.0625, 8, 12, 4, 6, 2, 3)),
    "e2m1": tuple(m / 6 for m in (0, 0.5, 1, 1.5, 2, 3, 4, 6)),
    "e3m0": (0.0, *(2.0**e for e in range(-6, 1))),
}
SOURCES = {
    "bnb": "bitsandbytes",
    "e2m1": "OCP MX 1.0, section 5.3.3",
    "e3m0": "QLoRA, arXiv 2305.14314, Table 2",
}


@register("fp4")
@register("fp4_e2m1", variant="e2m1")
@register("fp4_e3m0", variant="e3m0")
class FP4(Format):
    """Codes 0–7 are the magnitudes, 8–15 the same with the sign bit set. variant: `bnb`, `e2m1` or `e3m0`."""

    bits = 4

    def __init__(self, block: int = 64, dq: bool = False, variant: str = "bnb"):
        super().__init__(block, dq)
        if variant not in MAGNITUDES:
            raise ValueError(f"unknown variant {variant!r} of fp4; there are: {', '.join(MAGNITUDES)}")
        self.name = "fp4" if variant == "bnb" else f"fp4_{variant}"
        self.source = SOURCES[variant]
        magnitudes = MAGNITUDES[variant]
        self.levels = magnitudes + tuple(0.0 - m for m in magnitudes)  # 0 − 0 is +0: zeros decode to +0
