"""Small checkpoints in several files, and ways to spoil them."""

import json
import os
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import formats
from qbench.checkpoint import loading, safetensors_io
from qbench.checkpoint.location import BUNDLED
from qbench.checkpoint.recipe import Recipe
from qbench.checkpoint.safetensors_io import Contents
from qbench.checkpoint.streaming import source, stream
from qbench.model import quantizing
from qbench.model.quant_linear import QuantLinear
from qbench.model.replacement import replace_layers
from qbench.model.selection import linear_layers

CPU = torch.device("cpu")
NF4 = {"name": "nf4", "block": 32, "dq": True}


def make_sharded(config: transformers.PreTrainedConfig, folder: Path, part: str = "") -> Path:
    """Write a random model of a config, or a part of it, in files of 60 kB or one tensor, with a tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.get_submodule(part).save_pretrained(folder, max_shard_size="60KB")
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(folder)
    return folder


def quantize(folder: Path, out: Path, arguments: dict = NF4, **options) -> Contents:
    """Pack a checkpoint with `qbench quantize`."""
    checkpoint = source.read_source(str(folder))
    return stream.quantize_checkpoint(checkpoint, Recipe.of(arguments, checkpoint.dtypes), out, **options)


def in_memory(folder: Path, arguments: dict = NF4, dtype: torch.dtype = torch.bfloat16) -> transformers.PreTrainedModel:
    """The model of a checkpoint, quantized in memory as in a run."""
    model = loading.load(str(folder), dtype, CPU).model
    replace_layers(model, quantizing.quantize(linear_layers(model), formats.get(**arguments)))
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, by name."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def read_files(folder: Path) -> dict[str, bytes]:
    """The bytes of all files in a folder, by name."""
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != ".lock"}


def logits(model: transformers.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(40).view(2, 20)).logits


def assert_same(model, other):
    first, second = ({**m.state_dict(), **dict(m.named_buffers())} for m in (model, other))
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]), name
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            assert module.weight.dtype == other.get_submodule(name).weight.dtype, name
    assert torch.equal(logits(model), logits(other))


def edit_index(folder, edit):
    index = json.loads((folder / safetensors_io.INDEX).read_text())
    edit(index["weight_map"])
    (folder / safetensors_io.INDEX).write_text(json.dumps(index))


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def edit_tensors(folder, edit, name="model.layers.0.mlp.up_proj"):
    """Edit the first file that has a tensor whose name starts with `name`."""
    files = sorted(folder.glob("*.safetensors"))
    file = next(file for file in files if any(key.startswith(name) for key in load_file(file)))
    state = load_file(file)
    edit(state)
    save_file(state, file)


def edit_recipe(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, quantization_config=config["quantization_config"] | changes)


def truncated(name: str, size: int):
    """A spoiler that truncates a file."""
    return lambda folder: os.truncate(folder / name, size)


def changed(name: str, change):
    """A spoiler that applies `change` to a tensor; if that is None, it removes the tensor from file and index."""

    def spoil(folder: Path) -> None:
        if change:
            edit_tensors(folder, lambda state: state.update({name: change(state[name]).clone()}), name)
        else:
            edit_tensors(folder, lambda state: state.pop(name), name)
            edit_index(folder, lambda where: where.pop(name))

    return spoil
