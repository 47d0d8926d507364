"""Every entry refuses an incomplete 16-bit checkpoint and runs none of its code; a hub id is read from the cache."""

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import qbench
from qbench.checkpoint import loading, location, packed_checkpoint
from qbench.checkpoint.streaming import source
from qbench.errors import InputError
from qbench.model.selection import packed_layers
from tests.conftest import make_model

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]
WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tiny_llama, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def rewrite(folder: Path, change) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(change(tensors), folder / WEIGHTS, {"format": "pt"})


def reconfigure(folder: Path, **keys: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | keys))


def run(folder: Path) -> None:
    qbench.run("nf4", model=folder, tune=None, eval={"tokens": 256}, out=folder / "run")


ENTRIES = {
    "load": lambda folder: loading.load(str(folder), torch.float32, CPU),
    "quantize": lambda folder: source.read_source(str(folder)),
    "run": run,
}


def expect_one_line(folder: Path, entry: str, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern) as raised:
        ENTRIES[entry](folder)
    assert "\n" not in str(raised.value)


def without(name: str):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


DAMAGE = {
    "one is missing": (without(UP), {}, f"missing {UP}$"),
    "one more": (lambda t: t | {"x": torch.zeros(3)}, {}, "left over x$"),
    "misshapen": (lambda t: t | {UP: torch.zeros(95, 64)}, {}, rf"{re.escape(UP)} is \[95, 64\], not \[96, 64\]"),
    "fewer layers": (None, {"num_hidden_layers": 1}, r"left over model.layers.1.\S+ and 8 more"),
    "more layers": (None, {"num_hidden_layers": 3}, r"missing model.layers.2.\S+ and 8 more"),
    "another width": (None, {"intermediate_size": 64}, r"is \[64, 96\], not \[64, 64\]"),
    "another architecture": (
        None,
        {"model_type": "gpt_neox"},
        "not those of a GPTNeoXForCausalLM: missing .*; left over",
    ),
    "unknown names": (lambda t: {f"their.{name}": tensor for name, tensor in t.items()}, {}, "left over their"),
    "adapters beside": (
        lambda t: (
            {f"base_model.model.{n.replace('proj.', 'proj.base_layer.')}": v for n, v in t.items()}
            | {"base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight": torch.zeros(4, 64)}
        ),
        {},
        "left over .*lora_A",
    ),
    "quantized by others": (None, {"quantization_config": {"quant_method": "gptq"}}, "quantized already, by gptq"),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_from_pretrained_would_fill_in_is_refused(damage, entry, folder):
    change, keys, pattern = DAMAGE[damage]
    if change:
        rewrite(folder, change)
    reconfigure(folder, **keys)
    expect_one_line(folder, entry, pattern)


WRAPPED = {
    "torch.compile": lambda name: f"_orig_mod.{name}",
    "torch.compile of the inner model": lambda name: name.replace("model.", "model._orig_mod."),
    "DistributedDataParallel": lambda name: f"module.{name}",
    "DistributedDataParallel and torch.compile": lambda name: f"module._orig_mod.{name}",
    "PEFT": lambda name: f"base_model.model.{name.replace('_proj.', '_proj.base_layer.')}",
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_the_prefixes_of_wrappers_are_removed_with_a_warning(wrapper, folder, tiny_llama):
    rewrite(folder, lambda tensors: {WRAPPED[wrapper](name): tensor for name, tensor in tensors.items()})
    with pytest.warns(UserWarning, match=f"qbench: .*{wrapper.removesuffix(' of the inner model')}"):
        state = loading.load(str(folder), torch.bfloat16, CPU).model.state_dict()
    expected = loading.load(str(tiny_llama), torch.bfloat16, CPU).model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    with pytest.warns(UserWarning, match="are removed"):
        assert source.read_source(str(folder)).dtypes == source.read_source(str(tiny_llama)).dtypes


def test_what_was_taken_off_is_in_the_result(folder, capsys):
    rewrite(folder, lambda tensors: {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()})
    result = qbench.run("nf4", model=folder, tune=None, eval={"tokens": 256}, out=folder / "run")
    assert "prefixes of torch.compile, which are removed" in capsys.readouterr().err
    assert result["run"]["model"] == {"commit": None, "wrappers": ["torch.compile"]}


def test_a_mixture_whose_experts_are_merged_is_whole_or_refused(tmp_path):
    config = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=4096, num_local_experts=4,
    )  # fmt: skip
    folder = make_model("llama", tmp_path)  # its tokenizer
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    state = loading.load(str(folder), torch.bfloat16, CPU).model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.warns(
        UserWarning, match=r"qbench: Only 14.\d% of the weights are quantized. Left in 16 bit: .*experts"
    ):
        qbench.pack(model, "nf4")
    model.save_pretrained(tmp_path / "packed")
    with pytest.warns(UserWarning, match="Only 14"):
        packed = transformers.AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=qbench.QBenchConfig("nf4"), dtype=torch.bfloat16
        )
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.bfloat16)
    expert = "model.layers.1.mlp.experts.down_proj"
    for name in (expert, "model.layers.1.self_attn.q_proj.codes"):
        assert torch.equal(again.state_dict()[name], model.state_dict()[name])
        assert torch.equal(packed.state_dict()[name], model.state_dict()[name])
    coverage = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["coverage"]
    assert coverage["quantized"] < 0.15 * coverage["eligible"] and expert in coverage["left"]
    rewrite(folder, without("model.layers.1.block_sparse_moe.experts.2.w2.weight"))
    with pytest.raises(InputError, match=expert):
        loading.load(str(folder), torch.bfloat16, CPU)
    with pytest.raises(InputError, match=expert):
        source.read_source(str(folder))


