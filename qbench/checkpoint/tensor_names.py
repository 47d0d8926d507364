"""Matches the tensors of a checkpoint with the names in a model, by transformers' own rules."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qbench.errors import InputError
from qbench.model.selection import find_heads, is_replaceable

from .safetensors_io import Contents, TensorSpec


def match_names(
    model: PreTrainedModel, contents: Contents, key_mapping: dict[str, str] | None = None
) -> tuple[dict[str, str], dict[str, TensorSpec]]:
    """Returns the name in the model by the name in the file, and the spec by the name in the model.

    Some tensors are merged into one as the model loads, such as the experts of a layer. They keep the names that they have
    in the file; the spec is then that of the merged tensor.

    key_mapping: patterns in names of the files, and their replacements. Raises InputError for a tensor that is there
    twice, and if the tensors to be merged do not have as many weights as the model's.
    """
    expected = model.state_dict()
    names: dict[str, str] = {}
    specs: dict[str, TensorSpec] = {}
    merged: Counter[str] = Counter()
    for file, tensor, name, is_part in iterate_names(model, contents, key_mapping):
        spec = contents[file][tensor]
        names[tensor] = tensor if is_part else name
        if is_part:
            _check_part(model, name, expected, f"{file}: {tensor}")
            merged[name] += spec.shape.numel()
        else:
            specs[name] = spec
    for name, weights in merged.items():
        if name in specs or weights != expected[name].numel():
            where = next(iter(contents)).parent
            raise InputError(f"{where}: the parts of {name} hold {weights} weights; accepted: {expected[name].numel()}")
        specs[name] = TensorSpec.of(expected[name])
    return names, specs


def iterate_names(
    model: PreTrainedModel, contents: Contents, key_mapping: dict[str, str] | None = None
) -> Iterator[tuple[Path, str, str, bool]]:
    """Yields file, name in the file, name in the model, and whether the tensor is only a part of the model's tensor.

    Raises InputError for a tensor that is there twice.
    """
    rename = _make_renamer(model, key_mapping)
    seen: set[str] = set()
    for file, specs in contents.items():
        for tensor in specs:
            name, is_part = rename(tensor)
            if name in seen and not is_part:
                raise InputError(f"{file}: {tensor} is there a second time, under another name; accepted: one of them")
            seen.add(name)
            yield file, tensor, name, is_part


def make_renamer(model: PreTrainedModel) -> Callable[[str, Path], str]:
    """A function that renames as `from_pretrained` does: the model's own rules, and the prefix of the base model.

    It takes the name of a tensor and its file. It raises InputError for a tensor that the architecture merges, splits or
    transposes as it loads.
    """
    rename = _make_renamer(model)

    def rename_whole(tensor: str, file: Path) -> str:
        name, is_part = rename(tensor)
        if is_part:
            _refuse_part(model, name, f"{file}: {tensor}")
        return name

    return rename_whole


def _make_renamer(
    model: PreTrainedModel, key_mapping: dict[str, str] | None = None
) -> Callable[[str], tuple[str, bool]]:
    """A function from the name in a file to that in the model, and whether the tensor is a part of the model's tensor."""
    transforms = get_model_conversion_mapping(model, key_mapping or None)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()

    def rename(tensor: str) -> tuple[str, bool]:
        name, converted = rename_source_key(tensor, renamings, converters, prefix, state)
        if name not in state and tensor in state:
            return tensor, False
        return name, converted is not None

    return rename


def _check_part(model: PreTrainedModel, name: str, expected: dict, tensor: str) -> None:
    """Raises InputError for a part of several tensors of the model, or of a weight that is to be quantized."""
    owner, _, leaf = name.rpartition(".")
    if name not in expected:
        _refuse_part(model, name, tensor)
    layer = model.get_submodule(owner)
    if leaf == "weight" and is_replaceable(layer) and layer not in find_heads(model):
        _refuse_part(model, name, tensor)


def _refuse_part(model: PreTrainedModel, name: str, tensor: str) -> None:
    raise InputError(
        f"{tensor} is no tensor of the {type(model).__name__}, which builds {name} from it; accepted: checkpoints with "
        "exactly the tensors of the model"
    )
