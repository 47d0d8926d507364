"""The 16-bit checkpoint that is read: its files, its tensors, and what the model calls them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from .. import checkpoint, models, names, recipe, shards
from ..errors import InputError
from ..layers import linear_layers
from ..shards import Contents, Spec


@dataclass(frozen=True)
class Source:
    """folder, contents: the files. names: what the model calls a tensor of a file. layers: those to quantize, without
    their weights, by the name of the weight in the files; the weight of layer L is named L.weight in the model."""

    folder: Path
    config: dict
    contents: Contents
    names: dict[str, str]
    layers: dict[str, nn.Module]

    def layer_name(self, tensor: str) -> str:
        return self.names[tensor].removesuffix(".weight")

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Of the weights to quantize, by layer."""
        specs = shards.merged(self.contents)
        return {self.layer_name(tensor): specs[tensor].dtype for tensor in self.layers}


def read(path: str | None) -> Source:
    """What is to be quantized, from config and headers alone: every linear layer but the output head, as in a run.

    Raises InputError, naming file or tensor, for a checkpoint that is not whole, not in 16 bit, or whose tensors are not
    the model's one by one.
    """
    models.refuse_packed(path)
    folder = models.locate(path)
    if not isinstance(folder, Path):
        raise InputError(f"model.path: {path!r} is a hub id; accepted: a folder that it was downloaded to")
    config = recipe.plain_config(folder)
    if method := config.get(recipe.KEY):
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise InputError(f"model.path: {path!r} is quantized already, by {method}; accepted: a 16-bit checkpoint")
    with checkpoint.reading(f"model.path: {path!r}"):
        model = checkpoint.skeleton(AutoConfig.from_pretrained(folder, local_files_only=True), torch.bfloat16)
    contents = shards.contents(folder)
    names, found = _named(model, contents)
    checkpoint.match(model, found, folder)
    layers = {f"{name}.weight": layer for name, layer in linear_layers(model).items()}
    for name in layers:
        if name not in found:
            raise InputError(f"{folder}: {name} is tied to another tensor; accepted: linear layers of their own")
        if not found[name].dtype.is_floating_point:
            raise InputError(f"{folder}: {name} is {recipe.word(found[name].dtype)}; accepted: floating point")
    return Source(folder, config, contents, names, {t: layers[name] for t, name in names.items() if name in layers})


def _named(model: PreTrainedModel, contents: Contents) -> tuple[dict[str, str], dict[str, Spec]]:
    """What the model calls each tensor, and what a header tells of it by that name."""
    rename = names.renaming(model)
    called: dict[str, str] = {}
    found: dict[str, Spec] = {}
    for file, specs in contents.items():
        for tensor, spec in specs.items():
            called[tensor] = rename(tensor, file)
            if called[tensor] in found:
                raise InputError(f"{file}: {tensor} is there a second time, under another name; accepted: one of them")
            found[called[tensor]] = spec
    return called, found
