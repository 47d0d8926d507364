"""16-bit checkpoints: opened, checked without reading the weights, and loaded as a model.

`from_pretrained` fills in random numbers for tensors that a checkpoint lacks. So `open` first loads a checkpoint without
its weights: transformers does everything else, with tensors on the meta device in the shapes from the headers. It reports
tensors that are missing, left over, or of another shape, and these are errors.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from qbench.errors import InputError
from qbench.model.replacement import disable_weight_edits
from qbench.system.messages import OURS

from . import auto_classes, empty_model, location, safetensors_io, tensor_names
from .recipe import KEY, read_config
from .safetensors_io import Contents, TensorSpec

GENERATION_CONFIG = "generation_config.json"
#: patterns of the prefixes that wrappers add to tensor names, and the wrapper of each
WRAPPERS = {
    r"_orig_mod\.": "torch.compile",
    r"_fsdp_wrapped_module\.": "FullyShardedDataParallel",
    r"^module\.": "DistributedDataParallel",
    r"^base_model\.model\.": "PEFT",
    r"base_layer\.": "PEFT",
}
_SPARE_BYTES = 2**30  # for the buffers of a model, in addition to twice the size of its checkpoint


@contextmanager
def reading_model(subject: object) -> Iterator[None]:
    """Turn any error but a lack of memory into an InputError that names the subject, such as the path of a model."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{subject} needs code of its own, which is not run; accepted: {auto_classes.TRUST}"
            ) from error
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{subject} could not be loaded: {first_line}") from error


@dataclass(frozen=True)
class SixteenBitCheckpoint:
    """A checkpoint that is not quantized. Its config and its files have been checked; its weights are not read yet.

    path: as the user gave it, None for the bundled model. config_json: its config.json. contents: its files. model: on
    the meta device. key_mapping: the patterns of WRAPPERS that are removed from names of tensors, each mapped to "".
    commit: of a hub id.
    """

    path: str | None
    folder: Path
    config_json: dict
    config: PreTrainedConfig
    contents: Contents
    model: PreTrainedModel
    key_mapping: dict[str, str]
    revision: str | None
    commit: str | None
    trust: bool

    @property
    def wrappers(self) -> list[str]:
        """The wrappers whose prefixes are in the names of the tensors."""
        return sorted({WRAPPERS[pattern] for pattern in self.key_mapping})

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the checkpoint. Raises InputError."""
        with reading_model(f"model.path: the tokenizer of {self.path!r}"):
            return auto_classes.load_tokenizer(self.folder, self.trust)

    def load(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The model in `dtype`, in eval mode, frozen. Raises InputError naming a weight that holds NaN or Inf."""
        subject = f"model.path: {self.path!r}"
        with reading_model(subject):
            tensors = {name: tensor for file in self.contents for name, tensor in safetensors_io.map_tensors(file)}
            model = _load_tensors(type(self.model), self.config, tensors, self.key_mapping, subject, dtype=dtype)
            if (self.folder / GENERATION_CONFIG).is_file():
                model.generation_config = GenerationConfig.from_pretrained(self.folder, local_files_only=True)
        model.config.name_or_path = vars(model)["name_or_path"] = str(self.folder if self.path is None else self.path)
        for name, tensor in model.named_parameters():
            if not empty_model.is_finite(tensor):
                raise InputError(f"model.path: {name} of {self.path!r} holds NaN or Inf; finite weights are accepted")
        disable_weight_edits(model)
        model.to(device)  # type: ignore[arg-type]  # a wrapper hides its arguments
        return model.eval().requires_grad_(False)


def open(path: str | None, revision: str | None = None, trust: bool = False) -> SixteenBitCheckpoint:
    """Open and check a checkpoint that is not quantized: a folder, a hub id, or None for the bundled model.

    trust: run the code that comes with it. Raises InputError, in one line, if the checkpoint is incomplete, quantized or
    not a causal LM, or if its tensors do not match its config.
    """
    folder, subject = location.locate(path, revision, code=trust), f"model.path: {path!r}"
    config_json = read_config(folder)
    if method := config_json.get(KEY):
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise InputError(f"{subject} is quantized already, by {method}; accepted: a 16-bit checkpoint")
    contents = safetensors_io.read_contents(folder, pickles=True)
    specs = safetensors_io.merge_specs(contents)
    with reading_model(subject):
        weights = sum(spec.shape.numel() for spec in specs.values())
        config = auto_classes.load_config(folder, len(specs), weights, trust)
        empty = empty_model.build_empty(config, torch.bfloat16, buffers=False, trust=trust)
        key_mapping = _find_wrappers(specs, empty)
        for _ in tensor_names.iterate_names(empty, contents, key_mapping):
            pass  # raises if two tensors have the same name in the model
        _check_buffers(empty, specs, subject)
        tensors = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
        meta = {"dtype": torch.bfloat16, "device_map": {"": "meta"}}
        model = _load_tensors(type(empty), config, tensors, key_mapping, subject, **meta)
    commit = location.find_commit(path, revision)
    checkpoint = SixteenBitCheckpoint(
        path, folder, config_json, config, contents, model, key_mapping, revision, commit, trust
    )
    if key_mapping:
        wrappers = " and ".join(checkpoint.wrappers)
        message = f"the names of its tensors have prefixes of {wrappers}, which are removed"
        warnings.warn(f"{OURS}{subject}: {message}", UserWarning, stacklevel=2)
    return checkpoint


def _find_wrappers(specs: dict[str, TensorSpec], model: PreTrainedModel) -> dict[str, str]:
    """The patterns of WRAPPERS that match names of tensors but no name in the model, each mapped to ""."""
    own = list(model.state_dict())

    def matches(pattern: str, names: list[str]) -> bool:
        return any(re.search(pattern, name) for name in names)

    return {pattern: "" for pattern in WRAPPERS if matches(pattern, list(specs)) and not matches(pattern, own)}


def _check_buffers(model: PreTrainedModel, specs: dict[str, TensorSpec], subject: str) -> None:
    """Raises InputError if a config makes a model compute buffers that are much larger than its weights."""
    most = 2 * sum(spec.nbytes for spec in specs.values()) + _SPARE_BYTES
    if (needed := sum(buffer.nbytes for buffer in model.buffers())) > most:
        raise InputError(f"{subject}: its config asks for tables of {needed} bytes; accepted: up to {most}")


def _load_tensors(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: dict[str, Tensor],
    key_mapping: dict[str, str],
    subject: str,
    **options: Any,
) -> PreTrainedModel:
    """A model with exactly these tensors. Raises InputError if some are missing, left over, or of another shape."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # it would log problems, which are raised below
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = cls.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            key_mapping=key_mapping or None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported in `info`, instead of an error of many lines
            **options,
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    model, info = loaded
    shapes = [f"{name} is {list(given)}, not {list(due)}" for name, given, due in sorted(info["mismatched_keys"])]
    problems = [
        _summarize("missing", sorted(info["missing_keys"])),
        _summarize("left over", sorted(info["unexpected_keys"])),
        _summarize("", shapes),
        *info.get("error_msgs", ()),
    ]
    if problems := [*filter(None, problems)]:
        raise InputError(f"{subject}: its tensors are not those of a {cls.__name__}: {'; '.join(problems)}")
    return model


def _summarize(kind: str, names: list[str]) -> str:
    """The first of the names and how many more there are; empty if there is none."""
    if not names:
        return ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{kind} {names[0]}{more}".strip()
