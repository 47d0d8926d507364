"""The recipe of a packed checkpoint: its format, and the dtypes that the weights had. It is stored in config.json.

`transformers_plugin` imports this module while transformers is half imported. So functions here import models where they
need them.
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
from qbench.model.devices import dtype_name
from qbench.results import json_files

from . import safetensors_io

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qbench.model.quant_linear import QuantLinear
    from qbench.model.selection import Coverage

METHOD, VERSION = "qbench", 1
CONFIG, KEY = "config.json", "quantization_config"
CARD = "README.md"
_MAX_CONFIG_BYTES = 2**24
_CARD = """---
library_name: transformers
tags: [qbench]
---

Linear layers of this model are packed: {format}, {source}.{share} config.json lists, under quantization_config,
which layers stay in 16 bit and why. The licence is that of the original model.

```python
{imports}from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this folder")
```
"""


@dataclass(frozen=True)
class Recipe:
    """How a model is packed, in this project's layout; subclasses describe other layouts.

    arguments: those of `formats.get`: name, block, dq, and options of the format. dtype: of the weights before packing;
    None until the weights are read. other_dtypes: layers with a different dtype. coverage: the `Coverage`, as JSON, for
    people who read the file. Raises InputError if there is no such format.
    """

    _imports: ClassVar[str] = (
        "import qbench  # first: without it transformers warns, and gives packed layers random weights\n"
    )

    arguments: dict
    dtype: torch.dtype | None
    other_dtypes: dict[str, torch.dtype]
    coverage: dict | None = None

    def __post_init__(self) -> None:
        try:
            self.format  # noqa: B018  raises if the arguments give no format
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
        """The recipe for these layers.

        dtypes: of the weight of each layer, by name; empty until the weights are read. model: the packed model, if it
        exists yet. Raises InputError for a format or dtype that the layout cannot store.
        """
        usual = Counter(dtypes.values()).most_common(1)[0][0] if dtypes else None
        other_dtypes = {layer: dtype for layer, dtype in dtypes.items() if dtype != usual}
        return cls(arguments, usual, other_dtypes, coverage.to_json() if coverage else None)

    @cached_property
    def format(self) -> Format:
        return formats.get(**self.arguments)

    def dtype_of(self, layer: str) -> torch.dtype:
        """The dtype that the weight of a layer had."""
        dtype = self.other_dtypes.get(layer, self.dtype)
        assert dtype, "the weights have not been read"
        return dtype

    def layers(self, model: "PreTrainedModel") -> dict[str, tuple[Format, torch.dtype]]:
        """The format of each packed layer of a model, by name, and the dtype that its weight had."""
        from qbench.model.selection import linear_layers

        return {name: (self.format, self.dtype_of(name)) for name in linear_layers(model)}

    def tensors_of(self, name: str, layer: "QuantLinear", fixed: bool = False) -> dict[str, Tensor]:
        """The tensors that are stored for a packed layer, by name in the file.

        fixed: give each a size that does not depend on the values, so that a file can be planned before they are known.
        """
        return layer.stored_tensors(f"{name}.")

    def to_json(self) -> dict:
        """The recipe in the form of config.json."""
        options = {key: value for key, value in self.arguments.items() if key not in ("name", "block", "dq")}
        return {
            "quant_method": METHOD,
            "version": VERSION,
            "format": self.arguments["name"],
            "block": self.arguments["block"],
            "dq": self.arguments["dq"],
            "options": options,
            "dtype": None if self.dtype is None else dtype_name(self.dtype),
            "dtypes": {layer: dtype_name(dtype) for layer, dtype in self.other_dtypes.items()},
            **({"coverage": self.coverage} if self.coverage else {}),
        }

    def model_card(self) -> str:
        """The README.md of a packed folder: how it is packed, and how to load it."""
        quantized = 100 * self.coverage["quantized"] / self.coverage["eligible"] if self.coverage else None
        share = f" {quantized:.1f}% of the weights that could be quantized are." if quantized else ""
        return _CARD.format(format=repr(self.format), source=self.format.source, share=share, imports=self._imports)

    @classmethod
    def from_json(cls, content: dict) -> "Recipe":
        """The recipe in a config.json. Raises InputError if it is not valid."""
        if content.get("version") != VERSION:
            raise InputError(f"{KEY}: version {content.get('version')!r} is unknown; accepted: {VERSION}")
        for key, kind in (("format", str), ("block", int), ("dq", bool), ("options", dict), ("dtypes", dict)):
            if not isinstance(content.get(key), kind):
                raise InputError(f"{KEY}: {key}: {content.get(key)!r} is not accepted; {kind.__name__} is")
        known = {dtype_name(dtype): dtype for dtype in safetensors_io.CODES if dtype.is_floating_point}
        for name in (content.get("dtype"), *content["dtypes"].values()):
            if not isinstance(name, str) or name not in known:
                raise InputError(f"{KEY}: dtype: {name!r} is unknown; accepted: {', '.join(known)}")
        arguments = {**content["options"], "name": content["format"], "block": content["block"], "dq": content["dq"]}
        module = content["format"].rpartition(".")[0]
        if module and module not in sys.modules:  # a checkpoint may name code, but not run it
            raise InputError(f"{KEY}: format: {content['format']} is code of yours; accepted once {module} is imported")
        other_dtypes = {layer: known[name] for layer, name in content["dtypes"].items()}
        return cls(arguments, known[content["dtype"]], other_dtypes, content.get("coverage"))


def read_config(folder: Path) -> dict:
    """The content of a config.json. folder: the folder or the file. Raises InputError if there is none."""
    file = folder if folder.is_file() else folder / CONFIG
    try:
        if (size := file.stat().st_size) > _MAX_CONFIG_BYTES:
            raise InputError(f"{file} has {size} bytes; accepted: up to {_MAX_CONFIG_BYTES}")
        config = json_files.read_json(file)
    except FileNotFoundError:
        raise InputError(f"{folder} holds no {CONFIG}") from None
    if not isinstance(config, dict):
        raise InputError(f"{file} is no configuration of a model")
    return config


def is_qbench(content: object) -> TypeGuard[dict]:
    """Whether the quantization_config of a model is a recipe, of any version."""
    return isinstance(content, dict) and content.get("quant_method") == METHOD


def find_recipe(folder: Path) -> Recipe | None:
    """The recipe of the checkpoint in a folder; None if it has none. Raises InputError if the recipe is not valid."""
    content = read_config(folder).get(KEY)
    if not is_qbench(content):
        return None
    try:
        return Recipe.from_json(content)
    except InputError as error:
        raise InputError(f"{folder / CONFIG}: {error}") from error
