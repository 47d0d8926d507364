"""A causal LM without its weights, and the checks of a checkpoint against it."""

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
from qbench.model.devices import dtype_name
from qbench.model.quant_linear import PackedParameter, QuantLinear
from qbench.model.replacement import disable_weight_edits, replace_layers
from qbench.model.selection import linear_layers, packed_layers, weight_of

from .recipe import Recipe
from .safetensors_io import SINGLE, TensorSpec
from .tensor_names import make_renamer

_OBSOLETE = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")  # tensors of older checkpoints that models now compute


def build_empty(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    kind: type[PreTrainedModel] | None = None,
    *,
    buffers: bool = True,
    trust: bool = False,
) -> PreTrainedModel:
    """The causal LM of a config, or a model of the class `kind`, with its parameters on the meta device.

    buffers: compute the buffers; else they are on the meta device, too. trust: run the code that comes with the
    checkpoint.
    """
    config = copy.deepcopy(config)
    with init_empty_weights(include_buffers=not buffers):
        if kind:
            return kind._from_config(config, dtype=dtype)
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust)


def check_tensors(
    model: PreTrainedModel, specs: dict[str, TensorSpec], where: Path | str, names_in_file: dict[str, str] | None = None
) -> set[str]:
    """Compare the tensors of a checkpoint with those of a model: names, shapes, and dtypes of packed ones.

    specs: the tensors, by their names in the model. names_in_file: their names in the file, for messages. Returns the
    names of tensors that are absent because they are tied to a present one. Raises InputError naming the first tensor
    that is missing, of another shape, or unknown. Tensors that the model is known to ignore are accepted.
    """
    expected = {name: TensorSpec.of(tensor) for name, tensor in model.state_dict().items()}
    packed_names, originals = packed_tensor_names(model), names_in_file or {}
    ignored = [*_OBSOLETE, *(model._keys_to_ignore_on_load_unexpected or ())]
    for name, spec in specs.items():
        if name not in expected:
            if not any(re.search(pattern, name) for pattern in ignored):
                raise InputError(f"{where}: {originals.get(name, name)} has no place in a {type(model).__name__}")
        elif spec.shape != expected[name].shape or (name in packed_names and spec != expected[name]):
            raise InputError(f"{where}: {originals.get(name, name)} is {spec}; accepted: {expected[name]}")
    present = set(specs)
    for _ in range(2):  # of three tied tensors, the pair of the two absent ones may come first
        for pair in model.all_tied_weights_keys.items():
            present |= set(pair) if present & set(pair) else set()
    for name in expected:
        if name not in present:
            raise InputError(f"{where}: {originals.get(name, name)} is missing")
    return expected.keys() - specs.keys()


def packed_tensor_names(model: nn.Module) -> set[str]:
    """The names of the tensors that make up the packed weights of a model."""
    layers = packed_layers(model).items()
    return {f"{name}.{key}" for name, layer in layers for key in layer.stored_tensors() if key != "bias"}


def layers_to_quantize(
    model: PreTrainedModel, where: Path | str, specs: dict[str, TensorSpec] | None = None
) -> dict[str, nn.Module]:
    """The layers of a model to quantize, by name.

    where: names the model in errors. specs: the tensors of its checkpoint; by default those of the model. Raises
    InputError for a weight that is tied or not floating point.
    """
    layers = linear_layers(model)
    specs = specs or {name: TensorSpec.of(tensor) for name, tensor in model.state_dict().items()}
    tied = {*model.all_tied_weights_keys.keys(), *model.all_tied_weights_keys.values()}
    for weight in (f"{name}.weight" for name in layers):
        if weight in tied:
            raise InputError(f"{where}: {weight} is tied to another tensor; accepted: linear layers of their own")
        if not specs[weight].dtype.is_floating_point:
            raise InputError(f"{where}: {weight} is {dtype_name(specs[weight].dtype)}; accepted: floating point")
    return layers


def place_empty_layers(model: PreTrainedModel, layers: dict[str, tuple[Format, torch.dtype]]) -> None:
    """Replace these layers with empty QuantLinears: the `state_dict` then has the tensors of the checkpoint."""
    disable_weight_edits(model)
    shapes = {name: weight_of(model.get_submodule(name)).shape for name in layers}
    replace_layers(model, {name: fmt.empty(shapes[name], dtype) for name, (fmt, dtype) in layers.items()})
    for layer in packed_layers(model).values():
        layer.identified = False  # the config.json of a checkpoint names the format, not each layer
        for name, tensor in layer.stored_tensors().items():  # in the shapes that files have
            if name != "bias":
                layer.register_parameter(name, PackedParameter(tensor))


