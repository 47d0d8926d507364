"""A causal LM before its weights are there: what it holds, which of it is packed, and whether a checkpoint is that."""

import copy
import re
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations.accelerate import load_offloaded_parameter

from formats import Format
from qbench.errors import InputError
from qbench.model.quant_linear import PackedParameter, QuantLinear
from qbench.model.replacement import hold_still, replace
from qbench.model.selection import linear_layers, packed_layers, weight_of

from .recipe import Recipe, word
from .safetensors_io import SINGLE, Spec
from .tensor_names import renaming

_OF_OLD = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")  # in older checkpoints; models compute them now


def bare(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    kind: type[PreTrainedModel] | None = None,
    *,
    buffers: bool = True,
    trust: bool = False,
) -> PreTrainedModel:
    """The causal LM of a config, or a model of another kind, without its weights: parameters are on the meta device, and
    without `buffers` these too.

    trust: run the code that its checkpoint brings along.
    """
    config = copy.deepcopy(config)
    with init_empty_weights(include_buffers=not buffers):
        if kind:
            return kind._from_config(config, dtype=dtype)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)


def match(
    model: PreTrainedModel, found: dict[str, Spec], where: Path | str, called: dict[str, str] | None = None
) -> set[str]:
    """Hold the tensors of a checkpoint against those of a model, by name and shape, the packed ones by dtype as well.

    called: names in the file, where they are others than the model's. Returns what is not there because the model ties it
    to what is. Raises InputError that names the first tensor that is missing, misshapen, or has no place; one that the
    model is known to leave aside may be there.
    """
    expected = {name: Spec.of(tensor) for name, tensor in model.state_dict().items()}
    packed, called = packed_names(model), called or {}
    aside = [*_OF_OLD, *(model._keys_to_ignore_on_load_unexpected or ())]
    for name, spec in found.items():
        if name not in expected:
            if not any(re.search(pattern, name) for pattern in aside):
                raise InputError(f"{where}: {called.get(name, name)} has no place in a {type(model).__name__}")
        elif spec.shape != expected[name].shape or (name in packed and spec != expected[name]):
            raise InputError(f"{where}: {called.get(name, name)} is {spec}; accepted: {expected[name]}")
    present = set(found)
    for _ in range(2):  # of three that are tied, the pair without the one that is there may come first
        for pair in model.all_tied_weights_keys.items():
            present |= set(pair) if present & set(pair) else set()
    for name in expected:
        if name not in present:
            raise InputError(f"{where}: {called.get(name, name)} is missing")
    return expected.keys() - found.keys()


def packed_names(model: nn.Module) -> set[str]:
    """The names of the tensors that the packed weights of a model are."""
    layers = packed_layers(model).items()
    return {f"{name}.{key}" for name, layer in layers for key in layer.stored() if key != "bias"}


def layers_of(model: PreTrainedModel, where: Path | str, found: dict[str, Spec] | None = None) -> dict[str, nn.Module]:
    """The layers of a model to quantize, by name. found: the tensors of its checkpoint, where the model has others.

    Raises InputError for one whose weight is tied, or not of floats.
    """
    layers = linear_layers(model)
    found = found or {name: Spec.of(tensor) for name, tensor in model.state_dict().items()}
    tied = {*model.all_tied_weights_keys.keys(), *model.all_tied_weights_keys.values()}
    for weight in (f"{name}.weight" for name in layers):
        if weight in tied:
            raise InputError(f"{where}: {weight} is tied to another tensor; accepted: linear layers of their own")
        if not found[weight].dtype.is_floating_point:
            raise InputError(f"{where}: {weight} is {word(found[weight].dtype)}; accepted: floating point")
    return layers


def place(model: PreTrainedModel, layers: dict[str, tuple[Format, torch.dtype]]) -> None:
    """Put an empty QuantLinear in the place of each of these layers: `state_dict` then tells what a checkpoint holds."""
    hold_still(model)
    shapes = {name: weight_of(model.get_submodule(name)).shape for name in layers}
    replace(model, {name: fmt.empty(shapes[name], dtype) for name, (fmt, dtype) in layers.items()})
    for layer in packed_layers(model).values():
        layer.identified = False  # its config.json says what format a checkpoint is of, not each layer
        for name, tensor in layer.stored().items():  # in the shapes in which it is stored
            if name != "bias":
                layer.register_parameter(name, PackedParameter(tensor))


