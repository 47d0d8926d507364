"""Packed checkpoints: a folder with a model whose linear layers are in a format.

This project's layout:

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

The layouts of others are in `interop`, and `load` reads them: what transformers makes of such a checkpoint is not touched.
Whatever the layout, the packed tensors go straight to their places, so that none of these weights is ever in 16 bit.
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
from qbench.model.replacement import hold_still, replace
from qbench.model.selection import coverage, packed_layers, warn_of_left, weight_of
from qbench.system import files

from . import auto_classes, empty_model, safetensors_io
from .layouts import bitsandbytes, gguf
from .layouts.base import Foreign, Held, Packed
from .recipe import CARD, CONFIG, KEY, Recipe
from .recipe import find as find_recipe
from .safetensors_io import Contents
from .sixteen_bit import GENERATION, reading
from .transformers_plugin import tell

LAYOUTS = {"qbench": Recipe, "bitsandbytes": bitsandbytes.Recipe}  #: those that can be written


@dataclass
class LoadedModel:
    """model: in eval mode, frozen, on the device."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Folder(Packed):
    """One in this project's layout."""

    recipe: Recipe

    def __str__(self) -> str:
        return repr(self.recipe.format)


def find(path: Path) -> Packed | None:
    """The packed checkpoint at a path, None where there is none. Raises InputError for a config that is none."""
    if gguf.is_one(path):
        return gguf.File(path)
    if recipe := find_recipe(path):
        return Folder(path, recipe)
    return bitsandbytes.Folder(path) if bitsandbytes.find(path) else None


def load(path: Path, device: torch.device, dtype: torch.dtype, tokenizer: Path | None = None) -> LoadedModel:
    """Load a packed checkpoint and its tokenizer; what is not packed is cast to `dtype`.

    path: a folder that `qbench.quantize`, `save` or `save_pretrained` wrote, or transformers with bitsandbytes in 4 bits;
    or a GGUF file. tokenizer: the folder of one, for a checkpoint that brings none. Raises InputError, naming file and
    tensor, for a checkpoint that is not what its config says.
    """
    found = find(path)
    if found is None:
        raise InputError(f"{path} is not packed; accepted: what qbench.quantize or bitsandbytes wrote, a GGUF file")
    transformers_logging.disable_progress_bar()
    with reading(path):
        tokens = auto_classes.tokenizer(tokenizer) if tokenizer else found.tokenizer()
        if isinstance(found, Foreign):
            model = _filled(found, device, dtype)
        else:
            found.config()  # refuses what `from_pretrained` would begin to build
            model = auto_classes.packed_model(path, dtype)
    model.to(device)  # type: ignore[arg-type]  # a wrapper hides its arguments
    return LoadedModel(model.eval().requires_grad_(False), tokens)


