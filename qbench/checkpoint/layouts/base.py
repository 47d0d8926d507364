"""What a packed checkpoint is to its reader: a tokenizer, and in the layout of others a config, and tensors as the model
calls them."""

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
class Held:
    """layers: of each packed layer, by name, the format and the dtype that its weight had. contents: by file, the tensors
    under their names in the model, where the layers are QuantLinears. read: gives one of them. called: their names in the
    file, where they are others."""

    layers: dict[str, tuple[Format, torch.dtype]]
    contents: Contents
    read: Callable[[Path, str], Tensor] = safetensors_io.read
    called: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Packed(ABC):
    path: Path

    @abstractmethod
    def __str__(self) -> str:
        """How it is packed, in a few words."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return auto_classes.tokenizer(self.path)

    def config(self) -> PreTrainedConfig:
        """Raises InputError where it asks for a model that is out of proportion to what is there."""
        specs = safetensors_io.merged(safetensors_io.contents(self.path))
        return auto_classes.config(
            self.path, len(specs), 8 * sum(spec.nbytes for spec in specs.values())
        )  # of a bit each


class Foreign(Packed):
    """One in the layout of others. recipe: tells how a model that was read from it is saved."""

    recipe: ClassVar[type[Recipe]] = Recipe

    @abstractmethod
    def hold(self, model: PreTrainedModel) -> Held:
        """What is there for `model`, which has no weights yet and no packed layer. Raises InputError."""
