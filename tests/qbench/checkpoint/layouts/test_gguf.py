"""GGUF files are read bit for bit; the package gguf writes them and transformers, which decodes to fp32, is the oracle."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import formats
from qbench.checkpoint import loading, packed_checkpoint
from qbench.checkpoint.layouts.gguf import tensors
from qbench.checkpoint.location import BUNDLED
from qbench.errors import InputError
from qbench.model import quantizing
from qbench.model.quant_linear import QuantLinear
from qbench.model.replacement import replace_layers
from qbench.model.selection import linear_layers
from tests.qbench.sample_checkpoints import CPU, logits

gguf = pytest.importorskip("gguf", reason="gguf is in the test extra")
KINDS = ["Q4_0", "Q4_1", "Q8_0"]
SIZES = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 3e-5,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 50000.0}
UP = "blk.0.ffn_up.weight"


def random(kind: type, **options) -> PreTrainedModel:
    torch.manual_seed(0)
    config = kind(**{**SIZES, "rope_parameters": ROPE, **options})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return random(transformers.LlamaConfig)


def interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """Interleave the rows of q or k of a Llama, as llama.cpp's converter does."""
    return w.reshape(heads, 2, len(w) // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write(
    path: Path, model: PreTrainedModel, kinds: dict[str, str], tokenizer: bool = False, more=lambda w: None
) -> Path:
    """Write a model as llama.cpp does. kinds: types of matrices, by the end of the name; the first that fits is used."""
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer:
        add_tokenizer(writer)
    more(writer)
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        key, values = names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.numpy()
        if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = interleaved(values, heads)
        if values.ndim == 2:
            kind = gguf.GGMLQuantizationType[next(kind for end, kind in kinds.items() if name.endswith(end))]
            writer.add_tensor(key, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer) -> None:
    backend = AutoTokenizer.from_pretrained(BUNDLED)
    tokens = sorted(backend.get_vocab(), key=backend.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    special = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_types([special[token not in backend.all_special_tokens] for token in tokens])
    merges = json.loads((BUNDLED / "tokenizer.json").read_text())["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(backend.bos_token_id)
    writer.add_eos_token_id(backend.eos_token_id)


def theirs(path: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def load(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return packed_checkpoint.load(path, CPU, dtype, tokenizer=BUNDLED).model


def close(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    assert (logits(model) - logits(expected)).abs().max() <= 1e-5 * logits(expected).abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_llama(llama, tmp_path, kind):
    path = write(tmp_path / "model.gguf", llama, {"": kind})
    loaded = load(path)
    layers = {name: module for name, module in loaded.named_modules() if isinstance(module, QuantLinear)}
    original = linear_layers(llama)
    assert layers.keys() == original.keys() and len(layers) == 14
    for name, layer in layers.items():
        expected = formats.get(kind.lower(), block=32).quantize(original[name].weight)
        assert (layer.format, layer.block) == (kind.lower(), 32)
        for ours, same in zip(layer.packed.stored, expected.stored, strict=True):
            assert ours.dtype == same.dtype and torch.equal(ours, same), name
    close(loaded, theirs(path))
    assert loaded.config.rope_parameters["rope_theta"] == 50000.0 and loaded.config.rms_norm_eps == pytest.approx(3e-5)
    bits = {"Q4_0": 4.5, "Q4_1": 5.0, "Q8_0": 8.5}[kind]
    assert {layer.packed.bits_per_parameter for layer in layers.values()} == {bits}
    loaded.save_pretrained(tmp_path / "packed")
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(tmp_path / "packed")
    again = packed_checkpoint.load(tmp_path / "packed", CPU, torch.float32).model
    assert torch.equal(logits(again), logits(loaded))


def test_the_tokenizer_is_that_of_the_file(llama, tmp_path):
    path = write(tmp_path / "model.gguf", llama, {"": "Q8_0"}, tokenizer=True)
    text = "In the beginning God created the heaven and the earth."
    ids = AutoTokenizer.from_pretrained(BUNDLED)(text, add_special_tokens=False).input_ids
    assert packed_checkpoint.load(path, CPU, torch.float32).tokenizer(text, add_special_tokens=False).input_ids == ids
    bare = write(tmp_path / "bare.gguf", llama, {"": "Q8_0"})
    with pytest.raises(InputError, match=r"bare.gguf brings no tokenizer; accepted: the folder of one, as `tokenizer`"):
        packed_checkpoint.load(bare, CPU, torch.float32)
    loaded = packed_checkpoint.load(bare, CPU, torch.float32, tokenizer=BUNDLED)
    assert loaded.tokenizer(text, add_special_tokens=False).input_ids == ids
    assert loaded.model.config.vocab_size == 4096


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (transformers.LlamaConfig, {"tie_word_embeddings": True, "num_key_value_heads": 1}),
        (transformers.Qwen2Config, {}),
        (transformers.Qwen3Config, {"head_dim": 128}),
        (transformers.Qwen3Config, {"head_dim": 32}),
    ],
)
def test_others_of_the_family(tmp_path, kind, options):
    model = random(kind, **options)
    head = options.get("head_dim", 16)
    path = write(tmp_path / "model.gguf", model, {"": "Q4_0"}, more=lambda w: w.add_key_length(head))
    loaded = load(path)
    if head != 32:  # of a Qwen3, transformers takes no other than 128
        close(loaded, theirs(path))
    replace_layers(model, quantizing.quantize(linear_layers(model), formats.get("q4_0", block=32)))
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.weight.data = formats.get("q4_0", block=32).quantize(module.weight.data).dequantize()
    close(loaded, model)


def test_what_is_not_packed_is_as_it_is(llama, tmp_path):
    kinds = {"up_proj.weight": "F16", "gate_proj.weight": "F32", "v_proj.weight": "BF16", "embed_tokens.weight": "F16"}
    kinds |= {"lm_head.weight": "Q5_0", "k_proj.weight": "Q4_1", "": "Q4_0"}
    path = write(tmp_path / "model.gguf", llama, kinds)
    loaded = load(path)
    close(loaded, theirs(path))
    formats_of = {name.rpartition(".")[2]: getattr(layer, "format", None) for name, layer in loaded.named_modules()}
    assert {end: formats_of[end] for end in ("q_proj", "k_proj", "v_proj", "up_proj", "gate_proj", "lm_head")} == {
        "q_proj": "q4_0", "k_proj": "q4_1", "v_proj": None, "up_proj": None, "gate_proj": None, "lm_head": None,
    }  # fmt: skip
    assert load(path, torch.bfloat16).get_submodule("model.layers.0.mlp.up_proj").weight.dtype == torch.bfloat16


def test_the_scaled_positions_of_llama_3(tmp_path):
    rope = ROPE | {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    model = random(transformers.LlamaConfig, rope_parameters=rope)
    plain = 1 / 50000.0 ** (torch.arange(0, 16, 2) / 16)
    factors = (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    assert factors.min() == 1 and factors.max() == pytest.approx(8)
    path = write(tmp_path / "model.gguf", model, {"": "F32"}, more=lambda w: w.add_tensor("rope_freqs.weight", factors))
    loaded = load(path)
    close(loaded, model)
    replace_layers(loaded, quantizing.quantize(linear_layers(loaded), formats.get("q4_0", block=32)))
    packed_checkpoint.save(loaded, tmp_path / "packed", AutoTokenizer.from_pretrained(BUNDLED))
    again = packed_checkpoint.load(tmp_path / "packed", CPU, torch.float32).model
    assert torch.equal(logits(again), logits(loaded))


def test_tensors_bit_for_bit(llama, tmp_path):
    path = write(tmp_path / "model.gguf", llama, {"down_proj.weight": "BF16", "up_proj.weight": "Q4_1", "": "Q8_0"})
    reader = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    read = dict(tensors(path))
    assert read.keys() == reader.keys()
    for name, tensor in read.items():
        expected = torch.from_numpy(gguf.quants.dequantize(reader[name].data, reader[name].tensor_type).copy())
        values = tensor.float() if torch.is_tensor(tensor) else tensor.dequantize()
        assert torch.equal(values, expected.view(values.shape)), name
    assert read[UP].format == "q4_1" and read["blk.0.ffn_down.weight"].dtype == torch.bfloat16
    w = llama.get_submodule("model.layers.0.mlp.up_proj").weight
    ours = formats.get("q4_1", block=32).quantize(w)
    assert all(map(torch.equal, read[UP].stored, ours.stored))


@pytest.fixture(scope="module")
def whole(llama, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf", llama, {"": "Q4_0"})


def cut(size: int):
    def spoil(path: Path, llama: PreTrainedModel) -> None:
        path.write_bytes(path.read_bytes()[:size])

    return spoil


def metadata(**change):
    def spoil(path: Path, llama: PreTrainedModel) -> None:
        write(path, llama, {"": "Q4_0"}, more=lambda w: [w.add_string(key, value) for key, value in change.items()])

    return spoil


def wider(path: Path, llama: PreTrainedModel) -> None:
    other = random(transformers.LlamaConfig, intermediate_size=128)
    write(path, SimpleNamespace(config=llama.config, state_dict=other.state_dict), {"": "Q4_0"})


def without(name: str):
    def spoil(path: Path, llama: PreTrainedModel) -> None:
        state = llama.state_dict()
        state.pop(name)
        write(path, SimpleNamespace(config=llama.config, state_dict=lambda: state), {"": "Q4_0"})

    return spoil


BAD = {
    "no GGUF": (lambda path, _: path.write_bytes(b"x" * 100), r"model.gguf is not a whole GGUF file: GGUF magic"),
    "empty": (cut(0), r"model.gguf is not a whole GGUF file"),
    "a header cut short": (cut(1000), r"model.gguf is not a whole GGUF file"),
    "tensors cut short": (cut(300_000), r"model.gguf is not a whole GGUF file"),
    "another type": (lambda path, llama: write(path, llama, {"up_proj.weight": "Q5_1", "": "Q4_0"}),
                     rf"{UP} is Q5_1; accepted: Q4_0, Q4_1, Q8_0, F32, F16, BF16"),
    "a tensor too many": (lambda path, llama: write(path, llama, {"": "Q4_0"}, more=lambda w: w.add_tensor(
        "blk.0.what.weight", np.ones(4, np.float32))), r"blk.0.what.weight has no place in a LlamaForCausalLM"),
    "a missing matrix": (without("model.layers.0.mlp.up_proj.weight"), r"up_proj.weight is missing"),
    "a missing norm": (without("model.norm.weight"), r"model.norm.weight is missing"),
    "scaled positions": (metadata(**{"llama.rope.scaling.type": "yarn"}), r"rope.scaling.type: 'yarn' is not supported"),
    "another shape": (wider, r"\[128, 64\]; accepted: \[96, 64\]"),
    "another architecture": (lambda path, _: write(path, random(transformers.Starcoder2Config), {"": "Q4_0"}),
                             r"general.architecture: 'starcoder2' is not supported; accepted: llama, qwen2, qwen3"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_loaded_is_named_in_a_line(llama, whole, tmp_path, case):
    path = Path(shutil.copy(whole, tmp_path / "model.gguf"))
    spoil, message = BAD[case]
    spoil(path, llama)
    with pytest.raises(InputError, match=message) as raised:
        load(path)
    assert "\n" not in str(raised.value)


def test_a_run_names_what_can_be_done_with_it(whole):
    with pytest.raises(
        InputError, match=r"is packed already, as Q4_0 in a GGUF file; accepted: a 16-bit checkpoint\. qb"
    ):
        loading.open(str(whole))
    assert len(loading.digest(str(whole))) == 64
    with pytest.raises(InputError, match=r"gone.gguf' does not exist"):
        loading.open(str(whole.parent / "gone.gguf"))


def test_without_the_package_a_line_says_so(whole, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(InputError, match=r"gguf, which reads GGUF files, is not installed; pip install 'gguf>="):
        load(whole)
