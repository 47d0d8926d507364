"""Triton's interpreter, with a GPU's bf16.

The interpreter keeps bf16 as 16-bit integers: its dot multiplies those, and its conversion cuts off where a GPU rounds
and loses some subnormals.
The environment variable that turns it on is set in the conftest above, before anything imports Triton.
"""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


def to_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values.copy()).bfloat16().view(torch.int16).numpy().view(np.uint16)


@pytest.fixture(autouse=True, scope="package")
def bf16():
    if torch.cuda.is_available():
        yield
        return
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def exact(values, from_type, to_type, rounding):
        if from_type == tl.float32 and to_type == tl.bfloat16:
            return to_bf16(values)
        if from_type == tl.bfloat16 and to_type == tl.float32:
            return to_float(values).view(np.uint32)
        return convert(values, from_type, to_type, rounding)

    def widened(handle):
        bits = handle.dtype.scalar == tl.bfloat16
        return interpreter.TensorHandle(to_float(handle.data), tl.float32) if bits else handle

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", exact)
        patch.setattr(
            interpreter.InterpreterBuilder,
            "create_dot",
            lambda self, a, b, d, *rest: dot(self, widened(a), widened(b), d, *rest),
        )
        yield
