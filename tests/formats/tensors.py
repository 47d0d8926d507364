"""Tensors for hypothesis to draw: those of `qbench.testing`, of any seed and size, with a run of zeros somewhere."""

import torch
from hypothesis import strategies as st

from qbench.testing import cases

SHAPES = [(1,), (7,), (33, 65), (64, 64), (576, 48), (5, 3, 129), (4097,), (300, 257)]


@st.composite
def weights(draw, dtypes=cases.DTYPES):
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kind, power = draw(st.sampled_from(sorted(cases.KINDS))), draw(st.sampled_from([0, 0, *cases.POWERS]))
    w = cases.make(kind, shape, generator, power, dtype)
    flat = w.view(-1)
    start = draw(st.integers(0, flat.numel()))
    flat[start : start + draw(st.sampled_from([0, 64, 1000]))] = 0
    return w
