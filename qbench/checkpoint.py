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

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from formats import Format

from . import files, shards
from .errors import InputError
from .interop import bitsandbytes, gguf
from .interop.packed import Foreign, Held, Packed
from .layers import QuantLinear, linear_layers, replace, weight_of
from .recipe import CONFIG, KEY, Recipe, word
from .recipe import find as find_recipe
from .shards import Contents, Spec

GENERATION = "generation_config.json"
LAYOUTS = {"qbench": Recipe, "bitsandbytes": bitsandbytes.Recipe}  #: those that can be written
_OF_OLD = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")  # in older checkpoints; models compute them now


@dataclass
class LoadedModel:
    """model: in eval mode, frozen, on the device."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


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


def match(
    model: PreTrainedModel, found: dict[str, Spec], where: Path, called: dict[str, str] | None = None
) -> set[str]:
    """Hold the tensors of a checkpoint against those of a model, by name and shape, the packed ones by dtype as well.

    called: names in the file, where they are others than the model's. Returns what is not there because the model ties it
    to what is. Raises InputError that names the first tensor that is missing, misshapen, or has no place; one that the
    model is known to leave aside may be there.
    """
    expected = {name: Spec.of(tensor) for name, tensor in model.state_dict().items()}
    packed, called = _packed_names(model), called or {}
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


def _packed_layers(model: nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def _packed_names(model: nn.Module) -> set[str]:
    """The names of the tensors that the packed weights of a model are."""
    layers = _packed_layers(model).items()
    return {f"{name}.{key}" for name, layer in layers for key in layer.state_dict() if key != "bias"}


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


def pack(model: PreTrainedModel, layers: dict[str, tuple[Format, torch.dtype]]) -> None:
    """Put an empty QuantLinear in the place of each of these layers: `state_dict` then tells what a checkpoint holds."""
    shapes = {name: weight_of(model.get_submodule(name)).shape for name in layers}
    replace(model, {name: fmt.empty(shapes[name], dtype) for name, (fmt, dtype) in layers.items()})
    for layer in map(model.get_submodule, layers):
        if layer.levels is not None:  # one that many share, transformers would move to the device of the first alone
            layer.levels = torch.empty_like(layer.levels)


class Folder(Packed):
    """One in this project's layout."""

    def __str__(self) -> str:
        return repr(find_recipe(self.path).format)


def find(path: Path) -> Packed | None:
    """The packed checkpoint at a path, None where there is none. Raises InputError for a config that is none."""
    if gguf.is_one(path):
        return gguf.File(path)
    if find_recipe(path):
        return Folder(path)
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
        tokens = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True) if tokenizer else found.tokenizer()
        if isinstance(found, Foreign):
            model = _filled(found, device, dtype)
        else:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    model.to(device).eval().requires_grad_(False)
    return LoadedModel(model, tokens)


def _filled(found: Foreign, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint in the layout of others."""
    model = skeleton(found.config(), dtype)
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()  # the buffers once more: some are computed in the default dtype, here not `dtype`
    if (found.path / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(found.path, local_files_only=True)
    held = found.hold(model)
    pack(model, held.layers)
    missing = match(model, shards.merged(held.contents), found.path, held.called)
    _fill(model, held, device, dtype)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    for name, (fmt, kept) in held.layers.items():
        layer = model.get_submodule(name)
        if not layer.own_levels:
            layer.levels = fmt.empty(torch.Size([0]), kept, device).levels
    return model


def _fill(model: PreTrainedModel, held: Held, device: torch.device, dtype: torch.dtype) -> None:
    expected = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    for pattern, kept in model._get_dtype_plan(dtype).items():  # what a model computes in fp32, whatever the rest
        expected |= {name: kept for name in expected.keys() - _packed_names(model) if re.search(pattern, name)}
    for file, specs in held.contents.items():
        for name in [name for name in specs if name in expected]:
            tensor = held.read(file, name)
            if not finite(tensor):
                raise InputError(f"{file}: {held.called.get(name, name)} holds NaN or Inf; finite values are accepted")
            parent, _, leaf = name.rpartition(".")
            owner = model.get_submodule(parent)
            tensor = tensor.to(device, expected[name], copy=True)  # else it would stay mapped from the file
            setattr(owner, leaf, nn.Parameter(tensor, False) if leaf in owner._parameters else tensor)


def finite(tensor: Tensor) -> bool:
    """Whether a tensor of any dtype holds neither NaN nor Inf; looks at a part at a time, to take no memory for it."""
    return not tensor.is_floating_point() or all(
        bool(part.isfinite().all()) for part in tensor.reshape(-1).split(2**24)
    )


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
    layers = _packed_layers(model)
    if not layers:
        raise InputError(f"{type(model).__name__} has no packed layer; accepted: a model that is quantized")
    dtypes = {name: layer.dtype for name, layer in layers.items()}
    recipe = layout_of(layout).of(arguments or _arguments(model, layers), dtypes, model)
    empty, tensors = skeleton(model.config, model.dtype), model.state_dict()
    pack(empty, recipe.layers(empty))
    match(empty, {name: Spec.of(tensor) for name, tensor in tensors.items()}, folder)
    for name, layer in layers.items():
        levels = recipe.format.empty(torch.Size([0]), layer.dtype, layer.codes.device).levels
        if not layer.own_levels and layer.levels is not None and not torch.equal(layer.levels, levels):
            raise InputError(f"{name} has other levels than {recipe.format!r}; accepted: the arguments of its format")
        for part in layer.state_dict():
            del tensors[f"{name}.{part}"]
        tensors |= recipe.tensors(name, layer)
    folder.mkdir(parents=True, exist_ok=True)
    if held := sorted(file.name for file in folder.iterdir()):
        raise InputError(f"{folder} holds {', '.join(held[:3])}; accepted: a new or empty folder")
    if tokenizer:
        tokenizer.save_pretrained(folder)
    with _told(model, recipe):
        model.save_pretrained(folder, state_dict=tensors)


@contextmanager
def _told(model: PreTrainedModel, recipe: Recipe) -> Iterator[None]:
    """While inside, the config of a model tells the recipe, and no quantizer has a say in what is saved."""
    before = {"quantizer": getattr(model, "hf_quantizer", None), KEY: getattr(model.config, KEY, None)}
    model.hf_quantizer, model.config.quantization_config = None, recipe.plain()
    try:
        yield
    finally:
        model.hf_quantizer, model.config.quantization_config = before["quantizer"], before[KEY]
        if before[KEY] is None:
            del model.config.quantization_config


def layout_of(name: str) -> type[Recipe]:
    """Raises InputError where there is none of that name."""
    if name not in LAYOUTS:
        raise InputError(f"layout: {name!r} is unknown; accepted: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _arguments(model: PreTrainedModel, layers: dict[str, QuantLinear]) -> dict:
    if recipe := getattr(getattr(model.config, KEY, None), "recipe", None):
        return recipe.arguments
    layer = next(iter(layers.values()))
    return {"name": layer.format, "block": layer.block, "dq": layer.dq}


def finish(folder: Path, config: dict, recipe: Recipe, contents: Contents) -> None:
    """Write what makes the files of tensors a checkpoint; the index last: where it is, the checkpoint is whole."""
    for name, content in ((CONFIG, config | {KEY: recipe.plain()}), (shards.INDEX, shards.index(contents))):
        with files.replaced(folder / name) as file:
            file.write(json.dumps(content, indent=2).encode() + b"\n")