def _filled(found: Foreign, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint in the layout of others."""
    model = empty_model.bare(found.config(), dtype)
    for module in model.modules():
        vars(module)["_is_hf_initialized"] = False
    model.initialize_weights()  # the buffers once more: some are computed in the default dtype, here not `dtype`
    if (found.path / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(found.path, local_files_only=True)
    held = found.hold(model)
    empty_model.place(model, held.layers)
    missing = empty_model.match(model, safetensors_io.merged(held.contents), found.path, held.called)
    _fill(model, held, device, dtype)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    layers = packed_layers(model)
    for name, layer in layers.items():
        empty_model.settle(f"{found.path}: {name}", layer, held.layers[name][0])
    if layers:
        tell(model, _recipe(model, layers, found.recipe))
    return model


def _fill(model: PreTrainedModel, held: Held, device: torch.device, dtype: torch.dtype) -> None:
    expected = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    packed = empty_model.packed_names(model)
    # what a model computes in fp32, whatever the rest; an attribute in transformers 5.0
    plan: Any = getattr(model, "_get_dtype_plan", None)
    for pattern, kept in (plan(dtype) if plan else vars(model)["dtype_plan"]).items():
        expected |= {name: kept for name in expected.keys() - packed if re.search(pattern, name)}
    for file, specs in held.contents.items():
        for name in [name for name in specs if name in expected]:
            tensor = held.read(file, name)
            if not empty_model.finite(tensor):
                raise InputError(f"{file}: {held.called.get(name, name)} holds NaN or Inf; finite values are accepted")
            parent, _, leaf = name.rpartition(".")
            owner = model.get_submodule(parent)
            tensor = tensor.to(device, expected[name], copy=True)  # else it would stay mapped from the file
            setattr(owner, leaf, nn.Parameter(tensor, False) if leaf in owner._parameters else tensor)


def save(
    model: PreTrainedModel,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    arguments: dict | None = None,
    layout: str = "qbench",
) -> None:
    """Write a model with packed layers, of one format, however it came by them, by its own `save_pretrained`.

    folder: a new or empty one. arguments: what `formats.get` takes for that format; without them what the model was loaded
    with, or the name of the format, block and dq. layout: `qbench`, or `bitsandbytes` for `from_pretrained` with that: it
    keeps nf4 and fp4, and leaves linear layers that are not packed as they are. Raises InputError where `load` could not
    read it back.
    """
    layers = packed_layers(model)
    if not layers:
        raise InputError(f"{type(model).__name__} has no packed layer; accepted: a model that is quantized")
    recipe = _recipe(model, layers, layout_of(layout), arguments)
    folder.mkdir(parents=True, exist_ok=True)
    if held := sorted(file.name for file in folder.iterdir()):
        raise InputError(f"{folder} holds {', '.join(held[:3])}; accepted: a new or empty folder")
    with _told(model, recipe):
        model.save_pretrained(folder)
    _write_card(folder, recipe)
    if tokenizer:
        tokenizer.save_pretrained(folder)


@contextmanager
def _told(model: PreTrainedModel, recipe: Recipe) -> Iterator[None]:
    """While inside, a model is saved as the recipe says."""
    places = (vars(model), "hf_quantizer"), (vars(model.config), KEY)
    before = [(place, key, place.get(key)) for place, key in places]
    tell(model, recipe)
    try:
        yield
    finally:
        for place, key, value in before:
            place[key] = value
            if value is None:
                del place[key]


def layout_of(name: str) -> type[Recipe]:
    """Raises InputError where there is none of that name."""
    if name not in LAYOUTS:
        raise InputError(f"layout: {name!r} is unknown; accepted: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _recipe(
    model: PreTrainedModel,
    layers: dict[str, QuantLinear],
    layout: type[Recipe] = Recipe,
    arguments: dict | None = None,
) -> Recipe:
    """How the layers of a model are packed."""
    if arguments is None and (known := getattr(getattr(model.config, KEY, None), "recipe", None)):
        arguments = known.arguments
    first = next(iter(layers.values()))
    arguments = arguments or {"name": first.format, "block": first.block, "dq": first.dq}
    return layout.of(arguments, {name: layer.dtype for name, layer in layers.items()}, model, coverage(model))


def finish(folder: Path, config: dict, recipe: Recipe, contents: Contents) -> None:
    """Write what makes the files of tensors a checkpoint; the index last: where it is, the checkpoint is whole."""
    _write_card(folder, recipe)
    for name, content in (
        (CONFIG, config | {KEY: recipe.plain()}),
        (safetensors_io.INDEX, safetensors_io.index(contents)),
    ):
        with files.replaced(folder / name) as file:
            file.write(json.dumps(content, indent=2).encode() + b"\n")


def _write_card(folder: Path, recipe: Recipe) -> None:
    with files.replaced(folder / CARD) as file:
        file.write(recipe.card().encode())


def pack(model: PreTrainedModel, format: str, block: int = 64, dq: bool = False, **options: Any) -> PreTrainedModel:
    """Quantize a model that is in memory, in place: every linear layer but those of its head, as `QBenchConfig` does on
    the way from disk, to the same bits.

    format, block, dq and options: what `formats.get` takes. Returns the model. Raises InputError, before anything is
    changed, for what is no format, for a model without such layers, and naming the weight that is tied, NaN or Inf. A
    linear layer that computes something else than a product is left, and named in a warning.
    """
    recipe = Recipe.of({"name": format, "block": block, "dq": dq, **options}, {})
    layers = empty_model.layers_of(model, type(model).__name__)
    warn_of_left(model)
    dtypes = {name: weight_of(layer).dtype for name, layer in layers.items()}
    hold_still(model)
    replace(model, quantize(layers, recipe.format))
    model.config = copy.copy(model.config)  # other models may have been made from it, and are not packed
    tell(model, Recipe.of(recipe.arguments, dtypes, coverage=coverage(model)))
    return model
