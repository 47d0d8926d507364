"""transformers and PEFT handle packed models like any other, and give the same bits as qbench."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
import transformers.integrations.peft
from accelerate import cpu_offload
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM

import formats
import qbench
from qbench import QBenchConfig
from qbench.checkpoint import location, safetensors_io
from qbench.errors import InputError
from qbench.model import quantizing
from qbench.model.quant_linear import QuantLinear
from qbench.system.import_hooks import after
from qbench.training import merging
from qbench.training.lora_layer import LoraQuantLinear
from tests.conftest import make_model
from tests.qbench.checkpoint.test_packed import BAD_PACKED
from tests.qbench.cli.test_quantize import BAD_SOURCES
from tests.qbench.sample_checkpoints import (
    CPU,
    assert_same,
    edit_config,
    edit_index,
    in_memory,
    logits,
    quantize,
    read_files,
    tensors,
    truncated,
)

NF4 = {"name": "nf4", "block": 32, "dq": True}
UP = "model.layers.0.mlp.up_proj"


def load(folder: Path, arguments: dict | None = None, **options) -> transformers.PreTrainedModel:
    if arguments:
        config = {("format" if key == "name" else key): value for key, value in arguments.items()}
        options["quantization_config"] = QBenchConfig(**config)
    return AutoModelForCausalLM.from_pretrained(folder, **options)


@pytest.fixture(scope="session")
def biased(tmp_path_factory) -> Path:
    """A Llama whose linear layers have a bias and whose head is tied to its embedding."""
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        attention_bias=True, mlp_bias=True, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    folder = make_model("llama", tmp_path_factory.mktemp("biased"))
    (folder / safetensors_io.SINGLE).unlink()
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.mark.parametrize("name", formats.names())
@pytest.mark.parametrize("dq", [False, True])
def test_every_format_there_and_back(biased, tmp_path, name, dq):
    """A model quantized while it loads, saved and loaded equals the harness's, and what `qbench quantize` writes."""
    arguments = {"name": name, "block": 32, "dq": dq}
    expected, model = in_memory(biased, arguments), load(biased, arguments)
    assert_same(model, expected)
    assert quantizing.model_bytes(model) == quantizing.model_bytes(expected)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) > 2
    again = load(tmp_path / "saved")
    assert_same(again, expected)
    assert quantizing.model_bytes(again) == quantizing.model_bytes(expected) and not again.training
    quantize(biased, tmp_path / "out", arguments)
    saved, streamed = tensors(tmp_path / "saved"), tensors(tmp_path / "out")
    assert saved.keys() == streamed.keys() and "lm_head.weight" not in saved
    assert all(saved[key].dtype == streamed[key].dtype and torch.equal(saved[key], streamed[key]) for key in saved)
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("saved", "out")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    again.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert read_files(tmp_path / "again") == read_files(tmp_path / "saved")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_architecture_and_dtype(any_model, tmp_path, dtype):
    model = load(any_model, NF4, dtype=dtype)
    assert_same(model, in_memory(any_model, NF4, dtype))
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / safetensors_io.SINGLE).is_file() and not (
        tmp_path / "saved" / safetensors_io.INDEX
    ).exists()
    again = load(tmp_path / "saved", dtype=dtype)
    assert_same(again, model)
    assert {layer.dtype for layer in again.modules() if isinstance(layer, QuantLinear)} == {dtype}
    assert again.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()


def test_the_bundled_model(tmp_path):
    model = load(location.BUNDLED, {"name": "nf4", "block": 64, "dq": True})
    model.save_pretrained(tmp_path / "saved")
    assert_same(load(tmp_path / "saved"), model)
    assert_same(model, in_memory(location.BUNDLED, {"name": "nf4", "block": 64, "dq": True}, model.dtype))
    tokenizer = transformers.AutoTokenizer.from_pretrained(location.BUNDLED)
    prompt = tokenizer("In the beginning", return_tensors="pt")
    first, second = (
        m.generate(**prompt, max_new_tokens=12, do_sample=False) for m in (model, load(tmp_path / "saved"))
    )
    assert torch.equal(first, second) and first.shape == (1, prompt.input_ids.shape[1] + 12)


