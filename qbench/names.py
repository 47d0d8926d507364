"""What a model calls the tensors of a checkpoint."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from .errors import InputError
from .shards import Contents, Spec


def named(
    model: PreTrainedModel, contents: Contents, undone: dict[str, str] | None = None
) -> tuple[dict[str, str], dict[str, Spec]]:
    """The name in the model of each tensor, by that in the files; and what a header tells of it, by that in the model.

    undone: patterns in the names of the files, and what is put in their places. Raises InputError for a tensor that is
    there twice.
    """
    rename = renaming(model, undone)
    called: dict[str, str] = {}
    found: dict[str, Spec] = {}
    for file, specs in contents.items():
        for tensor, spec in specs.items():
            called[tensor] = rename(tensor, file)
            if called[tensor] in found:
                raise InputError(f"{file}: {tensor} is there a second time, under another name; accepted: one of them")
            found[called[tensor]] = spec
    return called, found


def renaming(model: PreTrainedModel, undone: dict[str, str] | None = None) -> Callable[[str, Path], str]:
    """What `from_pretrained` makes of names: the model's own renamings, and the prefix of the base model on or off.

    Some architectures also merge, split or turn tensors as they load; such a tensor is refused.
    """
    transforms = get_model_conversion_mapping(model, undone or None)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()

    def rename(tensor: str, file: Path) -> str:
        name, converted = rename_source_key(tensor, renamings, converters, prefix, state)
        if name not in state and tensor in state:
            return tensor
        if converted is not None:
            raise InputError(
                f"{file}: {tensor} is no tensor of the {type(model).__name__}, which makes {name} of such; accepted: "
                "checkpoints whose tensors are the model's, one by one"
            )
        return name

    return rename
