"""The tensors that break formats: odd lengths, rows that are no whole blocks, zero blocks, outliers, ties, tiny, huge."""

import torch
from hypothesis import strategies as st

from formats import Format

SHAPES = [(1,), (7,), (33, 65), (64, 64), (576, 48), (5, 3, 129), (4097,), (300, 257)]


@st.composite
def weights(draw, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
    shape = draw(st.sampled_from(SHAPES))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    w = torch.randn(shape, generator=generator)
    kind = draw(st.sampled_from(["normal", "heavy", "grid", "constant", "sparse", "positive"]))
    if kind == "heavy":
        w = w / torch.rand(shape, generator=generator).clamp(min=1e-3)
    elif kind == "grid":  # ties between levels
        w = torch.round(w * 12) / 24
    elif kind == "constant":
        w = torch.full(shape, float(w.reshape(-1)[0]))
    elif kind == "sparse":
        w = w * (torch.rand(shape, generator=generator) < 0.02)
    elif kind == "positive":
        w = w.abs() + 1
    w = w * 10.0 ** draw(st.sampled_from([0, 0, 0, -2, 3, -30, 30, -39, -42]))
    flat = w.view(-1)
    start = draw(st.integers(0, flat.numel()))
    flat[start : start + draw(st.sampled_from([0, 64, 1000]))] = 0
    largest = torch.finfo(dtype).max
    return w.clamp(-largest, largest).to(dtype)


def within(f: Format, w: torch.Tensor) -> torch.Tensor:
    """`w` cut to what scales and shifts of the dtype of `f` surely hold; for fp32 that is all that `weights` gives."""
    most = min(torch.finfo(f.scale_dtype).max / 2, torch.finfo(w.dtype).max)
    return w.clamp(-most, most)
