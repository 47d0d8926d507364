"""What a model calls the tensors of a checkpoint."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qbench.errors import InputError
from qbench.model.selection import heads_of, replaceable

from .safetensors_io import Contents, Spec


def named(
    model: PreTrainedModel, contents: Contents, undone: dict[str, str] | None = None
) -> tuple[dict[str, str], dict[str, Spec]]:
    """The name in the model of each tensor, by that in the files; and what a header tells of it, by that in the model.

    A tensor that the model merges with others as it loads, such as one of an expert, keeps its name; of those the model's
    is told. undone: patterns in the names of the files, and what is put in their places. Raises InputError for a tensor
    that is there twice, and where those to be merged hold fewer weights, or more, than the model's.
    """
    expected = model.state_dict()
    called: dict[str, str] = {}
    found: dict[str, Spec] = {}
    merged: Counter[str] = Counter()
    for file, tensor, name, is_part in each(model, contents, undone):
        spec = contents[file][tensor]
        called[tensor] = tensor if is_part else name
        if is_part:
            _check_part(model, name, expected, f"{file}: {tensor}")
            merged[name] += spec.shape.numel()
        else:
            found[name] = spec
    for name, weights in merged.items():
        if name in found or weights != expected[name].numel():
            where = next(iter(contents)).parent
            raise InputError(f"{where}: what makes {name} holds {weights} weights; accepted: {expected[name].numel()}")
        found[name] = Spec.of(expected[name])
    return called, found


def each(
    model: PreTrainedModel, contents: Contents, undone: dict[str, str] | None = None
) -> Iterator[tuple[Path, str, str, bool]]:
    """Of each tensor its file, its name there and in the model, and whether it is but a part of what the model has there.

    Raises InputError for one that is there twice.
    """
    rename = _renaming(model, undone)
    seen: set[str] = set()
    for file, specs in contents.items():
        for tensor in specs:
            name, is_part = rename(tensor)
            if name in seen and not is_part:
                raise InputError(f"{file}: {tensor} is there a second time, under another name; accepted: one of them")
            seen.add(name)
            yield file, tensor, name, is_part


def renaming(model: PreTrainedModel) -> Callable[[str, Path], str]:
    """What `from_pretrained` makes of names: the model's own renamings, and the prefix of the base model on or off.

    Some architectures also merge, split or turn tensors as they load; such a tensor is refused.
    """
    rename = _renaming(model)

    def one(tensor: str, file: Path) -> str:
        name, is_part = rename(tensor)
        if is_part:
            _refuse(model, name, f"{file}: {tensor}")
        return name

    return one


def _renaming(model: PreTrainedModel, undone: dict[str, str] | None = None) -> Callable[[str], tuple[str, bool]]:
    """Of the name of a tensor in a file that in the model, and whether it is but a part of what the model has there."""
    transforms = get_model_conversion_mapping(model, undone or None)
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
    """Raises InputError for a part of what the model does not have under one name, or of a weight to quantize."""
    owner, _, own = name.rpartition(".")
    if name not in expected:
        _refuse(model, name, tensor)
    layer = model.get_submodule(owner)
    if own == "weight" and replaceable(layer) and layer not in heads_of(model):
        _refuse(model, name, tensor)


def _refuse(model: PreTrainedModel, name: str, tensor: str) -> None:
    raise InputError(
        f"{tensor} is no tensor of the {type(model).__name__}, which makes {name} of such; accepted: checkpoints whose "
        "tensors are the model's, one by one"
    )
