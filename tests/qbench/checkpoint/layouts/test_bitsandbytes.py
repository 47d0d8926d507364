"""Checkpoints of bitsandbytes are read and written to the last bit; bitsandbytes and transformers are the oracle."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import formats
from qbench import QBenchConfig
from qbench.checkpoint import loading, packed_checkpoint, sixteen_bit
from qbench.checkpoint.location import BUNDLED
from qbench.cli.quantize import main
from qbench.errors import InputError
from qbench.measure import quality
from qbench.model import quantizing
from qbench.model.quant_linear import QuantLinear
from qbench.model.replacement import replace_layers
from qbench.model.selection import linear_layers
from qbench.settings import TuneSettings
from qbench.training import adapters, data
from qbench.training.loop import train
from tests.qbench.sample_checkpoints import (
    CPU,
    assert_same,
    edit_recipe,
    in_memory,
    logits,
    make_sharded,
    quantize,
    tensors,
)

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is in the test extra")

UP = "model.layers.0.mlp.up_proj"
STATE = f"{UP}.weight.quant_state.bitsandbytes__nf4"
EVERY = [(name, dq) for name in ("nf4", "fp4") for dq in (False, True)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A Llama whose rows are whole blocks of 128: bitsandbytes decodes others wrongly on some CPUs."""
    config = transformers.LlamaConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    return make_sharded(config, tmp_path_factory.mktemp("plain"))


def theirs(folder: Path, name: str = "nf4", dq: bool = True, **options) -> transformers.PreTrainedModel:
    """A model as transformers quantizes it with bitsandbytes."""
    options = {"bnb_4bit_quant_type": name, "bnb_4bit_use_double_quant": dq} | options
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **options)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)


def saved(model: transformers.PreTrainedModel, folder: Path, **options) -> Path:
    model.save_pretrained(folder, **options)
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(folder)
    return folder


def exact(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """Without the kernel for AVX512-BF16, which rounds every absmax to bf16."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    return model


def assert_equal_files(first: Path, second: Path) -> None:
    assert_equal(tensors(first), tensors(second))


def assert_equal(first: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Names, dtypes, shapes and bytes."""
    assert first.keys() == other.keys()
    for key in first:
        assert first[key].dtype == other[key].dtype and first[key].shape == other[key].shape, key
        assert torch.equal(*(t[key].contiguous().view(-1).view(torch.uint8) for t in (first, other))), key


def load(folder: Path) -> transformers.PreTrainedModel:
    return packed_checkpoint.load(folder, CPU, torch.bfloat16).model


@pytest.mark.parametrize(("name", "dq"), EVERY)
def test_in_and_out_again(plain, tmp_path, name, dq):
    model = theirs(plain, name, dq)
    folder = saved(model, tmp_path / "theirs", max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 3, "the tensors of a layer are in several files"
    loaded = load(folder)
    assert_same(loaded, in_memory(plain, {"name": name, "block": 64, "dq": dq}))
    assert (logits(loaded) - logits(exact(model))).abs().max() <= 1e-3
    loaded.save_pretrained(tmp_path / "ours")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "ours")
    assert_equal_files(folder, tmp_path / "ours")
    configs = [json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "ours")]
    assert configs[0] == configs[1]
    assert_same(load(tmp_path / "ours"), loaded)


@pytest.mark.parametrize(("name", "dq"), EVERY)
@pytest.mark.parametrize("block", [32, 128])
def test_out_and_in_again(plain, tmp_path, name, dq, block):
    expected = in_memory(plain, {"name": name, "block": block, "dq": dq})
    packed_checkpoint.save(expected, tmp_path / "ours", AutoTokenizer.from_pretrained(plain), layout="bitsandbytes")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert layers.keys() == {name for name, module in expected.named_modules() if isinstance(module, QuantLinear)}
    assert_equal(model.state_dict(), tensors(tmp_path / "ours"))  # as bitsandbytes has it, codes, absmax and JSON
    assert (logits(expected) - logits(exact(model))).abs().max() <= 1e-3
    assert_same(load(tmp_path / "ours"), expected)


@pytest.mark.parametrize("dq", [False, True])
def test_streamed(plain, tmp_path, monkeypatch, capfd, dq):
    arguments = ["+format=nf4", f"dq={dq}", "layout=bitsandbytes", f"model.path={plain}", f"out={tmp_path / 'out'}"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["qbench", *arguments])
    assert main() == 0, capfd.readouterr().err
    expected = in_memory(plain, {"name": "nf4", "block": 64, "dq": dq})
    packed_checkpoint.save(expected, tmp_path / "saved", layout="bitsandbytes")
    streamed, whole = tensors(tmp_path / "out"), tensors(tmp_path / "saved")
    for state in (streamed, whole):  # JSON that is written before the weights are known is padded with blanks
        for key in state:
            if "quant_state" in key:
                state[key] = json.loads(bytes(state[key].tolist()))
    assert streamed.keys() == whole.keys()
    assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in ((streamed[k], whole[k]) for k in whole))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(load(tmp_path / "out")) - logits(exact(model))).abs().max() <= 1e-3
    monkeypatch.setattr(sys, "argv", ["qbench", *arguments, "block=128"])
    assert main() == 2 and "was begun with another format" in capfd.readouterr().err


