"""Adapters: what a run saves gives what it reported; what cannot work is told before a weight is read."""

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
from qbench import adapters, data, merge, skeleton
from qbench.errors import InputError
from qbench.experiment import run
from qbench.layers import packed_layers
from qbench.measure import quality, throughput
from qbench.settings import DataSettings, EvalSettings, ModelSettings, Settings, TuneSettings
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
    "ia3": {"method": "ia3"},
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
    """On the text that a run scores."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    windows = data.held_out(data.read("kjv"), tokenizer, VOCABULARY, 64, 500)
    return quality.evaluate(model, windows).metrics()["perplexity"]


@pytest.mark.parametrize(
    ("architecture", "tune", "name"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.thorough) for case in OTHERS if case not in QUICK)],
)
def test_what_is_saved_gives_what_was_reported(architecture, tune, name, tmp_path, monkeypatch):
    """Each way that its card tells of: on the packed model, and in plain PEFT on the dequantized one."""
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
