"""FSDP2's mixed precision casts what it gathers to its `param_dtype`; the scales of a packed weight stay as they are.

A release of PyTorch that has this elsewhere would cast them, which a QuantLinear refuses.
"""

from typing import Any

from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

_init_dtype_attrs = FSDPParam.init_dtype_attrs


def _keeping(parameter: FSDPParam, policy: Any) -> None:
    from .quant_linear import QuantLinear  # PyTorch is half imported when this module is

    _init_dtype_attrs(parameter, policy)
    place = parameter._module_info
    if isinstance(place.module, QuantLinear) and place.param_name != "bias":
        parameter.param_dtype = None


FSDPParam.init_dtype_attrs = _keeping  # type: ignore[method-assign, assignment]
