"""Saved adapters give the reported perplexity, and impossible settings are refused before a weight is read."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import formats
import qbench
from qbench.checkpoint import empty_model, loading, location
from qbench.errors import InputError
from qbench.measure import quality, throughput
from qbench.model.selection import packed_layers
from qbench.runs.experiment import run
from qbench.settings import DataSettings, EvalSettings, ModelSettings, Settings, TuneSettings
from qbench.training import adapters, data, merging
from tests.conftest import ARCHITECTURES, VOCABULARY, make_model

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2}
RECURRENT = {
    "mamba": transformers.MambaConfig(**SMALL, state_size=8),
    "mamba2": transformers.Mamba2Config(**SMALL, state_size=8, num_heads=8, head_dim=16, n_groups=1),
    "falcon_h1": transformers.FalconH1Config(
        **SMALL, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, mamba_d_ssm=64, mamba_n_heads=8,
        mamba_d_head=8, mamba_d_state=8,
    ),
    "rwkv": transformers.RwkvConfig(**SMALL, attention_hidden_size=64),
    "recurrent_gemma": transformers.RecurrentGemmaConfig(
        **SMALL | {"num_hidden_layers": 3}, num_attention_heads=4, lru_width=64, intermediate_size=96
    ),
}  # fmt: skip
TUNES = {
    "lora": {},
    "loftq": {"init": "loftq"},
    "pissa": {"init": "pissa"},
    "dora": {"method": "dora"},
    "dora, pissa": {"method": "dora", "init": "pissa"},
    "rslora": {"method": "rslora"},
    "rslora, loftq": {"method": "rslora", "init": "loftq"},
    "ia3": {"method": "ia3", "lr": 0.5},
    "prefix": {"method": "prefix"},
    "p_tuning": {"method": "p_tuning"},
}
QUICK = [("llama", "pissa", "nf4"), ("gpt2", "lora", "int4_asym"), ("gpt2", "prefix", "nf4")]
OTHERS = [(model, tune, "nf4") for model in ("llama", "gpt2") for tune in TUNES]
OTHERS += [("llama", tune, name) for tune in ("lora", "pissa") for name in ("none", "quantile", "q4_0")]


def settings(path: Path, name: str, **tune) -> Settings:
    return Settings(
        format=formats.get(name, block=32, dq=name == "nf4"),
        model=ModelSettings(path=str(path), dtype="float32"),
        data=DataSettings(seq=64),
        tune=TuneSettings(**{"steps": 4, "batch": 2, "rank": 4, "lr": 2e-2, "warmup": 0, "virtual_tokens": 4} | tune),
        eval=EvalSettings(tokens=500),
        device="cpu",
    )


def perplexity(model, path: Path) -> float:
    """The perplexity on the text that a run scores."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    windows = data.held_out(data.read("kjv"), tokenizer, VOCABULARY, 64, 500)
    return quality.evaluate(model, windows).metrics()["perplexity"]


@pytest.mark.parametrize(
    ("architecture", "tune", "name"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.thorough) for case in OTHERS if case not in QUICK)],
)
def test_saved_adapters_give_the_reported_perplexity(architecture, tune, name, tmp_path, monkeypatch):
    """In both ways of the model card: on the packed model, and with PEFT on the dequantized one."""
    path = make_model(architecture, tmp_path / "model")
    result = run(settings(path, name, **TUNES[tune]), tmp_path / "run")
    scores, adapter = result["metrics"]["quality"], tmp_path / "run" / "adapter"
    assert scores["tuned"]["perplexity"] < 0.99 * scores["quantized"]["perplexity"], "there is something to be lost"
    begun = "init" in TUNES[tune]
    assert (adapter / "base").is_dir() == begun
    if begun:
        assert tmp_path / "run" / result["metrics"]["init"]["base"] == adapter / "base"
    named = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str((adapter / "base" if begun else path).resolve())

    card = ModelCard.load(adapter / "README.md")
    assert card.data.base_model == str(path) and f"| tuned | {scores['tuned']['perplexity']:.2f} |" in card.text
    blocks = re.findall(r"```python\n(.*?)```", card.text, re.S)
    assert len(blocks) == (1 if name == "none" and not begun else 2)
    monkeypatch.chdir(adapter)
    for block, packed in zip(blocks, (name != "none" or begun, False), strict=False):
        loaded: dict = {}
        exec(block, loaded)
        assert bool(packed_layers(loaded["model"])) == packed
        assert perplexity(loaded["model"], path) == pytest.approx(scores["tuned"]["perplexity"], rel=1e-4)


@pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "embed_tokens", "q_proj"], ["embed_tokens"]])
@pytest.mark.parametrize("together", [False, True])
def test_merging_into_a_tied_head_leaves_the_embeddings(targets, together, tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, intermediate_size=96, num_attention_heads=4, tie_word_embeddings=True)
    model = qbench.pack(AutoModelForCausalLM.from_config(config).eval(), "nf4")
    tune = LoraConfig(r=4, target_modules=targets, ensure_weight_tying=together, task_type="CAUSAL_LM")
    model = get_peft_model(model, tune).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    tokens = torch.arange(40)[None]
    apart = model(tokens).logits
    merged = merging.merged(model)
    assert torch.allclose(merged(tokens).logits, apart, atol=1e-3)
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.allclose(again(tokens).logits, apart, atol=1e-3)


