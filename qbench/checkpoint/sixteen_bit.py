"""A 16-bit checkpoint: opened, it tells all but its weights, and has been found whole; loaded, it is a model.

What `from_pretrained` cannot find in a checkpoint it fills in with random numbers. So a checkpoint is first loaded without
its weights: transformers does all that it would, with tensors on the meta device of the shapes that the headers tell, and
says what is missing, what is left over, and what has another shape.
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
from qbench.model.replacement import hold_still
from qbench.system.messages import OURS

from . import auto_classes, empty_model, location, safetensors_io, tensor_names
from .recipe import KEY, plain_config
from .safetensors_io import Contents, Spec

GENERATION = "generation_config.json"
#: what wrappers put into the names of tensors: the pattern, and who does
WRAPPERS = {
    r"_orig_mod\.": "torch.compile",
    r"_fsdp_wrapped_module\.": "FullyShardedDataParallel",
    r"^module\.": "DistributedDataParallel",
    r"^base_model\.model\.": "PEFT",
    r"base_layer\.": "PEFT",
}
_SPARE = 2**30  # bytes of buffers that a model may compute, beside twice its checkpoint


@contextmanager
def reading(what: object) -> Iterator[None]:
    """Whatever goes wrong in reading a model, but memory, as an InputError that names it."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise InputError(
                f"{what} needs code of its own, which is not run; accepted: {auto_classes.TRUST}"
            ) from error
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"{what} could not be loaded: {first_line}") from error


@dataclass(frozen=True)
class Opened:
    """path: as the user gave it, None the bundled model. plain: its config.json. contents: its files. model: on the meta
    device. undone: of WRAPPERS the patterns that are taken out of the names, each with "" in its place. commit: of a hub
    id."""

    path: str | None
    folder: Path
    plain: dict
    config: PreTrainedConfig
    contents: Contents
    model: PreTrainedModel
    undone: dict[str, str]
    revision: str | None
    commit: str | None
    trust: bool

    @property
    def wrappers(self) -> list[str]:
        """What had put its prefix into the names of the tensors."""
        return sorted({WRAPPERS[pattern] for pattern in self.undone})

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Raises InputError."""
        with reading(f"model.path: the tokenizer of {self.path!r}"):
            return auto_classes.tokenizer(self.folder, self.trust)

    def load(self, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
        """The model in `dtype`, in eval mode, frozen. Raises InputError, naming it, for a weight that is NaN or Inf."""
        what = f"model.path: {self.path!r}"
        with reading(what):
            tensors = {name: tensor for file in self.contents for name, tensor in safetensors_io.mapped(file)}
            model = _loaded(type(self.model), self.config, tensors, self.undone, what, dtype=dtype)
            if (self.folder / GENERATION).is_file():
                model.generation_config = GenerationConfig.from_pretrained(self.folder, local_files_only=True)
        model.config.name_or_path = vars(model)["name_or_path"] = str(self.folder if self.path is None else self.path)
        for name, tensor in model.named_parameters():
            if not empty_model.finite(tensor):
                raise InputError(f"model.path: {name} of {self.path!r} holds NaN or Inf; finite weights are accepted")
        hold_still(model)
        model.to(device)  # type: ignore[arg-type]  # a wrapper hides its arguments
        return model.eval().requires_grad_(False)


def open(path: str | None, revision: str | None = None, trust: bool = False) -> Opened:
    """Open a checkpoint that is not quantized: a folder, a hub id, None for the bundled model.

    trust: run the code that it brings along. Raises InputError, in one line, where it is not whole, is none of a causal
    LM or is quantized already, or where its tensors are not those of its config.
    """
    folder, what = location.locate(path, revision, code=trust), f"model.path: {path!r}"
    plain = plain_config(folder)
    if method := plain.get(KEY):
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise InputError(f"{what} is quantized already, by {method}; accepted: a 16-bit checkpoint")
    contents = safetensors_io.contents(folder, pickles=True)
    specs = safetensors_io.merged(contents)
    with reading(what):
        config = auto_classes.config(folder, len(specs), sum(spec.shape.numel() for spec in specs.values()), trust)
        empty = empty_model.bare(config, torch.bfloat16, buffers=False, trust=trust)
        undone = _wrapped(specs, empty)
        for _ in tensor_names.each(empty, contents, undone):
            pass  # it raises
        _check_buffers(empty, specs, what)
        tensors = {name: torch.empty(spec.shape, dtype=spec.dtype, device="meta") for name, spec in specs.items()}
        model = _loaded(type(empty), config, tensors, undone, what, dtype=torch.bfloat16, device_map={"": "meta"})
    found = Opened(
        path, folder, plain, config, contents, model, undone, revision, location.commit(path, revision), trust
    )
    if undone:
        told = f"the names of its tensors carry what {' and '.join(found.wrappers)} put there, which is taken off"
        warnings.warn(f"{OURS}{what}: {told}", UserWarning, stacklevel=2)
    return found


def _wrapped(specs: dict[str, Spec], model: PreTrainedModel) -> dict[str, str]:
    """What is to be taken out of the names of tensors, none of which the model itself has."""
    own = list(model.state_dict())

    def there(pattern: str, names: list[str]) -> bool:
        return any(re.search(pattern, name) for name in names)

    return {pattern: "" for pattern in WRAPPERS if there(pattern, list(specs)) and not there(pattern, own)}


def _check_buffers(model: PreTrainedModel, specs: dict[str, Spec], what: str) -> None:
    """Raises InputError where a config makes a model compute tables that are out of proportion to its weights."""
    most = 2 * sum(spec.nbytes for spec in specs.values()) + _SPARE
    if (needed := sum(buffer.nbytes for buffer in model.buffers())) > most:
        raise InputError(f"{what}: its config asks for tables of {needed} bytes; accepted: up to {most}")


def _loaded(
    cls: type[PreTrainedModel],
    config: PreTrainedConfig,
    tensors: dict[str, Tensor],
    undone: dict[str, str],
    what: str,
    **options: Any,
) -> PreTrainedModel:
    """A model of these tensors, and of nothing else. Raises InputError."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what it would report is an error here
    transformers_logging.disable_progress_bar()
    try:
        answer: Any = cls.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            key_mapping=undone or None,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told, rather than raised in many lines
            **options,
        )
    finally:
        transformers_logging.set_verbosity(before)
    model, told = answer
    wrong = [_first("missing", sorted(told["missing_keys"])), _first("left over", sorted(told["unexpected_keys"]))]
    shapes = [f"{name} is {list(found)}, not {list(due)}" for name, found, due in sorted(told["mismatched_keys"])]
    if wrong := [*filter(None, wrong), *filter(None, [_first("", shapes)]), *told.get("error_msgs", ())]:
        raise InputError(f"{what}: its tensors are not those of a {cls.__name__}: {'; '.join(wrong)}")
    return model


def _first(kind: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{kind} {names[0]}{more}".strip()