def test_any_architecture(any_model, tmp_path):
    """Also if rows are not whole blocks, weights are transposed, or there are biases."""
    folder = saved(theirs(any_model), tmp_path / "theirs")
    loaded = load(folder)
    assert_same(loaded, in_memory(any_model, {"name": "nf4", "block": 64, "dq": True}))
    packed_checkpoint.save(loaded, tmp_path / "ours", AutoTokenizer.from_pretrained(folder), layout="bitsandbytes")
    assert_equal_files(folder, tmp_path / "ours")
    assert_same(load(tmp_path / "ours"), loaded)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    for key, tensor in tensors(folder).items():
        name = key if key in again else key.replace("embed_out", "lm_head")  # what newer releases call it
        assert_equal({name: again[name]}, {name: tensor})


def test_what_is_left_out_stays_as_it_is(plain, tmp_path):
    skipped = {"some": ["lm_head", "up_proj"], "none": []}
    for case, names in skipped.items():
        folder = saved(theirs(plain, llm_int8_skip_modules=names), tmp_path / case)
        loaded = load(folder)
        layers_packed = {name for name, module in loaded.named_modules() if isinstance(module, QuantLinear)}
        assert (UP in layers_packed, "lm_head" in layers_packed, len(layers_packed)) == (
            (False, False, 12) if names else (True, True, 15)
        )
        out = tmp_path / f"{case}-out"
        packed_checkpoint.save(loaded, out, AutoTokenizer.from_pretrained(folder), layout="bitsandbytes")
        assert_equal_files(folder, out)
        assert_same(load(out), loaded)
        again = AutoModelForCausalLM.from_pretrained(out)
        layers = {name for name, module in again.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
        assert layers == layers_packed
    with pytest.raises(InputError, match=r"up_proj is a Linear; accepted: a QuantLinear"):
        packed_checkpoint.save(load(tmp_path / "some"), tmp_path / "no")


def test_what_from_pretrained_packed_is_saved_in_either_layout(plain, tmp_path):
    packed = AutoModelForCausalLM.from_pretrained(plain, quantization_config=QBenchConfig("nf4", block=64, dq=True))
    packed_checkpoint.save(packed, tmp_path / "theirs", layout="bitsandbytes")
    AutoTokenizer.from_pretrained(plain).save_pretrained(tmp_path / "theirs")
    assert_same(load(tmp_path / "theirs"), packed)
    packed_checkpoint.save(packed, tmp_path / "ours", AutoTokenizer.from_pretrained(plain))
    packed.save_pretrained(tmp_path / "again")
    assert_equal_files(tmp_path / "ours", tmp_path / "again")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "again")]
    assert configs[0] == configs[1] and configs[0]["quantization_config"]["quant_method"] == "qbench"
    assert_same(load(tmp_path / "ours"), packed)


def test_bytes_kept_as_another_dtype(plain, tmp_path):
    folder = saved(theirs(plain, bnb_4bit_quant_storage=torch.bfloat16), tmp_path / "theirs")
    assert tensors(folder)[f"{UP}.weight"].dtype == torch.bfloat16
    loaded = load(folder)
    assert_same(loaded, in_memory(plain, {"name": "nf4", "block": 64, "dq": True}))
    packed_checkpoint.save(loaded, tmp_path / "ours", layout="bitsandbytes")
    assert_equal_files(folder, tmp_path / "ours")


def test_perplexity_is_that_of_the_format_quantized_here(tmp_path):
    folder = saved(theirs(BUNDLED), tmp_path / "theirs")
    loaded = packed_checkpoint.load(folder, CPU, torch.bfloat16)
    text = data.read("kjv").held_out
    windows = data.windows(text, loaded.tokenizer, loaded.model.config.vocab_size, 128, 4, seed=0)
    ours = loading.load(None, torch.bfloat16, CPU).model
    layers = linear_layers(ours)
    replace_layers(ours, quantizing.quantize(layers, formats.get("nf4", block=64, dq=True)))
    scores, expected = (quality.evaluate(model, windows).metrics() for model in (loaded.model, ours))
    assert scores == expected and 50 < scores["perplexity"] < 200