def test_files_of_pytorch_are_read_and_nothing_in_them_is_run(folder, tiny_llama, tmp_path):
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    state = loading.load(str(folder), torch.bfloat16, CPU).model.state_dict()
    expected = loading.load(str(tiny_llama), torch.bfloat16, CPU).model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    for entry in ENTRIES:
        expect_one_line(folder, entry, "no whole file of tensors|holds no weights")
    assert not (tmp_path / "ran").exists()


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


CODE = """
import pathlib
pathlib.Path(__file__).with_name("ran").touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "theirs"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
MAPS = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_of_a_checkpoint_is_not_run_whatever_standard_input_says(entry, part, folder, tmp_path, monkeypatch):
    (folder / "code.py").write_text(CODE.replace("__file__", repr(str(tmp_path / "x"))))
    if part == "model":
        reconfigure(folder, model_type="theirs", auto_map=MAPS)
    else:
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings |= {"auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}, "tokenizer_class": "Theirs"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    if part == "tokenizer" and entry == "quantize":  # which does without
        ENTRIES[entry](folder)
    else:
        expect_one_line(folder, entry, "needs code of its own.*trust_remote_code=true")
    assert not (tmp_path / "ran").exists()


def test_code_is_run_where_the_user_says_so(folder, tmp_path, monkeypatch):
    (folder / "code.py").write_text(CODE.replace("__file__", repr(str(tmp_path / "x"))))
    reconfigure(folder, model_type="theirs", auto_map=MAPS)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    keys = {"path": str(folder), "trust_remote_code": True}
    result = qbench.run("nf4", model=keys, tune=None, eval={"tokens": 256}, out=tmp_path / "run")
    assert result["config"]["model"]["trust_remote_code"] is True and (tmp_path / "ran").exists()


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_config_fetches_no_kernels(entry, key, folder):
    for value in ("evil/kernel", {"": "evil/kernel@main"}):
        reconfigure(folder, **{key: value})
        expect_one_line(folder, entry, f"{key}: 'evil/kernel.*' would fetch code")


UNBOUNDED = [
    {"num_hidden_layers": 10**7},
    {"num_labels": 10**9},
    {"intermediate_size": 10**15},
    {"vocab_size": 10**12},
    {"num_attention_heads": 10**9},
]


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("keys", UNBOUNDED, ids=str)
def test_no_more_is_built_than_the_file_holds(entry, keys, folder):
    reconfigure(folder, **keys)
    expect_one_line(folder, entry, f"{next(iter(keys))}: {next(iter(keys.values()))} is not accepted")


def test_tables_out_of_proportion_are_not_computed(tmp_path):
    config = transformers.GPTJConfig(vocab_size=4096, n_embd=64, n_layer=2, n_head=4, rotary_dim=8)
    folder = make_model("llama", tmp_path)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    loading.load(str(folder), torch.bfloat16, CPU)
    reconfigure(folder, n_positions=10**12)
    with pytest.raises(InputError, match="asks for tables of"):
        loading.load(str(folder), torch.bfloat16, CPU)


def test_a_packed_checkpoint_asks_for_no_more_than_it_holds(folder, tmp_path):
    model = loading.load(str(folder), torch.bfloat16, CPU).model
    packed_checkpoint.save(qbench.pack(model, "nf4"), tmp_path / "packed")
    reconfigure(tmp_path / "packed", num_hidden_layers=10**7)
    with pytest.raises(InputError, match="num_hidden_layers: 10000000 is not accepted"):
        packed_checkpoint.load(tmp_path / "packed", CPU, torch.bfloat16, tokenizer=folder)


COMMITS = {"main": "a" * 40, "v1": "b" * 40, "dev": "c" * 40}


@pytest.fixture
def hub(tiny_llama, tmp_path, monkeypatch) -> str:
    """Put a model into the hub's cache, as a download does: three commits, a tag and a branch. Returns its id."""
    root = tmp_path / "hub" / "models--someone--tiny"
    (root / "refs").mkdir(parents=True)
    (root / "blobs").mkdir()
    for number, (ref, commit) in enumerate(COMMITS.items()):
        (root / "refs" / ref).write_text(commit)
        (root / "snapshots" / commit).mkdir(parents=True)
        changed = shutil.copytree(tiny_llama, tmp_path / ref)
        rewrite(changed, lambda tensors, number=number: {n: t * (1 + number) for n, t in tensors.items()})
        for file in changed.iterdir():
            blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            blob.write_bytes(file.read_bytes())
            (root / "snapshots" / commit / file.name).symlink_to(Path("../../blobs") / blob.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    location._download_snapshot.cache_clear()
    yield "someone/tiny"
    location._download_snapshot.cache_clear()


@pytest.mark.parametrize("revision", [None, "main", "v1", "dev", "b" * 40])
def test_a_hub_id_is_its_revision_in_the_cache(hub, revision, tiny_llama):
    commit = COMMITS.get(revision or "main", revision)
    factor = 1 + list(COMMITS.values()).index(commit)
    assert location.find_commit(hub, revision) == loading.digest(hub, revision) == commit
    model = loading.load(hub, torch.float32, CPU, revision).model
    expected = loading.load(str(tiny_llama), torch.float32, CPU).model.state_dict()
    assert all(torch.allclose(model.state_dict()[n], factor * t, rtol=1e-2) for n, t in expected.items())
    assert model.config.name_or_path == hub


def test_a_run_of_a_hub_id_tells_its_commit(hub, tmp_path):
    """Offline, by the command, in its own process."""
    words = [
        f"model.path={hub}",
        "model.revision=v1",
        "tune=none",
        "eval.tokens=256",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "qbench", "+format=nf4", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "done" and result["run"]["model"]["commit"] == COMMITS["v1"]


@pytest.mark.parametrize("hub_id, revision", [("someone/other", None), ("someone/tiny", "no-such-tag")])
def test_what_the_cache_lacks_is_one_line(hub, hub_id, revision):
    with pytest.raises(InputError, match=rf"model.path: '{hub_id}' at {revision or 'main'} cannot be loaded") as raised:
        loading.load(hub_id, torch.float32, CPU, revision)
    assert "\n" not in str(raised.value)


def test_only_one_module_asks_transformers_to_read_a_checkpoint():
    """Every call of an Auto class must say whether code of a checkpoint may run; the default would ask the user."""
    for file in [*(ROOT / "qbench").rglob("*.py"), *(ROOT / "formats").rglob("*.py")]:
        text = re.sub(r'""".*?"""', "", file.read_text(), flags=re.S)
        for call in re.findall(r"Auto\w+\.from_pretrained\((?:[^()]|\([^()]*\))*\)", text):
            assert "trust_remote_code=" in call, f"{file}: {call}"


def test_the_readme_of_a_packed_folder_says_how_it_is_loaded(folder, tmp_path):
    model = qbench.pack(loading.load(str(folder), torch.bfloat16, CPU).model, "nf4", dq=True)
    packed_checkpoint.save(model, tmp_path / "packed")
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "nf4(block=64, dq=True)" in card and "100.0% of the weights" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    code = code.replace("this folder", str(tmp_path / "packed"))
    code += """
from qbench.model.selection import packed_layers
print(float(model.lm_head.weight.sum()))
print(float(sum(layer.packed.dequantize().float().sum() for layer in packed_layers(model).values())))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head, total = map(float, done.stdout.split())
    assert head == float(model.lm_head.weight.sum())
    assert total == float(sum(layer.packed.dequantize().float().sum() for layer in packed_layers(model).values()))


@pytest.mark.parametrize("layout", packed_checkpoint.LAYOUTS)
def test_finite_scales_that_decode_to_infinity_are_refused(layout, folder, tmp_path):
    model = qbench.pack(loading.load(str(folder), torch.bfloat16, CPU).model, "nf4")
    packed_checkpoint.save(model, tmp_path / "packed", loading.open(str(folder)).tokenizer, layout=layout)
    key = "model.layers.0.mlp.up_proj." + {"qbench": "scale", "bitsandbytes": "weight.absmax"}[layout]
    rewrite(tmp_path / "packed", lambda tensors: tensors | {key: torch.full_like(tensors[key], 3.4e38)})
    with pytest.raises(InputError, match=r"model.layers.0.mlp.up_proj decodes to NaN or Inf in bfloat16"):
        packed_checkpoint.load(tmp_path / "packed", CPU, torch.bfloat16)
