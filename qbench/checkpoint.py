"""Packed checkpoints: a folder with a model whose linear layers are in a format.

    config.json                        the model's own, and the `Recipe` under "quantization_config"
    model-0000k-of-0000n.safetensors   the tensors under their names in the model. Of a packed layer those of its
                                       `QuantLinear`: codes; scale, with dq scale_absmax and scale_offset; where blocks are
                                       shifted the same of shift; levels where each weight has a table of its own; the
                                       bias. All else is as it was
    model.safetensors.index.json       which tensor is in which file
    and the files of the tokenizer and of generation

This is what `save_pretrained` of transformers writes of such a model (without an index model.safetensors, if one file is
enough) and `from_pretrained` reads, both through `pretrained`, and what `qbench.quantize` writes without the model. Before
a tensor is read, the headers of the files are held against the model: here, for all of them.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from . import files, shards
from .errors import InputError
from .layers import QuantLinear, linear_layers, replace, weight_of
from .recipe import CONFIG, KEY, Recipe, word
from .shards import Contents, Spec

_OF_OLD = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")  # in older checkpoints; models compute them now


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Whatever goes wrong in reading a model, but memory, as an InputError that names it."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{what} could not be loaded: {first_line}") from error


def skeleton(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal LM of a config without its weights: parameters are on the meta device, buffers real."""
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)


def named(model: PreTrainedModel, contents: Contents) -> tuple[dict[str, str], dict[str, Spec]]:
    """What the model calls each tensor of a checkpoint, and what a header tells of it, by that name. Raises InputError."""
    rename = _renaming(model)
    names: dict[str, str] = {}
    found: dict[str, Spec] = {}
    for file, specs in contents.items():
        for tensor, spec in specs.items():
            names[tensor] = rename(tensor, file)
            if names[tensor] in found:
                raise InputError(f"{file}: {tensor} is there a second time, under another name; accepted: one of them")
            found[names[tensor]] = spec
    return names, found


def _renaming(model: PreTrainedModel) -> Callable[[str, Path], str]:
    """What `from_pretrained` makes of names: the model's own renamings, and the prefix of the base model on or off.

    Some architectures also merge, split or turn tensors as they load; such a tensor is refused.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()

    def rename(tensor: str, file: Path) -> str:
        name, converted = rename_source_key(tensor, renamings, converters, prefix, state)
        if name not in state and tensor in state:
            return tensor
        if converted is not None:
            raise InputError(
                f"{file}: {tensor} is no tensor of the {type(model).__name__}, which makes {name} of such; accepted: "
                "checkpoints whose tensors are the model's, one by one"
            )
        return name

    return rename


def match(model: PreTrainedModel, found: dict[str, Spec], where: Path) -> None:
    """Hold the tensors of a checkpoint against those of a model, by name and shape, the packed ones by dtype as well.

    Raises InputError that names the first tensor that is missing, misshapen, or has no place. What the model ties to
    another may be missing; what it is known to leave aside may be there.
    """
    expected = {name: Spec.of(tensor) for name, tensor in model.state_dict().items()}
    packed = _packed_names(model)
    aside = [*_OF_OLD, *(model._keys_to_ignore_on_load_unexpected or ())]
    for name, spec in found.items():
        if name not in expected:
            if not any(re.search(pattern, name) for pattern in aside):
                raise InputError(f"{where}: {name} has no place in the {type(model).__name__} of its {CONFIG}")
        elif spec.shape != expected[name].shape or (name in packed and spec != expected[name]):
            raise InputError(f"{where}: {name} is {_told(spec)}; accepted: {_told(expected[name])}")
    present = set(found)
    for _ in range(2):  # of three that are tied, the pair without the one that is there may come first
        for pair in model.all_tied_weights_keys.items():
            present |= set(pair) if present & set(pair) else set()
    for name in expected:
        if name not in present:
            raise InputError(f"{where}: {name} is missing")


def _packed_names(model: nn.Module) -> set[str]:
    """The names of the tensors that the packed weights of a model are."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    return {f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict() if key != "bias"}


def _told(spec: Spec) -> str:
    return f"{word(spec.dtype)} {list(spec.shape)}"


def layers_of(model: PreTrainedModel, found: dict[str, Spec], where: Path) -> dict[str, nn.Module]:
    """The layers of a model to quantize, by name. Raises InputError for one whose weight is tied, or not of floats."""
    layers = linear_layers(model)
    tied = {*model.all_tied_weights_keys.keys(), *model.all_tied_weights_keys.values()}
    for weight in (f"{name}.weight" for name in layers):
        if weight in tied:
            raise InputError(f"{where}: {weight} is tied to another tensor; accepted: linear layers of their own")
        if not found[weight].dtype.is_floating_point:
            raise InputError(f"{where}: {weight} is {word(found[weight].dtype)}; accepted: floating point")
    return layers


def pack(model: PreTrainedModel, recipe: Recipe) -> None:
    """Put an empty QuantLinear in the place of each linear layer: `state_dict` then tells what a checkpoint holds."""
    shapes = {name: weight_of(layer).shape for name, layer in linear_layers(model).items()}
    replace(model, {name: recipe.format.empty(shape, recipe.dtype_of(name)) for name, shape in shapes.items()})
    for layer in map(model.get_submodule, shapes):
        if layer.levels is not None:  # one that many share, transformers would move to the device of the first alone
            layer.levels = torch.empty_like(layer.levels)


def finite(tensor: Tensor) -> bool:
    """Whether a tensor of any dtype holds neither NaN nor Inf; looks at a part at a time, to take no memory for it."""
    return not tensor.is_floating_point() or all(
        bool(part.isfinite().all()) for part in tensor.reshape(-1).split(2**24)
    )


def finish(folder: Path, config: dict, recipe: Recipe, contents: Contents) -> None:
    """Write what makes the files of tensors a checkpoint; the index last: where it is, the checkpoint is whole."""
    for name, content in ((CONFIG, config | {KEY: recipe.plain()}), (shards.INDEX, shards.index(contents))):
        with files.replaced(folder / name) as file:
            file.write(json.dumps(content, indent=2).encode() + b"\n")