def complete_layer(name: str, layer: QuantLinear, fmt: Format) -> None:
    """Complete a layer whose tensors have been read: add the levels of its format, which are not in the checkpoint.

    Raises InputError if the weight decodes to NaN or Inf, which can happen even with finite scales.
    """
    layer.identified = True
    for part, tensor in layer.named_parameters():
        # offloaded tensors come back in the shape of their file
        if tensor.shape == torch.Size() and not tensor.is_meta:
            layer.register_parameter(part, PackedParameter(tensor.detach().reshape(1)))
    if not layer.own_levels and layer.levels is not None:
        levels = fmt.empty(torch.Size([0]), layer.dtype, layer.codes.device).levels
        layer.table, layer.levels = _shared_levels(fmt), levels
    if not layer.codes.is_meta and not layer.packed.is_finite():
        raise InputError(f"{name} decodes to NaN or Inf in {dtype_name(layer.dtype)}; finite weights are accepted")


def check_offloaded(model: PreTrainedModel, name: str, layer: QuantLinear) -> None:
    """Raises InputError if tensors offloaded to disk come back in another dtype, as with transformers 5.0."""
    for part, tensor in layer.stored_tensors(f"{name}.").items():
        if tensor.is_floating_point() and load_offloaded_parameter(model, part).dtype != tensor.dtype:
            raise InputError(f"{part} is on disk, where this release of transformers rounds it; accepted: a newer one")


def _check_names(model: PreTrainedModel, empty: PreTrainedModel, tensors: dict[str, Tensor]) -> None:
    """Raises InputError if transformers would save these tensors under names that `load` does not find.

    For some architectures transformers merges several tensors into one, or renames them, by rules for 16-bit weights.
    """
    rename = make_renamer(empty)
    try:
        names = {rename(name, Path(SINGLE)) for name in revert_weight_conversion(model, tensors)}
    except Exception:  # rules for 16-bit weights may fail on packed tensors
        names = set()
    if names != tensors.keys():
        raise InputError(
            f"a {type(model).__name__} is saved in a layout that has no place for packed weights; accepted: models whose "
            "tensors are saved one by one, under the names that they have in it"
        )


def _shared_levels(fmt: Format) -> tuple[float, ...] | None:
    """The levels of a format, if all tensors share them; otherwise None."""
    levels = None if fmt.own_levels else fmt.empty(torch.Size([0]), torch.float32, "cpu").levels
    return None if levels is None else tuple(levels.tolist())


def tensors_to_save(model: PreTrainedModel, recipe: Recipe) -> dict[str, Tensor]:
    """The tensors to be saved for a model. Raises InputError if they could not be loaded again with this recipe."""
    empty, tensors = build_empty(model.config, model.dtype, type(model)), model.state_dict()
    place_empty_layers(empty, recipe.layers(empty))
    modules = dict(model.named_modules())
    for name in packed_layers(empty):
        if not isinstance(layer := modules.get(name), QuantLinear):
            raise InputError(f"{name} is a {type(layer).__name__}; accepted: a QuantLinear")
    for name, layer in packed_layers(model).items():  # in the shapes that files have
        tensors.pop(f"{name}._extra_state", None)  # a sharded layer has none
        tensors |= layer.stored_tensors(f"{name}.")
    check_tensors(empty, {name: TensorSpec.of(tensor) for name, tensor in tensors.items()}, type(model).__name__)
    _check_names(model, empty, {name: tensors[name].to("meta") for name in packed_tensor_names(empty)})
    for name, layer in packed_layers(model).items():
        if layer.table != _shared_levels(recipe.format):
            raise InputError(f"{name} has other levels than {recipe.format!r}; accepted: the arguments of its format")
        for part in layer.stored_tensors():
            del tensors[f"{name}.{part}"]
        tensors |= recipe.tensors_of(name, layer)
    for name, tensor in tensors.items():
        if tensor.is_meta and tensor.shape == torch.Size():  # an offloaded tensor
            tensors[name] = load_offloaded_parameter(model, name).reshape(())
    return tensors


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any dtype holds neither NaN nor Inf. Checked in parts, to save memory."""
    return not tensor.is_floating_point() or all(
        bool(part.isfinite().all()) for part in tensor.reshape(-1).split(2**24)
    )