def settle(name: str, layer: QuantLinear, fmt: Format) -> None:
    """Complete a layer whose tensors have been read, by the levels of its format, which no checkpoint holds.

    Raises InputError where scales, each of them finite, make weights that are not.
    """
    layer.identified = True
    for part, tensor in layer.named_parameters():
        if tensor.shape == torch.Size() and not tensor.is_meta:  # offloaded, it comes back in the shape of its file
            layer.register_parameter(part, PackedParameter(tensor.detach().reshape(1)))
    if not layer.own_levels and layer.levels is not None:
        levels = fmt.empty(torch.Size([0]), layer.dtype, layer.codes.device).levels
        layer.table, layer.levels = _table_of(fmt), levels
    if not layer.codes.is_meta and not layer.packed.is_finite():
        raise InputError(f"{name} decodes to NaN or Inf in {word(layer.dtype)}; finite weights are accepted")


def check_offloaded(model: PreTrainedModel, name: str, layer: QuantLinear) -> None:
    """Raises InputError where what is offloaded to disk comes back in another dtype, as with transformers 5.0."""
    for part, tensor in layer.stored(f"{name}.").items():
        if tensor.is_floating_point() and load_offloaded_parameter(model, part).dtype != tensor.dtype:
            raise InputError(f"{part} is on disk, where this release of transformers rounds it; accepted: a newer one")


def _check_names(model: PreTrainedModel, empty: PreTrainedModel, packed: dict[str, Tensor]) -> None:
    """Raises InputError where transformers saves these tensors so that they are not found again: several in one, as an
    older layout has it, or under names that are made for weights in 16 bit.
    """
    rename = renaming(empty)
    try:
        found = {rename(name, Path(SINGLE)) for name in revert_weight_conversion(model, packed)}
    except Exception:  # what it makes of packed tensors, or `rename` of that
        found = set()
    if found != packed.keys():
        raise InputError(
            f"a {type(model).__name__} is saved in a layout that has no place for packed weights; accepted: models whose "
            "tensors are saved one by one, under the names that they have in it"
        )


def _table_of(fmt: Format) -> tuple[float, ...] | None:
    """The levels that a format has for every tensor; None where each has its own, or there are none."""
    levels = None if fmt.own_levels else fmt.empty(torch.Size([0]), torch.float32, "cpu").levels
    return None if levels is None else tuple(levels.tolist())


def checked(model: PreTrainedModel, recipe: Recipe) -> dict[str, Tensor]:
    """The tensors of the checkpoint of a model. Raises InputError where they could not be read back by this recipe."""
    empty, tensors = bare(model.config, model.dtype, type(model)), model.state_dict()
    place(empty, recipe.layers(empty))
    modules = dict(model.named_modules())
    for name in packed_layers(empty):
        if not isinstance(layer := modules.get(name), QuantLinear):
            raise InputError(f"{name} is a {type(layer).__name__}; accepted: a QuantLinear")
    for name, layer in packed_layers(model).items():  # as files keep it
        tensors.pop(f"{name}._extra_state", None)  # one that is sharded has none
        tensors |= layer.stored(f"{name}.")
    match(empty, {name: Spec.of(tensor) for name, tensor in tensors.items()}, type(model).__name__)
    _check_names(model, empty, {name: tensors[name].to("meta") for name in packed_names(empty)})
    for name, layer in packed_layers(model).items():
        if layer.table != _table_of(recipe.format):
            raise InputError(f"{name} has other levels than {recipe.format!r}; accepted: the arguments of its format")
        for part in layer.stored():
            del tensors[f"{name}.{part}"]
        tensors |= recipe.tensors(name, layer)
    for name, tensor in tensors.items():
        if tensor.is_meta and tensor.shape == torch.Size():  # offloaded, in the shape that it has in the module
            tensors[name] = load_offloaded_parameter(model, name).reshape(())
    return tensors


def finite(tensor: Tensor) -> bool:
    """Whether a tensor of any dtype holds neither NaN nor Inf; looks at a part at a time, to take no memory for it."""
    return not tensor.is_floating_point() or all(
        bool(part.isfinite().all()) for part in tensor.reshape(-1).split(2**24)
    )
