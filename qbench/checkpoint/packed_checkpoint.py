"""Packed checkpoints: folders that hold a model whose linear layers are in a format.

This project's layout:

    config.json                        the model's own, with the `Recipe` under "quantization_config"
    model-0000k-of-0000n.safetensors   the tensors, under their names in the model. A packed layer has the tensors of its
                                       `QuantLinear`: codes; scale, with dq scale_absmax and scale_offset; the same for
                                       shift, if blocks are shifted; levels, if each weight has its own table; the bias.
                                       Other tensors are unchanged
    model.safetensors.index.json       which tensor is in which file
    and the files of the tokenizer and of generation

transformers' `save_pretrained` and `from_pretrained` write and read this layout, through `transformers_plugin`. (If one
file is enough, it is model.safetensors, without an index.) `streaming` writes it without loading the model.

`load` also reads the layouts of bitsandbytes and GGUF (`layouts`). In every layout, the headers of the files are compared
with the model before a tensor is read. Packed tensors go straight into their layers: these weights are never in 16 bit.
"""

import copy
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from qbench.errors import InputError
from qbench.model.quant_linear import QuantLinear
from qbench.model.quantizing import quantize
from qbench.model.replacement import disable_weight_edits, replace_layers
from qbench.model.selection import count_coverage, packed_layers, warn_of_layers_left, weight_of
from qbench.system import files

from . import auto_classes, empty_model, safetensors_io
from .layouts import bitsandbytes, gguf
from .layouts.base import ForeignCheckpoint, ForeignTensors, PackedCheckpoint
from .recipe import CARD, CONFIG, KEY, Recipe, find_recipe
from .safetensors_io import Contents
from .sixteen_bit import GENERATION_CONFIG, reading_model
from .transformers_plugin import attach_recipe

LAYOUTS = {"qbench": Recipe, "bitsandbytes": bitsandbytes.BitsAndBytesRecipe}  #: the layouts that `save` can write


@dataclass
class LoadedModel:
    """A model and its tokenizer. model: in eval mode, frozen, on the device."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class PackedFolder(PackedCheckpoint):
    """A checkpoint in this project's layout."""

    recipe: Recipe

    def __str__(self) -> str:
        return repr(self.recipe.format)


def find(path: Path) -> PackedCheckpoint | None:
    """The packed checkpoint at a path; None if there is none. Raises InputError if its config is not valid."""
    if gguf.is_gguf(path):
        return gguf.GGUFFile(path)
    if recipe := find_recipe(path):
        return PackedFolder(path, recipe)
    return bitsandbytes.BitsAndBytesFolder(path) if bitsandbytes.find_config(path) else None


def load(path: Path, device: torch.device, dtype: torch.dtype, tokenizer: Path | None = None) -> LoadedModel:
    """Load a packed checkpoint and its tokenizer; tensors that are not packed are cast to `dtype`.

    path: a folder that `qbench quantize`, `save` or `save_pretrained` wrote (the last also with bitsandbytes in 4 bits);
    or a GGUF file. tokenizer: a folder with a tokenizer, if the checkpoint has none. Raises InputError, naming file and
    tensor, for a checkpoint that does not match its config.
    """
    checkpoint = find(path)
    if checkpoint is None:
        raise InputError(f"{path} is not packed; accepted: what qbench quantize or bitsandbytes wrote, a GGUF file")
    transformers_logging.disable_progress_bar()
    with reading_model(path):
        tokens = auto_classes.load_tokenizer(tokenizer) if tokenizer else checkpoint.tokenizer()
        if isinstance(checkpoint, ForeignCheckpoint):
            model = _load_foreign(checkpoint, device, dtype)
        else:
            checkpoint.config()  # refuses a config of a huge model before `from_pretrained` builds it
            model = auto_classes.load_packed_model(path, dtype)
    model.to(device)  # type: ignore[arg-type]  # a wrapper hides its arguments
    return LoadedModel(model.eval().requires_grad_(False), tokens)


