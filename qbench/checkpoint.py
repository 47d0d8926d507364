"""Packed checkpoints: a folder with a model whose linear layers are in a format.

This project's layout:

    config.json                        the model's own, and the `Recipe` under "quantization_config"
    model-0000k-of-0000n.safetensors   the tensors under their names in the model. Of a packed layer those of its
                                       `QuantLinear`: codes; scale, with dq scale_absmax and scale_offset; where blocks are
                                       shifted the same of shift; levels where each weight has a table of its own; the
                                       bias. All else is as it was
    model.safetensors.index.json       which tensor is in which file; written last: where it is, the checkpoint is whole
    and the files of the tokenizer and of generation

The layouts of others are in `interop`. Whatever the layout, `load` puts the packed tensors straight in their places, so
that none of these weights is ever in 16 bit.
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

from formats import Format

from . import files, shards
from .errors import InputError
from .interop import bitsandbytes, gguf
from .interop.packed import Held, Packed
from .layers import QuantLinear, replace, weight_of
from .recipe import CONFIG, KEY, Recipe, is_one, word
from .recipe import find as find_recipe
from .shards import Contents, Spec

GENERATION = "generation_config.json"
LAYOUTS = {"qbench": Recipe, "bitsandbytes": bitsandbytes.Recipe}  #: those that can be written
SHARD = 4 * 10**9  #: bytes that a file of a model saved from memory has, if no single tensor has more
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
    """The causal LM of a config without its weights: parameters are on the meta device, buffers real, as computed."""
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=False)
    for module in model.modules():
        module._is_hf_initialized = False
    model.initialize_weights()  # the buffers once more: some are computed in the default dtype, here not `dtype`
    return model


def pack(model: PreTrainedModel, layers: dict[str, tuple[Format, torch.dtype]]) -> PreTrainedModel:
    """Put an empty QuantLinear in the place of each of these layers: `state_dict` then tells what a checkpoint holds."""
    shapes = {name: weight_of(model.get_submodule(name)).shape for name in layers}
    replace(model, {name: fmt.empty(shapes[name], dtype) for name, (fmt, dtype) in layers.items()})
    return model


def packed_names(model: nn.Module) -> set[str]:
    """The names of the tensors that the packed weights of a model are."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    return {f"{name}.{key}" for name, layer in layers.items() for key in layer.state_dict() if key != "bias"}


def match(
    model: PreTrainedModel, found: dict[str, Spec], where: Path, called: dict[str, str] | None = None
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


class Folder(Packed):
    """One in this project's layout."""

    @property
    def recipe(self) -> Recipe:
        return find_recipe(self.path)

    def __str__(self) -> str:
        return repr(self.recipe.format)

    def hold(self, model: PreTrainedModel) -> Held:
        return Held(self.recipe.layers(model), shards.contents(self.path))


def find(path: Path) -> Packed | None:
    """The packed checkpoint at a path, None where there is none. Raises InputError for a config that is none."""
    if gguf.is_one(path):
        return gguf.File(path)
    if find_recipe(path):
        return Folder(path)
    return bitsandbytes.Folder(path) if bitsandbytes.find(path) else None


def load(path: Path, device: torch.device, dtype: torch.dtype, tokenizer: Path | None = None) -> LoadedModel:
    """Load a packed checkpoint and its tokenizer; what is not packed is cast to `dtype`.

    path: a folder that `qbench.quantize` or `save` wrote, or transformers with bitsandbytes in 4 bits; or a GGUF file.
    tokenizer: the folder of one, for a checkpoint that brings none. Raises InputError, naming file and tensor, for a
    checkpoint that is not what its config says.
    """
    found = find(path)
    if found is None:
        raise InputError(f"{path} is not packed; accepted: what qbench.quantize or bitsandbytes wrote, a GGUF file")
    with reading(path):
        tokens = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True) if tokenizer else found.tokenizer()
        model = skeleton(found.config(), dtype)
        if (path / GENERATION).is_file():
            model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
        held = found.hold(model)
    pack(model, held.layers)
    missing = match(model, shards.merged(held.contents), path, held.called)
    _fill(model, held, device, dtype)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    for name, (fmt, kept) in held.layers.items():
        layer = model.get_submodule(name)
        if not layer.own_levels:
            layer.levels = fmt.empty(torch.Size([0]), kept, device).levels
    model.to(device).eval().requires_grad_(False)
    return LoadedModel(model, tokens)