def test_an_adapter_trained_here_serves_in_plain_peft(tmp_path):
    """On bitsandbytes' model, with the same result as here, and on the 16-bit model."""
    loaded = loading.load(None, torch.bfloat16, CPU)
    text, vocabulary = data.read("kjv"), loaded.model.config.vocab_size
    held_out, training = (
        data.windows(part, loaded.tokenizer, vocabulary, 128, count, seed=0)
        for part, count in ((text.held_out, 3), (text.train, 32))
    )
    targets = linear_layers(loaded.model)
    replace_layers(loaded.model, quantizing.quantize(targets, formats.get("nf4", block=64, dq=True)))
    settings = TuneSettings(steps=8, batch=4, rank=8, lr=1e-2, warmup=1)
    model = adapters.add(loaded.model, list(targets), settings, seed=0)
    train(model, training, settings, seed=0)
    model.save_pretrained(tmp_path)
    sixteen = AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.bfloat16)
    models = {"here": model, "bnb": exact(theirs(BUNDLED)), "before": theirs(BUNDLED), "16 bit": sixteen}
    models |= {key: PeftModel.from_pretrained(models[key], tmp_path).eval() for key in ("bnb", "16 bit")}
    perplexity = {key: quality.evaluate(model, held_out).metrics()["perplexity"] for key, model in models.items()}
    assert perplexity["bnb"] == pytest.approx(perplexity["here"], rel=2e-3)
    assert perplexity["16 bit"] == pytest.approx(perplexity["here"], rel=0.05)
    assert max(perplexity[key] for key in ("here", "bnb", "16 bit")) < 0.8 * perplexity["before"]


def test_neither_bitsandbytes_nor_16_bits_are_needed(plain, tmp_path):
    folder = saved(theirs(plain), tmp_path / "theirs")
    code = f"""
import sys, torch
sys.modules["bitsandbytes"] = None
from pathlib import Path
from qbench import checkpoint
model = checkpoint.load(Path({str(folder)!r}), torch.device("cpu"), torch.bfloat16).model
checkpoint.save(model, Path({str(tmp_path / "ours")!r}), layout="bitsandbytes")
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(packed_checkpoint.__file__).parent.parent)
    assert_equal_files(folder, tmp_path / "ours")


@pytest.fixture(scope="module")
def whole(plain, tmp_path_factory) -> Path:
    return saved(theirs(plain), tmp_path_factory.mktemp("whole"))


@pytest.fixture
def spoiled(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "spoiled"))


def edit(change):
    """A spoiler that changes the tensors of a checkpoint in one file."""

    def spoil(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return spoil


def lost(key: str):
    return edit(lambda state: state.pop(key))


def changed(key: str, change):
    return edit(lambda state: state.update({key: change(state[key]).clone()}))


def state(**changes):
    """A spoiler that changes the JSON of a layer; keys set to ... are left out."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        content = json.loads(bytes(tensor.tolist())) | changes
        content = {key: value for key, value in content.items() if value is not ...}
        return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)

    return changed(STATE, change)


