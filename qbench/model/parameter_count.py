"""Parameters of a model with packed layers, counted as the weights that these stand for, by whoever counts them."""

from torch import nn
from transformers.modeling_utils import PreTrainedModel


def not_counted(model: nn.Module) -> int:
    """How many more weights the packed layers of a model stand for than their parameters have elements."""
    from .selection import packed_layers  # which imports transformers, of which this follows a part

    layers = packed_layers(model).values()
    return sum(layer.num_weights - sum(p.numel() for p in layer.packed_parameters()) for layer in layers)


_num_parameters = PreTrainedModel.num_parameters


def num_parameters(model: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """What transformers' own counts, and the weights of packed layers, which are never trained."""
    counted = _num_parameters(model, only_trainable, exclude_embeddings)
    return counted if only_trainable else counted + not_counted(model)


PreTrainedModel.num_parameters = num_parameters  # type: ignore[method-assign, assignment]  # no other door
