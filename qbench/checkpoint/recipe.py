"""How a packed checkpoint is packed, as its config.json tells: the format, and the dtypes that the weights had.

`pretrained` needs this while transformers is half imported, so what needs its models is imported where it is used.
"""

import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TypeGuard

import torch
from torch import Tensor

import formats
from formats import Format
from formats.contract import first_line
from qbench.errors import InputError
from qbench.results import json_files

from . import safetensors_io

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qbench.model.quant_linear import QuantLinear
    from qbench.model.selection import Coverage

METHOD, VERSION = "qbench", 1
CONFIG, KEY = "config.json", "quantization_config"
CARD = "README.md"
_LARGEST = 2**24  # bytes of a config.json
_CARD = """---
library_name: transformers
tags: [qbench]
---

Linear layers of this model are packed: {format}, {source}.{share} What is left, and why, is in config.json, under
quantization_config. Its licence is that of the model from which it was made.

```python
{imports}from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")
```
"""


@dataclass(frozen=True)
class Recipe:
    """arguments: what `formats.get` takes: name, block, dq, and options of the format. dtype: of the weights as they
    were, None before they have been seen; others: of the layers where it was another. coverage: a `layers.Coverage`, for
    who reads the file. Raises InputError for arguments of which there is no format."""

    _imports: ClassVar[str] = (
        "import qbench  # first: without it transformers warns, and gives packed layers random weights\n"
    )

    arguments: dict
    dtype: torch.dtype | None
    others: dict[str, torch.dtype]
    coverage: dict | None = None

    def __post_init__(self) -> None:
        try:
            self.format  # noqa: B018  raises where there is none of these arguments
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{KEY}: {first_line(error)}") from error

    @classmethod
    def of(
        cls,
        arguments: dict,
        dtypes: dict[str, torch.dtype],
        model: "PreTrainedModel | None" = None,
        coverage: "Coverage | None" = None,
    ) -> "Recipe":
        """dtypes: of the weight of each layer, by its name; empty before they have been seen. model: in which these are
        packed, if there is one yet.

        Raises InputError for what the layout cannot keep.
        """
        usual = Counter(dtypes.values()).most_common(1)[0][0] if dtypes else None
        others = {layer: dtype for layer, dtype in dtypes.items() if dtype != usual}
        return cls(arguments, usual, others, coverage.plain() if coverage else None)

    @cached_property
    def format(self) -> Format:
        return formats.get(**self.arguments)

    def dtype_of(self, layer: str) -> torch.dtype:
        dtype = self.others.get(layer, self.dtype)
        assert dtype, "the weights have not been seen"
        return dtype

    def layers(self, model: "PreTrainedModel") -> dict[str, tuple[Format, torch.dtype]]:
        """Of the layers of a model that are packed the format and the dtype that the weight had, by name."""
        from qbench.model.selection import linear_layers

        return {name: (self.format, self.dtype_of(name)) for name in linear_layers(model)}

    def tensors(self, name: str, layer: "QuantLinear", fixed: bool = False) -> dict[str, Tensor]:
        """What is kept of a packed layer, by name in the file. fixed: in sizes that do not depend on the weights."""
        return layer.stored(f"{name}.")

    def plain(self) -> dict:
        """As config.json holds it."""
        options = {key: value for key, value in self.arguments.items() if key not in ("name", "block", "dq")}
        return {
            "quant_method": METHOD,
            "version": VERSION,
            "format": self.arguments["name"],
            "block": self.arguments["block"],
            "dq": self.arguments["dq"],
            "options": options,
            "dtype": None if self.dtype is None else word(self.dtype),
            "dtypes": {layer: word(dtype) for layer, dtype in self.others.items()},
            **({"coverage": self.coverage} if self.coverage else {}),
        }

    def card(self) -> str:
        """The README.md of a folder: how it is packed, and how it is loaded."""
        quantized = 100 * self.coverage["quantized"] / self.coverage["eligible"] if self.coverage else None
        share = f" {quantized:.1f}% of the weights that could be quantized are." if quantized else ""
        return _CARD.format(format=repr(self.format), source=self.format.source, share=share, imports=self._imports)

    @classmethod
    def read(cls, plain: dict) -> "Recipe":
        """Raises InputError."""
        if plain.get("version") != VERSION:
            raise InputError(f"{KEY}: version {plain.get('version')!r} is unknown; accepted: {VERSION}")
        for key, kind in (("format", str), ("block", int), ("dq", bool), ("options", dict), ("dtypes", dict)):
            if not isinstance(plain.get(key), kind):
                raise InputError(f"{KEY}: {key}: {plain.get(key)!r} is not accepted; {kind.__name__} is")
        words = {word(dtype): dtype for dtype in safetensors_io.CODES if dtype.is_floating_point}
        for name in (plain.get("dtype"), *plain["dtypes"].values()):
            if not isinstance(name, str) or name not in words:
                raise InputError(f"{KEY}: dtype: {name!r} is unknown; accepted: {', '.join(words)}")
        arguments = {**plain["options"], "name": plain["format"], "block": plain["block"], "dq": plain["dq"]}
        module = plain["format"].rpartition(".")[0]
        if module and module not in sys.modules:  # a checkpoint may name code, not run it
            raise InputError(f"{KEY}: format: {plain['format']} is code of yours; accepted once {module} is imported")
        others = {layer: words[name] for layer, name in plain["dtypes"].items()}
        return cls(arguments, words[plain["dtype"]], others, plain.get("coverage"))


def word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def plain_config(folder: Path) -> dict:
    """The config.json of a folder, or a file that is one. Raises InputError where there is none."""
    file = folder if folder.is_file() else folder / CONFIG
    try:
        if (size := file.stat().st_size) > _LARGEST:
            raise InputError(f"{file} has {size} bytes; accepted: up to {_LARGEST}")
        config = json_files.read_json(file)
    except FileNotFoundError:
        raise InputError(f"{folder} holds no {CONFIG}") from None
    if not isinstance(config, dict):
        raise InputError(f"{file} is no configuration of a model")
    return config


def is_one(plain: object) -> TypeGuard[dict]:
    """Whether the quantization_config of a model is a recipe, of whatever version."""
    return isinstance(plain, dict) and plain.get("quant_method") == METHOD


def find(folder: Path) -> Recipe | None:
    """How the checkpoint in a folder is packed, None if it is not. Raises InputError for a recipe that is none."""
    plain = plain_config(folder).get(KEY)
    if not is_one(plain):
        return None
    try:
        return Recipe.read(plain)
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from error
