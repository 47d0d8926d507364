"""The shape of a model: its configuration, and the model itself on the `meta` device, where tensors have no memory."""

import warnings
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import torch
import yaml
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qbench.checkpoint import auto_classes, location
from qbench.errors import InputError
from qbench.model.selection import linear_layers, weight_of

SHAPES = Path(__file__).with_name("shapes.yaml")


@lru_cache
def built_in() -> dict[str, dict]:
    """By name, what AutoConfig takes, and `source`."""
    return yaml.safe_load(SHAPES.read_text("utf-8"))


@dataclass(frozen=True)
class Sizes:
    """What a model is made of. layers: [out_features, in_features] of each linear layer that a run quantizes. embeddings,
    head, norms (and biases), others (weights in no linear layer, such as the experts of a mixture), all: elements of each
    parameter; one that embeddings and head share is an embedding. buffers: bytes. depth: decoder blocks. alike: whether
    these are all the same.
    """

    layers: dict[str, torch.Size]
    embeddings: list[int]
    head: list[int]
    norms: list[int]
    others: list[int]
    all: list[int]
    buffers: int
    depth: int
    alike: bool


@dataclass(frozen=True, eq=False)
class Shape:
    """name: as the user gave it. config: of the architecture."""

    name: str
    config: PreTrainedConfig

    def build(self, dtype: torch.dtype, attention: str, device: str = "meta") -> PreTrainedModel:
        """The model, with random weights where a device has memory for them. Raises InputError."""
        try:
            with torch.device(device), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return AutoModelForCausalLM.from_config(
                    deepcopy(self.config), dtype=dtype, attn_implementation=attention, trust_remote_code=False
                )
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            raise InputError(f"model: no causal LM comes of {self.name!r}: {_first_line(error)}") from error

    def shortened(self, dtype: torch.dtype, attention: str, depth: int) -> PreTrainedModel:
        """A model of the first `depth` decoder blocks, on the meta device."""
        return deepcopy(self._shortened(dtype, attention, depth))

    @lru_cache  # noqa: B019  a command has a handful of shapes, and asks for each again and again
    def _shortened(self, dtype: torch.dtype, attention: str, depth: int) -> PreTrainedModel:
        model = self.build(dtype, attention)
        del blocks(model)[depth:]
        return model

    @cached_property
    def sizes(self) -> Sizes:
        """Raises InputError where it is no causal LM, or has no linear layers in a list of decoder blocks."""
        model = self.build(torch.bfloat16, "eager")
        layers = linear_layers(model)
        embedded = {id(p): p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        head = model.get_output_embeddings()
        at_head = {id(p): p for p in (head.parameters() if head is not None else ()) if id(p) not in embedded}
        known = {*embedded, *at_head, *(id(layer.weight) for layer in layers.values())}
        rest = [p for p in model.parameters() if id(p) not in known]
        return Sizes(
            layers={name: weight_of(layer).shape for name, layer in layers.items()},
            embeddings=[p.numel() for p in embedded.values()],
            head=[p.numel() for p in at_head.values()],
            norms=[p.numel() for p in rest if p.dim() < 2],
            others=[p.numel() for p in rest if p.dim() >= 2],
            all=[p.numel() for p in model.parameters()],
            buffers=sum(b.nbytes for b in model.buffers()),
            depth=len(blocks(model)),
            alike=_are_alike(model),
        )

    def check_seq(self, seq: int) -> None:
        positions = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        if positions and seq > positions:
            raise InputError(f"seq: {seq} is more than the model's {positions} positions; accepted: up to those")


def find(name: object) -> Shape:
    """The shape that `model=` names. Only a hub id, owner/name, makes use of the network. Raises InputError."""
    if name is None:
        raise InputError(f"model: none is given; accepted: {_accepted()}")
    name = str(name)
    if name in built_in():
        return _of_name(name)
    path = location.BUNDLED if name == "bundled" else Path(name).expanduser()
    if not path.exists() and not location.is_hub_id(name):
        raise InputError(f"model: {name!r} is unknown; accepted: {_accepted()}")
    try:
        return Shape(name, auto_classes.config(path if path.exists() else location.hub_config(name)))
    except Exception as error:
        raise InputError(f"model: {name!r} could not be read: {_first_line(error)}; accepted: {_accepted()}") from error


@lru_cache
def _of_name(name: str) -> Shape:
    return Shape(name, AutoConfig.for_model(**{key: it for key, it in built_in()[name].items() if key != "source"}))


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder blocks: the list of modules with most linear layers. Raises InputError where there is none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    counts = dict.fromkeys(found, 0)
    for layer in linear_layers(model):
        for name in counts:
            counts[name] += layer.startswith(f"{name}.")
    if not any(counts.values()):
        raise InputError(f"model: {type(model).__name__} has no list of decoder blocks")
    return found[max(counts, key=lambda name: counts[name])]


def _are_alike(model: PreTrainedModel) -> bool:
    """Whether all decoder blocks have the same modules, parameters and kind of attention."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or [None] * len(blocks(model))

    def signature(block: nn.Module, kind: str | None) -> tuple:
        modules = tuple((name, type(module)) for name, module in block.named_modules())
        return kind, modules, tuple((name, p.shape) for name, p in block.named_parameters())

    return len({signature(block, kind) for block, kind in zip(blocks(model), kinds, strict=False)}) == 1


def _accepted() -> str:
    names = ", ".join(["bundled", *built_in()])
    return f"a folder or config.json of a causal LM, a hub id owner/name, or one of: {names}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
