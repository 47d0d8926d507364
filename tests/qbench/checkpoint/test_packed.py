"""A packed checkpoint has the same bits as the model in memory; anything wrong with it is named."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

import formats
from qbench.checkpoint import empty_model, loading, safetensors_io
from qbench.errors import InputError
from qbench.model import quantizing
from qbench.model.quant_linear import QuantLinear
from tests.conftest import ARCHITECTURES, make_model
from tests.qbench.sample_checkpoints import (
    CPU,
    assert_same,
    changed,
    edit_recipe,
    edit_tensors,
    in_memory,
    make_sharded,
    quantize,
    tensors,
    truncated,
)

UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize("name", formats.names())
@pytest.mark.parametrize("dq", [False, True])
def test_every_format_is_what_it_is_in_memory(sharded_llama, tmp_path, name, dq):
    arguments = {"name": name, "block": 32, "dq": dq}
    quantize(sharded_llama, tmp_path / "out", arguments)
    expected = in_memory(sharded_llama, arguments)
    loaded = loading.load(str(tmp_path / "out"), torch.bfloat16, CPU)
    assert_same(loaded.model, expected)
    assert quantizing.model_bytes(loaded.model) == quantizing.model_bytes(expected)
    assert loaded.tokenizer("In the beginning").input_ids


def test_any_architecture(any_model, tmp_path):
    quantize(any_model, tmp_path / "out")
    for dtype in (torch.bfloat16, torch.float32):
        loaded = loading.load(str(tmp_path / "out"), dtype, CPU).model
        expected = in_memory(any_model, dtype=dtype)
        for module in expected.modules():
            if isinstance(module, QuantLinear):
                module.dtype = torch.bfloat16  # that of the checkpoint, which a run may not have loaded it in
        assert_same(loaded, expected)
        assert loaded.generation_config.to_dict() == expected.generation_config.to_dict()
        assert not any(parameter.requires_grad for parameter in loaded.parameters()) and not loaded.training


def test_what_a_model_computes_is_as_from_pretrained_computes_it(tmp_path):
    config = transformers.GPTJConfig(vocab_size=4096, n_embd=64, n_layer=1, n_head=4, n_positions=128, rotary_dim=8)
    quantize(make_sharded(config, tmp_path / "gptj"), tmp_path / "out")  # its positions depend on the default dtype
    assert_same(loading.load(str(tmp_path / "out"), torch.bfloat16, CPU).model, in_memory(tmp_path / "gptj"))


def test_the_layout_is_that_of_safetensors_and_of_the_hub(sharded_llama, tmp_path):
    contents = quantize(sharded_llama, tmp_path / "out")
    out = tmp_path / "out"
    count = len(contents)
    assert count > 3 and [file.name for file in contents] == [
        safetensors_io.shard_name(i, count) for i in range(1, count + 1)
    ]
    index = json.loads((out / safetensors_io.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(out).values())
    assert index["weight_map"] == {name: file.name for file, specs in contents.items() for name in specs}
    with safe_open(out / safetensors_io.shard_name(1, count), "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (out, sharded_llama))
    assert config.pop("quantization_config") == {
        "quant_method": "qbench", "version": 1, "format": "nf4", "block": 32, "dq": True, "options": {},
        "dtype": "bfloat16", "dtypes": {}, "coverage": {"quantized": 69632, "eligible": 69632, "left": {}},
    }  # fmt: skip
    assert config == before
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (sharded_llama / name).read_bytes()
    packed, plain = tensors(out), tensors(sharded_llama)
    layers = {name.removesuffix(".codes") for name in packed if name.endswith(".codes")}
    assert len(layers) == 14 and "lm_head" not in layers
    for name in plain.keys() & packed.keys():
        assert plain[name].dtype == packed[name].dtype and torch.equal(plain[name], packed[name])
    assert plain.keys() - packed.keys() == {f"{layer}.weight" for layer in layers}


def test_a_checkpoint_of_the_base_model_and_of_tied_weights(tmp_path):
    for name, part in (("whole", ""), ("base", "transformer")):
        make_sharded(ARCHITECTURES["gpt2"], tmp_path / name, part)
        quantize(tmp_path / name, tmp_path / f"{name}-out")
    assert "h.0.attn.c_attn.weight" in tensors(tmp_path / "base")
    whole, base = (loading.load(str(tmp_path / f"{name}-out"), torch.bfloat16, CPU).model for name in ("whole", "base"))
    assert_same(whole, base)
    assert_same(base, in_memory(tmp_path / "base"))
    assert base.lm_head.weight is base.transformer.wte.weight
    assert "lm_head.weight" not in tensors(tmp_path / "base-out")


def test_weights_of_several_dtypes_and_options_are_recovered(copied, tmp_path):
    changed(f"{UP}.weight", lambda weight: weight.float())(copied)
    quantize(copied, tmp_path / "out", {"name": "fp4", "block": 32, "dq": False, "variant": "e2m1"})
    loaded = loading.load(str(tmp_path / "out"), torch.bfloat16, CPU).model
    layer = loaded.get_submodule(UP)
    assert layer.weight.dtype == torch.float32 and layer.format == "fp4_e2m1"
    expected = in_memory(copied, {"name": "fp4_e2m1", "block": 32})
    expected.get_submodule(UP).dtype = torch.float32
    assert_same(loaded, expected)
    loaded.save_pretrained(tmp_path / "saved")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "saved")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_what_a_model_leaves_aside_may_be_there(copied, tmp_path):
    edit_tensors(copied, lambda state: state.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    quantize(copied, tmp_path / "out")
    assert "model.layers.0.self_attn.rotary_emb.inv_freq" in tensors(tmp_path / "out")
    assert_same(loading.load(str(tmp_path / "out"), torch.bfloat16, CPU).model, in_memory(copied))


BAD_PACKED = {
    "no codes": (changed(f"{UP}.codes", None), rf"{UP}.codes is missing"),
    "no absmax": (changed(f"{UP}.scale_absmax", None), rf"{UP}.scale_absmax is missing"),
    "no table": (changed(f"{UP}.levels", None), rf"{UP}.levels is missing"),
    "no norm": (changed("model.norm.weight", None), r"model.norm.weight is missing"),
    "fewer codes": (changed(f"{UP}.codes", lambda t: t[1:]), rf"{UP}.codes is uint8 \[3071\]; accepted: uint8 \[3072\]"),
    "a shorter table": (changed(f"{UP}.levels", lambda t: t[1:]), rf"{UP}.levels is float32 \[15\]; .* \[16\]"),
    "another dtype": (changed(f"{UP}.scale_absmax", lambda t: t.half()), rf"{UP}.scale_absmax is float16"),
    "an offset with a shape": (changed(f"{UP}.scale_offset", lambda t: t[None]), rf"{UP}.scale_offset is float32 \[1\]"),
    "NaN in a scale": (changed(f"{UP}.scale_absmax", lambda t: t * torch.nan), rf"{UP}.scale_absmax holds NaN"),
    "a tensor too many": (lambda f: edit_tensors(f, lambda state: state.update(a=torch.ones(1))), r": a has no place"),
    "another version": (lambda f: edit_recipe(f, version=2), r"quantization_config: version 2 is unknown; accepted: 1"),
    "no such format": (lambda f: edit_recipe(f, format="nf5"), r"unknown format 'nf5'; there are: fp4"),
    "another format": (lambda f: edit_recipe(f, format="nf4"), r"levels has no place"),
    "another block": (lambda f: edit_recipe(f, block=64), r"scale is uint8 .*; accepted: uint8"),
    "no double quantization": (lambda f: edit_recipe(f, dq=False), r"scale is uint8 .*; accepted: float32"),
    "a block that is none": (lambda f: edit_recipe(f, block=0), r"block must be a positive integer, got 0"),
    "an option that is none": (lambda f: edit_recipe(f, options={"a": 1}), r"quantization_config: 'a' is no option of q"),
    "options that are none": (lambda f: edit_recipe(f, options=None), r"options: None is not accepted"),
    "a dtype that is none": (lambda f: edit_recipe(f, dtype="int8"), r"dtype: 'int8' is unknown; accepted: .*bfloat16"),
    "a file cut short": (truncated(safetensors_io.shard_name(2, 5), 10_000), r"00002-of-00005.safetensors is not a whole"),
    "a missing file": (lambda f: (f / safetensors_io.shard_name(2, 5)).unlink(), r"00002-of-00005.safetensors is missing"),
    "no index": (lambda f: (f / safetensors_io.INDEX).unlink(), r"holds no weights|no file named model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PACKED)
def test_what_cannot_be_loaded_is_named_in_a_line(packed, case):
    spoil, message = BAD_PACKED[case]
    spoil(packed)
    with pytest.raises(InputError, match=message) as raised:
        loading.load(str(packed), torch.bfloat16, CPU)
    assert "\n" not in str(raised.value)


def test_loading_never_holds_the_model_in_16_bit(packed, tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=8
    )
    folder = make_model("llama", tmp_path / "model")  # its tokenizer
    config.save_pretrained(folder)
    expected = empty_model.build_empty(config, torch.bfloat16).state_dict()
    specs = {name: safetensors_io.TensorSpec.of(tensor) for name, tensor in expected.items()}
    zeros = ((name, torch.zeros_like(tensor, device="cpu")) for name, tensor in expected.items())
    safetensors_io.write(folder / safetensors_io.SINGLE, specs, zeros)
    quantize(folder, tmp_path / "out", {"name": "nf4", "block": 64, "dq": True})
    size = sum(spec.nbytes for spec in specs.values())
    small = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert small < 0.4 * size
    if not Path("/proc/self/status").exists():
        pytest.skip("the resident set is told by Linux alone")
    program = """
import sys, psutil, torch
from qbench.checkpoint import loading
from qbench.model import quantizing
from qbench.measure.memory import PeakMemory
loading.load(sys.argv[1], torch.bfloat16, torch.device("cpu"))  # what is imported once
before = psutil.Process().memory_info().rss
with PeakMemory(torch.device("cpu")) as peak:
    loaded = loading.load(sys.argv[2], torch.bfloat16, torch.device("cpu"))
print(quantizing.model_bytes(loaded.model), peak.bytes["rss"] - before)
"""
    done = subprocess.run([sys.executable, "-c", program, packed, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    held, added = map(int, done.stdout.split())
    assert held < 1.05 * small
    assert added < small + 0.2 * size
