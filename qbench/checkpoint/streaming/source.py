"""The 16-bit checkpoint that is read: its files, its tensors, and what the model calls them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qbench.checkpoint import empty_model, loading, location, safetensors_io, tensor_names
from qbench.checkpoint.safetensors_io import Contents
from qbench.errors import InputError
from qbench.model.selection import Coverage, coverage


@dataclass(frozen=True)
class Source:
    """folder, contents: the files. names: what the model calls a tensor of a file. layers: those to quantize, without
    their weights, by the name of the weight in the files; the weight of layer L is named L.weight in the model. coverage:
    what is quantized, and what is not."""

    folder: Path
    config: dict
    contents: Contents
    names: dict[str, str]
    layers: dict[str, nn.Module]
    coverage: Coverage

    def layer_name(self, tensor: str) -> str:
        return self.names[tensor].removesuffix(".weight")

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Of the weights to quantize, by layer."""
        specs = safetensors_io.merged(self.contents)
        return {self.layer_name(tensor): specs[tensor].dtype for tensor in self.layers}


def read(path: str | None) -> Source:
    """What is to be quantized, from config and headers alone: every linear layer but those of its head, as in a run.

    Raises InputError, naming file or tensor, for a checkpoint that is not whole, not in 16 bit, or whose tensors are not
    the model's one by one.
    """
    if path is not None and not Path(path).expanduser().exists() and location.is_hub_id(path):
        raise InputError(f"model.path: {path!r} is a hub id; accepted: a folder that it was downloaded to")
    found = loading.open(path)
    contents = safetensors_io.contents(found.folder)
    called, specs = tensor_names.named(found.model, contents, found.undone)
    empty_model.match(found.model, specs, found.folder)
    layers = {
        f"{name}.weight": layer for name, layer in empty_model.layers_of(found.model, found.folder, specs).items()
    }
    by_tensor = {tensor: layers[name] for tensor, name in called.items() if name in layers}
    return Source(found.folder, found.plain, contents, called, by_tensor, coverage(found.model))
