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

from formats.contract import first_line
from qbench.checkpoint import auto_classes, location
from qbench.errors import InputError
from qbench.measure import quality
from qbench.model.selection import linear_layers, weight_of
from qbench.training import data

SHAPES = Path(__file__).with_name("shapes.yaml")


@lru_cache
def built_in_shapes() -> dict[str, dict]:
    """The built-in shapes by name: arguments of AutoConfig, and `source`."""
    return yaml.safe_load(SHAPES.read_text("utf-8"))


@dataclass(frozen=True)
class Sizes:
    """The parts of a model.

    layers: [out_features, in_features] of each linear layer that a run quantizes. embeddings, head, norms, others, all:
    elements of each parameter. A parameter that embeddings and head share is an embedding; norms includes the biases;
    others are weights in no linear layer, such as the experts of a mixture. buffers: bytes. depth: decoder blocks. alike:
    whether all blocks are the same.
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
    """A model without weights.

    name: as the user gave it. config: of the architecture. trust: run the code that the config names.
    """

    name: str
    config: PreTrainedConfig
    trust: bool = False

    def build(self, dtype: torch.dtype, attention: str, device: str = "meta") -> PreTrainedModel:
        """The model on the meta device, or with random weights on another. Raises InputError."""
        try:
            with torch.device(device), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return AutoModelForCausalLM.from_config(
                    deepcopy(self.config), dtype=dtype, attn_implementation=attention, trust_remote_code=self.trust
                )
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            raise InputError(f"model: {self.name!r} is not a causal LM: {first_line(error)}") from error

    def shortened(self, dtype: torch.dtype, attention: str, depth: int) -> PreTrainedModel:
        """The model with only its first `depth` decoder blocks, on the meta device."""
        return deepcopy(self._shortened(dtype, attention, depth))

    @lru_cache  # noqa: B019  a command has few shapes, and builds each again and again
    def _shortened(self, dtype: torch.dtype, attention: str, depth: int) -> PreTrainedModel:
        model = self.build(dtype, attention)
        del decoder_blocks(model)[depth:]
        return model

    @cached_property
    def sizes(self) -> Sizes:
        """The sizes of its parts. Raises InputError if it is not a causal LM with linear layers in decoder blocks."""
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
            depth=len(decoder_blocks(model)),
            alike=_are_alike(model),
        )

    def check_seq(self, seq: int) -> None:
        """Raises InputError for more tokens than the model has positions."""
        self.pick_seq(seq)

    def pick_seq(self, seq: int | str) -> int:
        """The tokens of a window, as a run picks them. Raises InputError for more than the model has positions."""
        return data.pick_seq(seq, self)  # type: ignore[arg-type]  # it reads only the config

    def windows_scored_at_once(self, seq: int) -> int:
        """Windows of `seq` tokens that a run scores together, as `quality.evaluate` does."""
        return max(1, quality.BATCH_LOGITS // (seq * self.config.get_text_config().vocab_size))


def find_shape(name: str | None, revision: str | None = None, trust: bool = False) -> Shape:
    """The shape of a built-in name, a folder, a config.json or a hub id; None is the bundled model.

    Only a hub id uses the network. revision: of the hub id. trust: run the code in the folder. Raises InputError.
    """
    if name in built_in_shapes():
        return _built_in_shape(name)
    name = name or "bundled"
    path = location.BUNDLED if name == "bundled" else Path(name).expanduser()
    if not path.exists() and not location.is_hub_id(name):
        raise InputError(f"model: {name!r} is unknown; accepted: {_accepted_models()}")
    try:
        folder = path if path.exists() else location.download_config(name, revision)
        return Shape(name, auto_classes.load_config(folder, trust=trust), trust)
    except Exception as error:
        raise InputError(
            f"model: {name!r} could not be read: {first_line(error)}; accepted: {_accepted_models()}"
        ) from error


@lru_cache
def _built_in_shape(name: str) -> Shape:
    options = {key: value for key, value in built_in_shapes()[name].items() if key != "source"}
    return Shape(name, AutoConfig.for_model(**options))


def decoder_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The list of modules with the most linear layers. Raises InputError if no list has any."""
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    counts = dict.fromkeys(lists, 0)
    for layer in linear_layers(model):
        for name in counts:
            counts[name] += layer.startswith(f"{name}.")
    if not any(counts.values()):
        raise InputError(f"model: {type(model).__name__} has no list of decoder blocks")
    return lists[max(counts, key=lambda name: counts[name])]


def _are_alike(model: PreTrainedModel) -> bool:
    """Whether all decoder blocks have the same modules, parameters and kind of attention."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or [None] * len(decoder_blocks(model))

    def signature(block: nn.Module, kind: str | None) -> tuple:
        modules = tuple((name, type(module)) for name, module in block.named_modules())
        return kind, modules, tuple((name, p.shape) for name, p in block.named_parameters())

    return len({signature(block, kind) for block, kind in zip(decoder_blocks(model), kinds, strict=False)}) == 1


def _accepted_models() -> str:
    names = ", ".join(["bundled", *built_in_shapes()])
    return f"a folder or config.json of a causal LM, a hub id owner/name, or one of: {names}"
