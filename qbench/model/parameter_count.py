"""Makes transformers' `num_parameters` count the weights of packed layers.

The parameters of a packed layer have fewer elements than it has weights: a byte of codes holds two 4-bit weights.
"""

from torch import nn
from transformers.modeling_utils import PreTrainedModel


def count_hidden_weights(model: nn.Module) -> int:
    """How many weights of packed layers are missing if the elements of their parameters are counted."""
    from .selection import packed_layers  # transformers is half imported at the top of this module

    layers = packed_layers(model).values()
    return sum(layer.num_weights - sum(p.numel() for p in layer.packed_parameters()) for layer in layers)


_num_parameters = PreTrainedModel.num_parameters


def num_parameters(model: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """transformers' count, with the weights of packed layers. They are frozen, so `only_trainable` leaves them out."""
    counted = _num_parameters(model, only_trainable, exclude_embeddings)
    return counted if only_trainable else counted + count_hidden_weights(model)


PreTrainedModel.num_parameters = num_parameters  # type: ignore[method-assign, assignment]  # there is no hook for it
