"""The 16-bit checkpoint to be packed: its files, its tensors, and the layers that they belong to."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from qbench.checkpoint import empty_model, loading, location, safetensors_io, tensor_names
from qbench.checkpoint.safetensors_io import Contents
from qbench.errors import InputError
from qbench.model.selection import Coverage, count_coverage


@dataclass(frozen=True)
class Source:
    """A checkpoint to be packed.

    config: its config.json. contents: its files. names: names in the model, by those in the files. layers: the layers to
    quantize, without their weights, by the name of the weight in the files. coverage: which weights are quantized.

    In the model, the weight of layer L is named L.weight.
    """

    folder: Path
    config: dict
    contents: Contents
    names: dict[str, str]
    layers: dict[str, nn.Module]
    coverage: Coverage

    def layer_name(self, tensor: str) -> str:
        """The name in the model of the layer whose weight has this name in the files."""
        return self.names[tensor].removesuffix(".weight")

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtypes of the weights to quantize, by layer."""
        specs = safetensors_io.merge_specs(self.contents)
        return {self.layer_name(tensor): specs[tensor].dtype for tensor in self.layers}


def read_source(path: str | None) -> Source:
    """Open a checkpoint to be packed. Only config and headers are read. As in a run, heads are not packed.

    Raises InputError, naming file or tensor, if the checkpoint is incomplete, not in 16 bit, or has tensors that do not
    match the model's one to one.
    """
    if path is not None and location.is_hub_id(path):
        raise InputError(f"model.path: {path!r} is a hub id; accepted: a folder that it was downloaded to")
    checkpoint = loading.open(path)
    folder, model = checkpoint.folder, checkpoint.model
    contents = safetensors_io.read_contents(folder)
    names, specs = tensor_names.match_names(model, contents, checkpoint.key_mapping)
    empty_model.check_tensors(model, specs, folder)
    by_weight = {
        f"{name}.weight": layer for name, layer in empty_model.layers_to_quantize(model, folder, specs).items()
    }
    layers = {tensor: by_weight[name] for tensor, name in names.items() if name in by_weight}
    return Source(folder, checkpoint.config_json, contents, names, layers, count_coverage(model))
