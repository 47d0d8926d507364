"""The ops on CUDA: they choose a path, allocate the result, and launch a kernel.

No memory is kept between calls. A weight decoded for cuBLAS lives for one product, and PyTorch's allocator reuses its
memory for the next layer. Results are deterministic: the same input takes the same path, which sums in a fixed order.
"""

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from formats.blockwise import SMALLEST, block_count, dequantize_reference, library, quantize_reference
from formats.packing import pack, packed_bytes
from formats.scales import Stored, dynamic_map

from . import launches
from . import linear as reference
from .choices import choices, choose
from .launches import Launch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@lru_cache
def _kernels(device: torch.device) -> ModuleType | None:
    """The module of kernels, or None if this device cannot run them; the first call then warns why."""
    try:
        from . import kernels
    except ImportError as error:
        reason = f"Triton cannot be imported ({error})"
    else:
        if device.type != "cuda":  # Triton's interpreter
            return kernels
        capability = torch.cuda.get_device_capability(device)
        if torch.version.hip is None and capability >= (8, 0):
            return kernels
        reason = (
            f"{torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, not ≥ 8.0"
        )
    warnings.warn(f"qbench: {reason}; weights are decoded by plain PyTorch", RuntimeWarning, stacklevel=2)
    return None


@lru_cache
def _device_choices(device: torch.device) -> tuple[dict, int]:
    """The choices for a device (`choices`), and its number of multiprocessors."""
    if device.type != "cuda":
        return choices("interpreter", 0), 2
    properties = torch.cuda.get_device_properties(device)
    return choices(properties.name, properties.major), properties.multi_processor_count


def _launch(launch: Launch, on: Tensor, *arguments: Any) -> None:
    with torch.cuda.device_of(on):
        kernel = getattr(_kernels(on.device), launch.kernel)
        kernel[launch.grid](*arguments, **launch.constants, **launch.options)


def _kernel_scales(stored: Sequence[Tensor]) -> Stored:
    """Stored scales as the kernels' argument: double-quantized ones are followed by their dynamic map."""
    return (*stored, dynamic_map(stored[0].device)) if len(stored) == 3 else tuple(stored)


def quantize(
    w: Tensor, boundaries: Tensor, order: Tensor, bits: int, block: int, scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `formats.blockwise.quantize_reference`, which gives the same bits."""
    if not w.numel() or block > launches.LARGEST_BLOCK or _kernels(w.device) is None:
        return quantize_reference(w, boundaries, order, bits, block, scale, shift)
    w = w.detach().reshape(-1).contiguous()
    w = w if w.dtype in DTYPES else w.float()
    n, blocks = w.numel(), w.numel() // block
    given = scale is not None
    scale = w.new_empty(block_count(n, block), dtype=torch.float32) if scale is None else scale.clone()
    pairs = bits == 4 and block % 2 == 0
    codes = w.new_empty(packed_bytes(n, bits) if pairs else n, dtype=torch.uint8)
    choice = _device_choices(w.device)[0]["quantize"]
    for first, count, size in (0, blocks, block), (blocks, int(n % block > 0), n % block):
        if count:
            launch = launches.quantize(choice, bits, count, size, given, size < block, pairs)
            start = first * block
            target = codes[start // 2 if pairs else start :]
            z = () if shift is None else (shift[first:],)
            _launch(launch, w, w[start:], boundaries, order, scale[first:], z, target, count, size, SMALLEST)
    if not pairs and bits < 8:  # to read the code of zero, the host waits for the device
        zero = order[torch.bucketize(torch.zeros((), dtype=torch.float32, device=w.device), boundaries)]
        codes = pack(codes, bits, fill=int(zero))
    return codes, scale


def dequantize(
    codes: Tensor, levels: Tensor, scale: Sequence[Tensor], shift: Sequence[Tensor], bits: int, block: int,
    shape: Sequence[int], dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """See `formats.blockwise.dequantize_reference`, which gives the same bits."""
    n = math.prod(shape)
    if not n or _kernels(codes.device) is None:
        return dequantize_reference(codes, levels, scale, shift, bits, block, shape, dtype)
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    launch = launches.dequantize(_device_choices(codes.device)[0]["dequantize"], bits, block, n, codes.is_cuda)
    _launch(launch, codes, codes, levels, _kernel_scales(scale), _kernel_scales(shift), out, n)
    return out


@reference.checked
def linear(x: Tensor, *weight: Any) -> Tensor:
    """See `qbench.ops.linear.linear`."""
    return product("linear", x, *weight)


@reference.checked
def linear_dx(g: Tensor, *weight: Any) -> Tensor:
    """See `qbench.ops.linear.linear_dx`."""
    return product("linear_dx", g, *weight)


def product(op: str, x: Tensor, *weight: Any, choice: dict | None = None) -> Tensor:
    """The product `op`, on the path chosen for its number of rows, or on that of `choice`."""
    codes, levels, scale, shift, bits, block, n, k = weight
    m = x.shape[:-1].numel()
    rules, processors = _device_choices(x.device)
    choice = choice or choose(rules[op], m, _usable_paths(op, x, bits, block, n, k))
    if choice["path"] == "decode":
        return getattr(reference, op)(x, *weight)
    launch = launches.product(op, choice, m, n, k, bits, block, x.is_cuda, processors)
    rows = x.reshape(m, -1)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    y = x.new_empty(*x.shape[:-1], n if op == "linear" else k)
    packed = codes, levels, _kernel_scales(scale), _kernel_scales(shift)
    split = launch.grid[2] if launch.kernel != "multiply_row" else 1
    parts = y if split == 1 else torch.empty(split, *y.shape, dtype=torch.float32, device=y.device)
    sizes = (n, k) if launch.kernel == "multiply_row" else (m, n, k)
    _launch(launch, x, rows, parts, *packed, *sizes, rows.stride(0))
    if split > 1:
        _launch(launches.add_parts(y.numel()), x, parts, y, y.numel(), split)
    return y


def _usable_paths(op: str, x: Tensor, bits: int, block: int, n: int, k: int) -> set[str]:
    """The paths that a product can take."""
    paths = {"decode"}
    if x.numel() and n and x.dtype in DTYPES and launches.unit(bits, block, k) and _kernels(x.device) is not None:
        if op == "linear":
            paths.add("multiply_row")
        if x.dtype != torch.float32:  # the matrix units would round fp32
            paths.add("matmul")
    return paths


_registration = torch.library.Library(library.ns, "IMPL")
for _op in (quantize, dequantize, linear, linear_dx):
    _registration.impl(_op.__name__, _op, "CUDA")
