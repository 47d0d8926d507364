"""transformers' Auto classes, which run no code that a checkpoint brings along, and fetch none that it names.

All else of qbench reads config, tokenizer and packed model of a folder through these. With `trust_remote_code`, which is
the user's word, `config` and `tokenizer` run the code that lies in the folder.
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

from .recipe import plain_config

TRUST = "model.trust_remote_code=true"
ADAPTER = "adapter_config.json"
MOST_LAYERS = 10_000  #: of a model of whose tensors nothing is known
_MOST_NAMED = 10**6  # labels, codebooks and the like, each of which transformers makes an object of
_FEW_LAYERS, _FEW_WEIGHTS = 256, 2**20  # which any config may ask for: defaults that a small model has no use for
_OF_LAYERS = re.compile(r"n_layer|block_count|.*layers|.*_blocks|.*depth|.*experts")
_NO_SIZE = re.compile(r".*(position|length|window|token|context|_id|seed|dtype|theta|max_|chunk|scale|version).*")


def config(folder: Path, tensors: int | None = None, weights: int | None = None, trust: bool = False) -> Any:
    """The configuration of the model in a folder, or of a file that is one.

    tensors, weights: how many its files hold. A config.json may ask for more layers than there are tensors, or sizes
    beyond all weights: that is refused here, as to build such a model could take for ever. Raises InputError, and what
    transformers raises.
    """
    check_sizes(plain_config(folder), folder, tensors, weights)
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust)


def check_sizes(plain: dict, where: object, tensors: int | None = None, weights: int | None = None) -> None:
    """Raises InputError where a configuration cannot be that of a model of so many tensors and weights, or names code to
    be fetched."""
    layers = MOST_LAYERS if tensors is None else max(tensors, _FEW_LAYERS)
    sizes = None if weights is None else max(weights, _FEW_WEIGHTS)
    for key, value in _leaves(plain):
        if "implementation" in key and isinstance(value, str) and "/" in value:
            raise InputError(f"{where}: {key}: {value!r} would fetch code; accepted: eager, sdpa, and such names")
        if isinstance(value, bool) or not isinstance(value, int) or _NO_SIZE.fullmatch(key):
            continue
        if _OF_LAYERS.fullmatch(key) and value > layers:
            raise InputError(f"{where}: {key}: {value} is not accepted; for {tensors} tensors up to {layers} is")
        if sizes is not None and value > sizes:
            raise InputError(f"{where}: {key}: {value} is not accepted; for {weights} weights up to {sizes} is")
        if key.startswith("num_") and key.endswith(("labels", "codebooks")) and value > _MOST_NAMED:
            raise InputError(f"{where}: {key}: {value} is not accepted; up to {_MOST_NAMED} is")


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Each value of a configuration that is neither a list nor a dict, under the key nearest to it."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, key if "implementation" in key else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, key)
    else:
        yield key, value


def packed_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The packed model in a folder, as `pretrained` has transformers load it. Raises InputError where adapters lie beside
    it, which transformers would put on it."""
    if (folder / ADAPTER).is_file():
        raise InputError(
            f"{folder} holds {ADAPTER} too; accepted: the model alone, and `qbench.training.adapters.load` for adapters"
        )
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )


def tokenizer(folder: Path, trust: bool = False, **gguf: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; gguf: `gguf_file` for one in a GGUF file there."""
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust, **gguf)


def gguf_config(file: Path) -> PreTrainedConfig:
    """What transformers makes of the metadata of a GGUF file."""
    return AutoConfig.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True, trust_remote_code=False)