def unread(config: transformers.PreTrainedConfig):
    """A model before its weights are read."""
    return empty_model.build_empty(config, torch.float32)


@pytest.mark.parametrize(
    ("architecture", "tune", "line"),
    [
        ("gpt2", {"method": "prefix"}, r"virtual_tokens: 16 and data.seq=120 .* 128 positions; accepted: data.seq=112$"),
        ("gpt2", {"method": "p_tuning", "virtual_tokens": 500}, r"accepted: up to 126$"),
        ("llama", {"method": "prefix", "checkpointing": True}, r"^tune.checkpointing: true .* prefix.* accepted: false$"),
        ("llama", {"rank": 65}, r"^tune.rank: 65 is more than .* accepted: up to 64$"),
        ("mamba2", {"method": "prefix"}, r"^tune.method: prefix does not work on a Mamba2ForCausalLM: .*one of lora, "),
        ("falcon_h1", {"method": "prefix"}, r"^tune.method: prefix does not work on a FalconH1ForCausalLM: Cannot get"),
        ("rwkv", {"method": "p_tuning"}, r"^tune.method: p_tuning does not work on a RwkvForCausalLM: .* full$"),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_before_a_weight_is_read(architecture, tune, line):
    with pytest.raises(InputError, match=line) as raised:
        adapters.check(unread((ARCHITECTURES | RECURRENT)[architecture]), TuneSettings(**tune), 120)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("tune", sorted(TUNES))
def test_possible_settings_are_accepted(architecture, tune):
    model = unread(ARCHITECTURES[architecture])
    before = {name: type(module) for name, module in model.named_modules()}
    random = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "qbench: ")
        assert adapters.check(model, TuneSettings(**TUNES[tune], checkpointing=tune != "prefix"), 64) == {}
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("architecture", "left"),
    [("mamba", {"out_proj": "PEFT puts no LoRA", "dt_proj": "never calls it"}),
     ("mamba2", {"out_proj": "PEFT puts no LoRA"}), ("falcon_h1", {"out_proj": "PEFT puts no LoRA"}),
     ("rwkv", {}), ("recurrent_gemma", {})],
)  # fmt: skip
def test_models_without_a_kv_cache_are_tuned_and_untuned_layers_are_named(architecture, left, tmp_path, capsys):
    torch.manual_seed(0)
    path = tmp_path / "model"
    AutoModelForCausalLM.from_config(RECURRENT[architecture], dtype=torch.bfloat16).save_pretrained(path)
    AutoTokenizer.from_pretrained(location.BUNDLED).save_pretrained(path)
    result = run(settings(path, "nf4"), tmp_path / "run")
    warned = re.findall("qbench: No adapter on .*", capsys.readouterr().err)
    untuned = result["metrics"]["tune"]["left"]
    assert result["status"] == "done" and len(warned) == bool(left)
    assert {name.rpartition(".")[2] for name in untuned} == left.keys()
    assert all(left[name.rpartition(".")[2]] in why for name, why in untuned.items())
    rates = result["metrics"]["throughput"]
    for stage in (rates, rates["baseline"], rates["tuned"]):
        assert stage["prefill_tokens_s"] and (stage["decode_tokens_s"] is None) == ("untimed" in stage)
    reason = rates.get("untimed", {}).get("decode_tokens_s", "")
    assert reason == ("a RecurrentGemmaForCausalLM gives no cache to go on from" if "gemma" in architecture else "")


def test_a_failed_decode_is_reported_and_the_other_rates_are_kept():
    """Whatever error a model raises for its cache."""
    model = AutoModelForCausalLM.from_config(ARCHITECTURES["llama"]).eval()
    forward = model.forward

    def forgetful(**given):
        if given.get("use_cache") and given["input_ids"].shape[1] == 1:
            raise TypeError("no such cache\nand more")
        return forward(**given)

    model.forward = forgetful
    rates = throughput.generation_rates(model, torch.arange(40), prefills=1)
    assert rates["untimed"] == {"decode_tokens_s": "no such cache"} and rates["decode_tokens_s"] is None
    assert rates["prefill_tokens_s"]["median"] > 0 and [row["rows"] for row in rates["by_rows"]] == [1, 4, 16, 40]


def test_an_adapter_beside_a_model_is_used_only_when_asked_for(tiny_llama, tmp_path):
    """A run measures the model alone, as if the adapter were absent; a packed model with an adapter is refused."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    tokens = torch.arange(40)[None]
    alone = model(tokens).logits
    for name, packed in (("16bit", False), ("packed", True)):
        base = qbench.pack(model, "nf4") if packed else model
        folder = tmp_path / name
        base.save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
        adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        nn.init.normal_(adapted.get_parameter("base_model.model.model.layers.0.self_attn.q_proj.lora_B.default.weight"))
        adapted.save_pretrained(folder)
        model = adapted.unload()
    loaded = loading.load(str(tmp_path / "16bit"), torch.float32, torch.device("cpu")).model
    assert torch.equal(loaded(tokens).logits, alone)
    with pytest.raises(
        InputError, match=r"packed holds adapter_config.json too; accepted: the model alone, and .*load"
    ):
        loading.load(str(tmp_path / "packed"), torch.float32, torch.device("cpu"))
