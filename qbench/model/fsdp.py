"""Keeps FSDP2's mixed precision from casting packed weights.

FSDP2 casts each parameter that it gathers to its `param_dtype`. This patch exempts the tensors of a packed weight: scales
rounded to bf16 would be another weight. If a release of PyTorch moves the patched method, FSDP2 casts the scales, and
QuantLinear then raises a TypeError.
"""

from typing import Any

from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

_init_dtype_attrs = FSDPParam.init_dtype_attrs


def _init_dtypes_except_packed(parameter: FSDPParam, policy: Any) -> None:
    """FSDP's `init_dtype_attrs`, with no `param_dtype` for a tensor of a packed weight."""
    from .quant_linear import QuantLinear  # PyTorch is half imported at the top of this module

    _init_dtype_attrs(parameter, policy)
    module_info = parameter._module_info
    if isinstance(module_info.module, QuantLinear) and module_info.param_name != "bias":
        parameter.param_dtype = None


FSDPParam.init_dtype_attrs = _init_dtypes_except_packed  # type: ignore[method-assign, assignment]