def _load_foreign(checkpoint: ForeignCheckpoint, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint of bitsandbytes or GGUF."""
    model = empty_model.build_empty(checkpoint.config(), dtype)
    for module in model.modules():
        vars(module)["_is_hf_initialized"] = False
    model.initialize_weights()  # recomputes the buffers: some were computed while the default dtype was `dtype`
    if (checkpoint.path / GENERATION_CONFIG).is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True)
    tensors = checkpoint.map_tensors(model)
    empty_model.place_empty_layers(model, tensors.layers)
    specs = safetensors_io.merge_specs(tensors.contents)
    missing = empty_model.check_tensors(model, specs, checkpoint.path, tensors.names_in_file)
    _fill_tensors(model, tensors, device, dtype)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    layers = packed_layers(model)
    for name, layer in layers.items():
        empty_model.complete_layer(f"{checkpoint.path}: {name}", layer, tensors.layers[name][0])
    if layers:
        attach_recipe(model, _make_recipe(model, layers, checkpoint.recipe))
    return model


def _fill_tensors(model: PreTrainedModel, tensors: ForeignTensors, device: torch.device, dtype: torch.dtype) -> None:
    """Read each tensor of the checkpoint into its place in the model. Raises InputError for NaN and Inf."""
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    packed_names = empty_model.packed_tensor_names(model)
    # tensors that the model keeps in fp32 whatever its dtype; transformers 5.0 has an attribute instead of a method
    plan: Any = getattr(model, "_get_dtype_plan", None)
    for pattern, kept in (plan(dtype) if plan else vars(model)["dtype_plan"]).items():
        dtypes |= {name: kept for name in dtypes.keys() - packed_names if re.search(pattern, name)}
    for file, specs in tensors.contents.items():
        for name in [name for name in specs if name in dtypes]:
            tensor = tensors.read(file, name)
            if not empty_model.is_finite(tensor):
                original = tensors.names_in_file.get(name, name)
                raise InputError(f"{file}: {original} holds NaN or Inf; finite values are accepted")
            parent, _, leaf = name.rpartition(".")
            owner = model.get_submodule(parent)
            tensor = tensor.to(device, dtypes[name], copy=True)  # without a copy it would stay mapped from the file
            setattr(owner, leaf, nn.Parameter(tensor, False) if leaf in owner._parameters else tensor)


def save(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    arguments: dict | None = None,
    layout: str = "qbench",
) -> None:
    """Write a model with packed layers, all of one format, through its `save_pretrained`.

    folder: new or empty. arguments: those of `formats.get` for the format. By default they are those that the model was
    loaded with, or the name of the format, block and dq.

    layout: `qbench`, or `bitsandbytes`, which `from_pretrained` reads if bitsandbytes is installed. The latter stores nf4
    and fp4; linear layers that are not packed stay as they are. Raises InputError for a model that `load` could not read
    back.
    """
    layers = packed_layers(model)
    if not layers:
        raise InputError(f"{type(model).__name__} has no packed layer; accepted: a model that is quantized")
    recipe = _make_recipe(model, layers, get_layout(layout), arguments)
    folder.mkdir(parents=True, exist_ok=True)
    if present := sorted(file.name for file in folder.iterdir()):
        raise InputError(f"{folder} holds {', '.join(present[:3])}; accepted: a new or empty folder")
    with _saved_as(model, recipe):
        model.save_pretrained(folder)
    _write_card(folder, recipe)
    if tokenizer:
        tokenizer.save_pretrained(folder)


@contextmanager
def _saved_as(model: PreTrainedModel, recipe: Recipe) -> Iterator[None]:
    """Have `save_pretrained` follow the recipe inside this context; the model is unchanged afterwards."""
    attributes = (vars(model), "hf_quantizer"), (vars(model.config), KEY)
    before = [(holder, key, holder.get(key)) for holder, key in attributes]
    attach_recipe(model, recipe)
    try:
        yield
    finally:
        for holder, key, value in before:
            holder[key] = value
            if value is None:
                del holder[key]


def get_layout(name: str) -> type[Recipe]:
    """The class of recipes for a layout. Raises InputError if the layout is unknown."""
    if name not in LAYOUTS:
        raise InputError(f"layout: {name!r} is unknown; accepted: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _make_recipe(
    model: PreTrainedModel,
    layers: dict[str, QuantLinear],
    layout: type[Recipe] = Recipe,
    arguments: dict | None = None,
) -> Recipe:
    """The recipe of a model with these packed layers."""
    if arguments is None and (known := getattr(getattr(model.config, KEY, None), "recipe", None)):
        arguments = known.arguments
    first = next(iter(layers.values()))
    arguments = arguments or {"name": first.format, "block": first.block, "dq": first.dq}
    return layout.of(arguments, {name: layer.dtype for name, layer in layers.items()}, model, count_coverage(model))


def write_config_and_index(folder: Path, config: dict, recipe: Recipe, contents: Contents) -> None:
    """Write the files that make a folder of tensors a checkpoint. The index comes last: it shows that all is there."""
    _write_card(folder, recipe)
    for name, content in (
        (CONFIG, config | {KEY: recipe.to_json()}),
        (safetensors_io.INDEX, safetensors_io.make_index(contents)),
    ):
        with files.atomic_write(folder / name) as file:
            file.write(json.dumps(content, indent=2).encode() + b"\n")


def _write_card(folder: Path, recipe: Recipe) -> None:
    with files.atomic_write(folder / CARD) as file:
        file.write(recipe.model_card().encode())


def pack(model: PreTrainedModel, format: str, block: int = 64, dq: bool = False, **options: Any) -> PreTrainedModel:
    """Quantize a model in memory, in place, and return it: every linear layer outside of its head.

    The result has the same bits as a checkpoint that is loaded with `QBenchConfig`. format, block, dq and options:
    arguments of `formats.get`.

    Raises InputError, before anything is changed, if there is no such format or no such layer, or if a weight is tied, NaN
    or Inf. A warning names linear layers that stay in 16 bit because they compute more than a product.
    """
    recipe = Recipe.of({"name": format, "block": block, "dq": dq, **options}, {})
    layers = empty_model.layers_to_quantize(model, type(model).__name__)
    warn_of_layers_left(model)
    dtypes = {name: weight_of(layer).dtype for name, layer in layers.items()}
    disable_weight_edits(model)
    replace_layers(model, quantize(layers, recipe.format))
    model.config = copy.copy(model.config)  # other models may share it, and are not packed
    attach_recipe(model, Recipe.of(recipe.arguments, dtypes, coverage=count_coverage(model)))
    return model
