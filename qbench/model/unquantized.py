"""The sentence that tells a user which weights of a model are not quantized."""

from collections.abc import Mapping

MOST = 0.9  #: below this share of quantized weights the sentence starts with "Only"


def describe_unquantized(reasons: Mapping[str, str], share: float = 1.0) -> str:
    """Returns a sentence on the weights that stay in 16 bit; empty if there are none.

    reasons: why each stays, by name of the layer or parameter. share: fraction of the weights that is quantized.
    """
    if not reasons:
        return ""
    first, why = next(iter(reasons.items()))
    others = f", and {len(reasons) - 1} more" if len(reasons) > 1 else ""
    only = "Only " if share < MOST else ""
    return f"{only}{100 * share:.1f}% of the weights are quantized. Left in 16 bit: {first}, as {why}{others}."