EVERYWHERE = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}


PARTLY_ON_DISK = EVERYWHERE | {"model.layers.0": "cpu", "model.layers.1": "disk"}


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, PARTLY_ON_DISK])
def test_any_device_map(sharded_llama, packed_nf4, tmp_path, device_map):
    for folder, arguments in ((sharded_llama, NF4), (packed_nf4, None)):
        if arguments and device_map is PARTLY_ON_DISK:
            with pytest.raises(
                InputError, match=r"1.self_attn.q_proj would be offloaded to.* accepted: .*qbench quantize"
            ):
                load(folder, arguments, device_map=device_map, offload_folder=tmp_path)
            continue
        if device_map is PARTLY_ON_DISK and transformers.__version__.startswith("5.0."):
            with pytest.raises(InputError, match="is on disk, where this release of transformers rounds it"):
                load(folder, arguments, device_map=device_map, offload_folder=tmp_path)
            continue
        model = load(folder, arguments, device_map=device_map, offload_folder=tmp_path)
        assert torch.equal(logits(model), logits(load(packed_nf4)))
        assert not any(b.is_meta for module in model.modules() for b in module.buffers(recurse=False))


@pytest.mark.skipif(
    transformers.__version__.startswith("5.0."), reason="this release looks for offloaded parameters alone"
)
def test_what_is_offloaded_is_saved_as_it_is(packed_nf4, tmp_path):
    model, expected = load(packed_nf4), load(packed_nf4)
    cpu_offload(model, execution_device=CPU, offload_buffers=True)
    model.hf_device_map = {"model": "cpu", "lm_head": 0}  # as with a GPU that the model does not fit
    assert all(layer.codes.is_meta for layer in model.modules() if isinstance(layer, QuantLinear))
    for source, folder in ((model, "offloaded"), (expected, "expected")):
        source.save_pretrained(tmp_path / folder)
    assert read_files(tmp_path / "offloaded") == read_files(tmp_path / "expected")


def test_an_automatic_device_map_counts_packed_weights_as_packed(sharded_llama, packed_nf4):
    memory = {"cpu": quantizing.model_bytes(load(packed_nf4)) + 20_000}
    for folder, arguments in ((sharded_llama, NF4), (packed_nf4, None)):
        model = load(folder, arguments, device_map="auto", max_memory=memory)
        assert not any(p.is_meta for p in model.parameters())


@pytest.fixture(scope="session")
def packed_nf4(sharded_llama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed_nf4")
    quantize(sharded_llama, folder, NF4)
    return folder


def test_torch_compile_takes_the_whole_model(packed_nf4):
    model = load(packed_nf4, dtype=torch.float32)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    tokens = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(compiled(tokens, use_cache=False).logits, model(tokens, use_cache=False).logits)


def train(model: PeftModel, steps: int = 6) -> list[float]:
    torch.manual_seed(0)
    tokens = torch.randint(0, 4096, (2, 24))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


CONFIGS = {
    "llama": {"target_modules": ["q_proj", "v_proj", "up_proj"], "lora_dropout": 0.1},
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},  # said of its Conv1D
    "gpt_neox": {"target_modules": "all-linear", "use_dora": True},
    "qwen2": {"target_modules": "all-linear", "use_rslora": True, "init_lora_weights": "gaussian"},
}


def test_peft_as_its_users_write_it(any_model, tmp_path):
    architecture = transformers.AutoConfig.from_pretrained(any_model).model_type
    config = LoraConfig(r=4, task_type="CAUSAL_LM", **CONFIGS[architecture])
    model = get_peft_model(load(any_model, NF4, dtype=torch.float32), config)
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraQuantLinear)]
    assert len(adapted) == {"llama": 6, "gpt2": 6, "gpt_neox": 8, "qwen2": 14}[architecture]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" not in name}
    losses = train(model.train())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(any_model, NF4, dtype=torch.float32), tmp_path / "adapter").eval()
    apart = logits(model.eval())
    assert torch.equal(logits(again), apart)
    with model.disable_adapter():
        plain = logits(load(any_model, NF4, dtype=torch.float32))
        assert torch.equal(logits(model), plain) and (plain - apart).abs().max() > 0.05
    merging.merged(model).save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    merged = load(tmp_path / "merged")
    assert not any(isinstance(module, QuantLinear) for module in merged.modules())
    assert torch.allclose(logits(merged), apart, atol=1e-4)


