"""Safe calls of transformers' Auto classes: they neither run nor fetch code that a checkpoint names.

All of qbench loads configs, tokenizers and packed models through this module. `load_config` and `load_tokenizer` run the
code in the folder only if the user sets `trust_remote_code`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from qbench.errors import InputError

from .recipe import read_config

TRUST = "model.trust_remote_code=true"
ADAPTER = "adapter_config.json"
MOST_LAYERS = 10_000  #: accepted if the number of tensors is unknown
_MOST_NAMED = 10**6  # labels or codebooks: transformers creates an object for each
_FEW_LAYERS, _FEW_WEIGHTS = 256, 2**20  # always accepted: configs of small models keep larger defaults
_LAYER_KEY = re.compile(r"n_layer|block_count|.*layers|.*_blocks|.*depth|.*experts")
_NOT_A_SIZE_KEY = re.compile(
    r".*(position|length|window|token|context|_id|seed|dtype|theta|max_|chunk|scale|version).*"
)


def load_config(folder: Path, tensors: int | None = None, weights: int | None = None, trust: bool = False) -> Any:
    """The config of a folder, or of a path to a config.json.

    tensors, weights: how many the checkpoint holds. A config that asks for more layers than tensors, or for sizes beyond
    the number of weights, is refused: building that model could take forever. Raises InputError, or an error of
    transformers.
    """
    check_sizes(read_config(folder), folder, tensors, weights)
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)


def check_sizes(config: dict, where: object, tensors: int | None = None, weights: int | None = None) -> None:
    """Raises InputError if a config does not fit this number of tensors and weights, or names code to fetch."""
    layers = MOST_LAYERS if tensors is None else max(tensors, _FEW_LAYERS)
    sizes = None if weights is None else max(weights, _FEW_WEIGHTS)
    for key, value in _iterate_values(config):
        if "implementation" in key and isinstance(value, str) and "/" in value:
            raise InputError(f"{where}: {key}: {value!r} would fetch code; accepted: eager, sdpa, and such names")
        if isinstance(value, bool) or not isinstance(value, int) or _NOT_A_SIZE_KEY.fullmatch(key):
            continue
        if _LAYER_KEY.fullmatch(key) and value > layers:
            raise InputError(f"{where}: {key}: {value} is not accepted; for {tensors} tensors up to {layers} is")
        if sizes is not None and value > sizes:
            raise InputError(f"{where}: {key}: {value} is not accepted; for {weights} weights up to {sizes} is")
        if key.startswith("num_") and key.endswith(("labels", "codebooks")) and value > _MOST_NAMED:
            raise InputError(f"{where}: {key}: {value} is not accepted; up to {_MOST_NAMED} is")


def _iterate_values(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yields each value of a config that is neither list nor dict, with its innermost key."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _iterate_values(item, key if "implementation" in key else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _iterate_values(item, key)
    else:
        yield key, value


def load_packed_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The packed model in a folder. Raises InputError if it also holds adapters: transformers would add them."""
    if (folder / ADAPTER).is_file():
        raise InputError(
            f"{folder} holds {ADAPTER} too; accepted: the model alone, and `qbench.training.adapters.load` for adapters"
        )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )


def load_tokenizer(folder: Path, trust: bool = False, **gguf: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder. gguf: `gguf_file`, the GGUF file in the folder that holds it, if any."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust, **gguf)


def load_gguf_config(file: Path) -> PreTrainedConfig:
    """The config that transformers reads from the metadata of a GGUF file."""
    return AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False)
