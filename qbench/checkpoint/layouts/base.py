"""The interface of a packed checkpoint: a config and a tokenizer.

A checkpoint in the layout of another library also gives its tensors under their names in the model.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from formats import Format
from qbench.checkpoint import auto_classes, safetensors_io
from qbench.checkpoint.recipe import Recipe
from qbench.checkpoint.safetensors_io import Contents


@dataclass(frozen=True)
class ForeignTensors:
    """The tensors of a checkpoint in the layout of another library, as those of a model with QuantLinears.

    layers: the format of each packed layer, by name, and the dtype that its weight had. contents: the tensors of each
    file, under their names in the model. read: reads one, by file and name. names_in_file: their names in
    the file, where these differ.
    """

    layers: dict[str, tuple[Format, torch.dtype]]
    contents: Contents
    read: Callable[[Path, str], Tensor] = safetensors_io.read
    names_in_file: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PackedCheckpoint(ABC):
    """A packed checkpoint. path: its folder or file."""

    path: Path

    @abstractmethod
    def __str__(self) -> str:
        """How it is packed, in a few words."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return auto_classes.load_tokenizer(self.path)

    def config(self) -> PreTrainedConfig:
        """The config of the model. Raises InputError if it asks for a model that is much larger than the checkpoint."""
        specs = safetensors_io.merge_specs(safetensors_io.read_contents(self.path))
        most_weights = 8 * sum(spec.nbytes for spec in specs.values())  # at one bit each
        return auto_classes.load_config(self.path, len(specs), most_weights)


class ForeignCheckpoint(PackedCheckpoint):
    """A checkpoint in the layout of another library. recipe: the layout in which a model loaded from it is saved."""

    recipe: ClassVar[type[Recipe]] = Recipe

    @abstractmethod
    def map_tensors(self, model: PreTrainedModel) -> ForeignTensors:
        """The tensors for `model`, which has neither weights nor packed layers yet. Raises InputError."""