W = f"{UP}.weight"
RENAMED = STATE.replace("nf4", "nf3")
BAD = {
    "no codes": (lost(W), rf"{W} is missing"),
    "no absmax": (lost(f"{W}.absmax"), rf"{W}.absmax is missing"),
    "no nested absmax": (lost(f"{W}.nested_absmax"), rf"{W}.nested_absmax is missing"),
    "no table": (lost(f"{W}.quant_map"), rf"{W}.quant_map is missing"),
    "no nested table": (lost(f"{W}.nested_quant_map"), rf"{W}.nested_quant_map is missing"),
    "no state": (lost(STATE), rf"{STATE} is missing"),
    "two states": (edit(lambda s: s.update({STATE.replace("nf4", "fp4"): s[STATE].clone()})), r"fp4 and .*nf4: not acc"),
    "an unknown type": (edit(lambda s: s.update({RENAMED: s.pop(STATE)})), rf"{RENAMED}: not accepted; one of .*fp4 is"),
    "fewer codes": (changed(W, lambda t: t[1:]), rf"{W} is uint8 \[16383, 1\]; accepted: uint8 \[16384, 1\]"),
    "fewer scales": (changed(f"{W}.absmax", lambda t: t[1:]), rf"{W}.absmax is uint8 \[511\]; accepted: uint8 \[512\]"),
    "scales of another dtype": (changed(f"{W}.absmax", lambda t: t.float()), r"absmax is float32 .*; accepted: uint8"),
    "a half nested absmax": (changed(f"{W}.nested_absmax", lambda t: t.half()), r"nested_absmax is float16"),
    "NaN": (changed(f"{W}.nested_absmax", lambda t: t * torch.nan), rf"{W}.nested_absmax holds NaN or Inf"),
    "a shorter table": (changed(f"{W}.quant_map", lambda t: t[1:]), r"quant_map is float32 \[15\]; .* \[16\]"),
    "another table": (changed(f"{W}.quant_map", lambda t: t * 0.99), rf"{W}.quant_map is not the table of nf4"),
    "another dynamic map": (changed(f"{W}.nested_quant_map", lambda t: t.flip(0)), r"nested_quant_map is not the table"),
    "no JSON": (changed(STATE, lambda t: t[1:]), rf"{STATE}: is not JSON"),
    "no text": (changed(STATE, lambda t: t + 128), rf"{STATE}: is not JSON"),
    "no object": (changed(STATE, lambda t: torch.tensor([49], dtype=torch.uint8)), r"1 is not accepted; an object is"),
    "no quant_type": (state(quant_type=...), r"quant_type: None is not accepted; nf4, fp4 is"),
    "another quant_type": (state(quant_type="fp4"), r"quant_type: 'fp4' is not what its key says"),
    "an unknown quant_type": (state(quant_type="int4"), r"quant_type: 'int4' is not accepted"),
    "another block": (state(blocksize=128), rf"{W}.absmax is uint8 \[512\]; accepted: uint8 \[256\]"),
    "a block that is none": (state(blocksize=48), r"blocksize: 48 is not accepted; 32, 64,"),
    "a block of text": (state(blocksize=[64]), r"blocksize: \[64\] is not accepted"),
    "another shape": (state(shape=[128, 256]), r"shape: \[128, 256\] is not accepted; \[256, 128\] is"),
    "no shape": (state(shape="large"), r"shape: 'large' is not accepted; a list of sizes is"),
    "an unknown dtype": (state(dtype="int8"), r"dtype: 'int8' is not accepted; bfloat16, float16, float32 is"),
    "another nested block": (state(nested_blocksize=128), r"nested_blocksize: 128 is not accepted; 256 is"),
    "another nested dtype": (state(nested_dtype="float16"), r"nested_dtype: 'float16' is not accepted"),
    "an endless offset": (state(nested_offset=float("inf")), r"nested_offset: inf is not accepted; a finite number is"),
    "an offset that is none": (state(nested_offset="0"), r"nested_offset: '0' is not accepted"),
    "no offset": (state(nested_offset=...), r"nested_blocksize is unknown; accepted: quant_type"),
    "more": (state(hidden=1), r"hidden is unknown; accepted: quant_type, blocksize"),
    "no such layer": (edit(lambda s: s.update({"model.a.weight.absmax": torch.ones(1)})), r"model.a is no linear layer"),
    "no norm": (lost("model.norm.weight"), r"model.norm.weight is missing"),
    "8 bits": (lambda f: edit_recipe(f, load_in_8bit=True), r"load_in_8bit, which is LLM.int8, is not supported"),
    "another config": (lambda f: edit_recipe(f, bnb_4bit_quant_type="nf5"), r"bnb_4bit_quant_type: 'nf5' is unknown"),
    "no packed layer": (edit(lambda s: [s.pop(k) for k in list(s) if ".weight." in k]), r"holds no 4-bit weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_loaded_is_named_in_a_line(spoiled, case):
    spoil, message = BAD[case]
    spoil(spoiled)
    with pytest.raises(InputError, match=message) as raised:
        loading.load(str(spoiled), torch.bfloat16, CPU)
    assert "\n" not in str(raised.value)


def test_what_bitsandbytes_does_not_keep_is_named(plain, tmp_path):
    for arguments in ({"name": "int8", "block": 64, "dq": False}, {"name": "nf4", "block": 100, "dq": False}):
        with pytest.raises(
            InputError, match=rf"does not store {arguments['name']}\(block=.*; accepted: nf4 or fp4, block 32"
        ):
            packed_checkpoint.save(in_memory(plain, arguments), tmp_path / "out", layout="bitsandbytes")
    with pytest.raises(InputError, match=r"layout: 'what' is unknown; accepted: qbench, bitsandbytes"):
        packed_checkpoint.save(in_memory(plain), tmp_path / "out", layout="what")
    assert not (tmp_path / "out").exists()


def test_a_run_names_what_can_be_done_with_it(whole):
    with pytest.raises(InputError, match=r"packed already, as nf4 by bitsandbytes with double.*qbench.checkpoint.load"):
        loading.open(str(whole))
    with pytest.raises(InputError, match=r"packed already, as nf4 by bitsandbytes"):
        quantize(whole, whole / "out")


def test_nothing_packed_is_taken_for_a_16_bit_checkpoint(whole):
    with pytest.raises(InputError, match=r"is quantized already, by bitsandbytes; accepted: a 16-bit checkpoint"):
        sixteen_bit.open(str(whole))