def _fill(model: PreTrainedModel, held: Held, device: torch.device, dtype: torch.dtype) -> None:
    expected = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    for pattern, kept in model._get_dtype_plan(dtype).items():  # what a model computes in fp32, whatever the rest
        expected |= {name: kept for name in expected.keys() - packed_names(model) if re.search(pattern, name)}
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
    shard: int = SHARD,
    layout: str = "qbench",
) -> None:
    """Write a model whose linear layers are all QuantLinears, of one format.

    folder: a new or empty one. arguments: what `formats.get` takes for that format; without them what the model was loaded
    with, or the name of the format, block and dq. layout: `qbench`, or `bitsandbytes` for `from_pretrained` with that: it
    keeps nf4 and fp4, and leaves linear layers that are not packed as they are. Raises InputError where `load` could not
    read it back.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
    if not layers:
        raise InputError(f"{type(model).__name__} has no packed layer; accepted: a model that is quantized")
    dtypes = {name: layer.dtype for name, layer in layers.items()}
    recipe = layout_of(layout).of(arguments or _arguments(model, layers), dtypes, model)
    tensors = model.state_dict(keep_vars=True)
    for tied, source in model.all_tied_weights_keys.items():
        if tied in tensors and tensors[tied] is tensors.get(source):
            del tensors[tied]
    specs = {name: Spec.of(tensor) for name, tensor in tensors.items()}
    empty = skeleton(model.config, model.dtype)
    match(pack(empty, recipe.layers(empty)), specs, folder)
    for name, layer in layers.items():
        levels = recipe.format.empty(torch.Size([0]), layer.dtype, layer.codes.device).levels
        if not layer.own_levels and layer.levels is not None and not torch.equal(layer.levels, levels):
            raise InputError(f"{name} has other levels than {recipe.format!r}; accepted: the arguments of its format")
    for name, layer in layers.items():
        for part in layer.state_dict():
            del tensors[f"{name}.{part}"]
        tensors |= recipe.tensors(name, layer)
    specs = {name: Spec.of(tensor) for name, tensor in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    if held := sorted(file.name for file in folder.iterdir()):
        raise InputError(f"{folder} holds {', '.join(held[:3])}; accepted: a new or empty folder")
    if tokenizer:
        tokenizer.save_pretrained(folder)
    if model.generation_config:
        model.generation_config.save_pretrained(folder)
    groups = shards.split(specs, shard)
    contents = {folder / shards.name(i, len(groups)): group for i, group in enumerate(groups, 1)}
    for file, group in contents.items():
        shards.write(file, group, ((name, tensors[name]) for name in group))
    config = json.loads(model.config.to_json_string())
    finish(folder, config | {"architectures": [type(model).__name__], "dtype": word(model.dtype)}, recipe, contents)


def layout_of(name: str) -> type[Recipe]:
    """Raises InputError where there is none of that name."""
    if name not in LAYOUTS:
        raise InputError(f"layout: {name!r} is unknown; accepted: {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def _arguments(model: PreTrainedModel, layers: dict[str, QuantLinear]) -> dict:
    plain = getattr(model.config, KEY, None)
    if is_one(plain):
        return Recipe.read(plain).arguments
    layer = next(iter(layers.values()))
    return {"name": layer.format, "block": layer.block, "dq": layer.dq}


def finish(folder: Path, config: dict, recipe: Recipe, contents: Contents) -> None:
    """Write what makes the files of tensors a checkpoint."""
    for name, content in ((CONFIG, config | {KEY: recipe.plain()}), (shards.INDEX, shards.index(contents))):
        with files.replaced(folder / name) as file:
            file.write(json.dumps(content, indent=2).encode() + b"\n")
