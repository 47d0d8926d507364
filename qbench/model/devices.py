"""The device and the dtype that a model runs on."""

import torch

from qbench.errors import InputError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def pick_device(name: str) -> torch.device:
    """The device of that name; `auto` is CUDA if there is one. Raises InputError for a device this machine lacks."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise InputError(f"device: {name!r} is no device; accepted: auto, cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device: {name!r} is not supported; accepted: auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device: {name!r} is not on this machine; accepted here: {_available_devices()}")
    return device


def _available_devices() -> str:
    return ", ".join(["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name. `auto` is bfloat16 if the device computes in it, else float32: emulating bf16 is slow."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" or _cpu_computes_in_bf16() else torch.float32
    if name not in DTYPES:
        raise InputError(f"model.dtype: {name!r} is unknown; accepted: auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in configs and results, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _cpu_computes_in_bf16() -> bool:
    """Whether the CPU has instructions for bf16 (AVX512-BF16 or AMX)."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check)
