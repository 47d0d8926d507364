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

from .. import auto, shards
from ..recipe import Recipe
from ..shards import Contents


@dataclass(frozen=True)
class Held:
    """layers: of each packed layer, by name, the format and the dtype that its weight had. contents: by file, the tensors
    under their names in the model, where the layers are QuantLinears. read: gives one of them. called: their names in the
    file, where they are others."""

    layers: dict[str, tuple[Format, torch.dtype]]
    contents: Contents
    read: Callable[[Path, str], Tensor] = shards.read
    called: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Packed(ABC):
    path: Path

    @abstractmethod
    def __str__(self) -> str:
        """How it is packed, in a few words."""

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return auto.tokenizer(self.path)

    def config(self) -> PreTrainedConfig:
        """Raises InputError where it asks for a model that is out of proportion to what is there."""
        specs = shards.merged(shards.contents(self.path))
        return auto.config(self.path, len(specs), 8 * sum(spec.nbytes for spec in specs.values()))  # of a bit each


class Foreign(Packed):
    """One in the layout of others. recipe: tells how a model that was read from it is saved."""

    recipe: ClassVar[type[Recipe]] = Recipe

    @abstractmethod
    def hold(self, model: PreTrainedModel) -> Held:
        """What is there for `model`, which has no weights yet and no packed layer. Raises InputError."""