def test_peft_prepared_and_checkpointed(packed_nf4):
    losses = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = prepare_model_for_kbit_training(load(packed_nf4), use_gradient_checkpointing=False)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        assert not any(p.requires_grad for p in model.parameters()) and model.dtype == torch.float32
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        losses.append(train(model.train()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and losses[0][-1] < losses[0][0] - 0.1


CHANGES = {
    "merge": lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"])).merge_and_unload(),
    "safe merge": lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"])).merge_and_unload(
        safe_merge=True
    ),
    "merged DoRA": lambda model: get_peft_model(
        model, LoraConfig(target_modules=["q_proj"], use_dora=True)
    ).merge_and_unload(),
    "merged IA3": lambda model: get_peft_model(
        model, peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    ).merge_and_unload(),
    "PiSSA": lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa")),
    "OLoRA": lambda model: get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights="olora")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_would_change_a_packed_weight_is_refused(packed_nf4, change):
    """The write would be lost: the weight is computed anew each time."""
    with pytest.raises(TypeError, match="a packed weight cannot be changed"):
        CHANGES[change](load(packed_nf4, dtype=torch.float32))


BAD_INDICES = {
    "an index that leaves": (
        lambda f: edit_index(f, lambda i: i.update(a="../x")),
        r"x is in another folder; files of",
    ),
    "the first file cut short": (
        truncated(safetensors_io.shard_name(1, 5), 10_000),
        r"00001-of-00005.safetensors is not a whole",
    ),
}


@pytest.mark.parametrize("case", BAD_PACKED | BAD_INDICES)
def test_a_bad_packed_checkpoint_is_refused_in_a_line(packed, case):
    spoil, message = (BAD_PACKED | BAD_INDICES)[case]
    spoil(packed)
    with pytest.raises((InputError, OSError), match=message) as raised:
        load(packed)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("case", sorted(set(BAD_SOURCES) & {
    "a missing file", "a file cut short", "a header cut short", "NaN in a weight", "Inf in what is copied",
    "another shape", "integers", "no such weight", "a tensor too many", "twice, in a file", "twice, in two",
}))  # fmt: skip
def test_a_bad_checkpoint_in_16_bit_is_refused_in_a_line(copied, case):
    spoil, message = BAD_SOURCES[case]
    spoil(copied)
    with pytest.raises(InputError, match=message) as raised:
        load(copied, NF4)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "nf5"}, r"quantization_config: unknown format 'nf5'; there are: fp4"),
        ({"name": "nf4", "block": 0}, r"quantization_config: block must be a positive integer, got 0"),
        ({"name": "nf4", "dq": 1}, r"quantization_config: dq must be true or false, got 1"),
        ({"name": "nf4", "blok": 32}, r"quantization_config: 'blok' is no option of nf4; accepted: block, dq"),
    ],
)
def test_a_config_that_is_none(sharded_llama, arguments, message):
    with pytest.raises(InputError, match=message):
        load(sharded_llama, arguments)


def test_what_cannot_be_packed_is_refused(copied, tmp_path):
    with pytest.raises(InputError, match=r"lm_head.weight has no place in a LlamaModel"):
        transformers.AutoModel.from_pretrained(copied, quantization_config=QBenchConfig("nf4"))
    state = load(copied).state_dict()
    with pytest.raises(InputError, match="a state_dict is not accepted"):
        config = transformers.AutoConfig.from_pretrained(copied)
        transformers.LlamaForCausalLM.from_pretrained(
            None, config=config, state_dict=state, quantization_config=QBenchConfig("nf4")
        )
    edit_config(copied, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match="is quantized with FineGrainedFP8Config but you are passing a QBenchConfig"):
        load(copied, NF4)


def test_only_what_can_be_loaded_is_saved(sharded_llama, tmp_path):
    model = load(sharded_llama, NF4)
    get_peft_model(model, LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(InputError, match=f"{UP} is a LoraQuantLinear; accepted: a QuantLinear"):
        model.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").iterdir())


@pytest.mark.skipif(
    Version(peft.__version__) < Version(getattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "0")),
    reason="transformers 5.24 asks for PEFT 0.22 here, which is not out (huggingface/transformers#45405)",
)
def test_of_a_model_with_an_adapter_the_adapter_is_saved(sharded_llama, tmp_path):
    model = load(sharded_llama, NF4)
    model.add_adapter(LoraConfig(target_modules=["up_proj"]))
    model.save_pretrained(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_in_memory_is_packed_as_on_the_way_from_disk(any_model, tmp_path, dtype):
    model = load(any_model, dtype=dtype)
    assert qbench.pack(model, "nf4", block=32, dq=True) is model
    expected = load(any_model, NF4 | {"block": 32, "dq": True}, dtype=dtype)
    assert_same(model, expected)
    assert model.config.quantization_config.to_dict() == expected.config.quantization_config.to_dict()
    model.save_pretrained(tmp_path / "packed")
    assert_same(load(tmp_path / "packed", dtype=dtype), model)
    tuned = get_peft_model(model, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert any(isinstance(module, LoraQuantLinear) for module in tuned.modules())
    with pytest.raises(InputError, match="has no linear layer to quantize besides its head"):
        qbench.pack(load(tmp_path / "packed"), "nf4")


def test_a_model_that_cannot_be_packed_stays_as_it_is(sharded_llama):
    model = load(sharded_llama)
    model.get_submodule(UP).weight.data[3, 5] = torch.inf
    for name, message in (("nf4", rf"{UP}.weight: .*Inf"), ("nf5", "unknown format 'nf5'")):
        with pytest.raises(InputError, match=message):
            qbench.pack(model, name)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    assert not hasattr(model.config, "quantization_config")


def test_a_model_is_dequantized_where_it_stands(any_model, tmp_path):
    packed = load(any_model, NF4, dtype=torch.float32)
    expected = logits(packed)
    plain = packed.dequantize()
    assert not any(isinstance(module, QuantLinear) for module in plain.modules())
    plain.save_pretrained(tmp_path / "plain")
    again = load(tmp_path / "plain", dtype=torch.float32)
    assert not hasattr(again.config, "quantization_config")
    assert torch.allclose(logits(again), expected, atol=1e-5)


def test_weights_stay_as_they_are_in_any_dtype(packed_nf4):
    model = load(packed_nf4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "proj" in name}
    model.to(torch.float16)
    assert model.dtype == torch.float16
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert_same(copy.deepcopy(model), model)


def test_qbench_may_be_imported_first_and_takes_no_time(packed_nf4):
    program = f"""
import sys, qbench
assert not {{"torch", "transformers", "peft"}} & set(sys.modules)
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
model = get_peft_model(AutoModelForCausalLM.from_pretrained({str(packed_nf4)!r}), LoraConfig(target_modules=["q_proj"]))
print(type(model.base_model.model.model.layers[0].self_attn.q_proj).__name__, type(qbench.QBenchConfig("nf4")).__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "LoraQuantLinear QBenchConfig\n", done.stderr


def test_what_follows_an_import(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("first_of_two", "second_of_two"):
        (tmp_path / f"{name}.py").write_text("")
    after("first_of_two", "second_of_two")
    assert importlib.util.find_spec("first_of_two") and "second_of_two" not in sys.modules
    importlib.import_module("first_of_two")
    second = sys.modules.pop("second_of_two")
    after("first_of_two", "second_of_two")
    assert sys.modules.pop("second_of_two") is not second
