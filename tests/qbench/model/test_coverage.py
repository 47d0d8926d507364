"""Only layers that compute x·Wᵀ + b are quantized; other linear layers stay in 16 bit and are named."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import formats
import qbench
from qbench.model.selection import count_coverage, find_layers_left, is_replaceable, linear_layers, packed_layers
from tests.conftest import VOCABULARY
from tests.qbench.sample_checkpoints import make_sharded

SMALL = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_attention_heads": 4}
EXPERTS = {"intermediate_size": 96, "num_key_value_heads": 2, "num_local_experts": 4}
CONFIGS = {
    "falcon": transformers.FalconConfig(**SMALL, num_hidden_layers=2, bos_token_id=0, eos_token_id=0),  # in parallel
    "falcon, sequential": transformers.FalconConfig(
        **SMALL, num_hidden_layers=2, parallel_attn=False, bias=True, bos_token_id=0, eos_token_id=0
    ),
    "phimoe": transformers.PhimoeConfig(**SMALL, **EXPERTS, num_hidden_layers=1),
    "llama4": transformers.Llama4TextConfig(
        **SMALL, **EXPERTS, num_hidden_layers=2, intermediate_size_mlp=96, head_dim=16
    ),
    "gptj": transformers.GPTJConfig(
        vocab_size=VOCABULARY, n_embd=64, n_layer=1, n_head=4, rotary_dim=8, bos_token_id=0, eos_token_id=0
    ),
}  # fmt: skip
ROUTERS = {
    "phimoe": {"model.layers.0.mlp.router": "PhimoeTopKRouter"},
    "llama4": {f"model.layers.{i}.feed_forward.router": "Llama4Router" for i in (0, 1)},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_models_with_linear_layers_of_their_own(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()
    tokens = torch.arange(20)[None]
    before = model(tokens).logits
    routers = ROUTERS.get(name, {})
    assert find_layers_left(model) == {
        n: f"a {kind} computes something else than x·Wᵀ + b" for n, kind in routers.items()
    }
    coverage = count_coverage(model)
    assert coverage.left.items() >= find_layers_left(model).items() and (coverage.share == 1) == (not coverage.left)
    if routers:
        with pytest.warns(
            UserWarning, match=rf"qbench: Only {100 * coverage.share:.1f}% .* 16 bit: \S+experts.gate_up_proj"
        ):
            qbench.pack(model, "int8", block=32)
        assert count_coverage(model) == coverage, "packed or not"
    else:
        qbench.pack(model, "int8", block=32)
    assert not routers.keys() & packed_layers(model).keys()
    assert (model(tokens).logits - before).norm() < 0.02 * before.norm()
    assert not hasattr(CONFIGS[name], "quantization_config"), "another model may be made from it"
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=list(packed_layers(model)), task_type="CAUSAL_LM"))
    optimizer, losses = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2), []
    for _ in range(4):
        loss = tuned(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


class Renamed(nn.Linear):
    pass


class WithItsOwnProduct(nn.Linear):
    def forward(self, x):
        return (x @ self.weight.T) + (0 if self.bias is None else self.bias)


class WithATuple(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class WithAMask(nn.Linear):
    def forward(self, x, mask):
        return super().forward(x) * mask


class OwnConv1D(Conv1D):
    def forward(self, x):
        return nn.functional.linear(x, self.weight.T, self.bias)


PLAIN = {"linear": nn.Linear, "renamed": Renamed, "own product": WithItsOwnProduct, "conv1d": Conv1D, "own": OwnConv1D}
OTHERS = {"a tuple": WithATuple, "scaled": Scaled, "a mask": WithAMask}


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_layer_is_told_by_what_it_computes(device):
    with torch.device(device):
        assert all(is_replaceable(kind(5, 7)) for kind in PLAIN.values())
        assert is_replaceable(WithItsOwnProduct(5, 7, bias=False))
        assert not any(is_replaceable(kind(5, 7)) for kind in OTHERS.values())
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert is_replaceable(WithItsOwnProduct(5, 7)) and not is_replaceable(Scaled(5, 7))
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(5, 7))
    assert not is_replaceable(parametrized) and not is_replaceable(nn.Conv1d(5, 7, 1))


@pytest.fixture(scope="module")
def with_a_router(tmp_path_factory):
    return make_sharded(CONFIGS["llama4"], tmp_path_factory.mktemp("llama4"))


def test_a_run_names_what_it_leaves(with_a_router, tmp_path):
    options = [f"model.path={with_a_router}", "tune=none", "eval.tokens=256", "data.seq=32", "block=32"]
    done = subprocess.run(
        [sys.executable, "-m", "qbench", "+format=nf4", *options, f"hydra.run.dir={tmp_path}"],
        capture_output=True, text=True, cwd=tmp_path, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    wanted = count_coverage(AutoModelForCausalLM.from_pretrained(with_a_router))
    bits = json.loads((tmp_path / "result.json").read_text())["metrics"]["bits"]
    assert bits["left"] == wanted.left and len(wanted.left) == 6
    assert bits["quantized_parameters"] == wanted.quantized and bits["eligible_parameters"] == wanted.eligible
    sentence = f"Only {100 * wanted.share:.1f}% of the weights are quantized. Left in 16 bit: model.layers.0.feed"
    for text in (done.stderr + done.stdout, (tmp_path / "report.md").read_text().replace("\\", "")):
        assert sentence in " ".join(text.split())


def test_every_linear_layer_of_the_usual_models_is_quantized(any_model):
    model = AutoModelForCausalLM.from_pretrained(any_model)
    assert not find_layers_left(model) and len(linear_layers(model)) > 5
    assert formats.get("nf4").quantize(next(iter(linear_layers(model).values())).weight).bits == 4


ENCODER = {"intermediate_size": 96, "num_hidden_layers": 1}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 1, "n_head": 4}
T5 = {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4}
HEADS = {
    "score": (transformers.LlamaConfig(**SMALL, **ENCODER, pad_token_id=0), "SequenceClassification"),
    "qa_outputs": (transformers.LlamaConfig(**SMALL, **ENCODER), "QuestionAnswering"),
    "classifier": (transformers.RobertaConfig(**SMALL, **ENCODER), "SequenceClassification"),
    "classifier of GPT-2": (transformers.GPT2Config(**GPT2), "TokenClassification"),
    "qa_outputs of T5": (transformers.T5Config(**T5), "QuestionAnswering"),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_head_of_any_task_is_left_and_the_model_is_saved_and_loaded(name, tmp_path):
    config, task = HEADS[name]
    auto, head = getattr(transformers, f"AutoModelFor{task}"), name.partition(" ")[0]
    model = auto.from_config(config).eval()
    model.save_pretrained(tmp_path / "16bit")
    linear = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and head not in n.split(".")]
    qbench.pack(model, "nf4", block=32)
    assert sorted(packed_layers(model)) == sorted(linear) and find_layers_left(model) == {}
    on_the_way = auto.from_pretrained(tmp_path / "16bit", quantization_config=qbench.QBenchConfig("nf4", block=32))
    for i, packed in enumerate((model, on_the_way)):
        packed.save_pretrained(tmp_path / str(i))
        again = auto.from_pretrained(tmp_path / str(i)).state_dict()
        assert all(torch.equal(t, again[n]) for n, t in model.state_dict().items() if torch.is_tensor(t))


@pytest.mark.parametrize("used", [False, True])
def test_weights_that_a_model_changes_in_place_are_packed_as_they_were(used):
    """RWKV would halve some of its weights in its first pass outside of training."""
    torch.manual_seed(0)
    config = transformers.RwkvConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=4, rescale_every=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    name, tokens = "rwkv.blocks.3.attention.output", torch.arange(20)[None]
    weight = model.get_submodule(name).weight.detach().clone()
    logits = model(tokens).logits
    assert not torch.equal(model.get_submodule(name).weight, weight), "or there is nothing to test"
    if not used:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    qbench.pack(model, "int8")
    assert torch.equal(
        packed_layers(model)[name].packed.dequantize(), formats.get("int8").quantize(weight).dequantize()
    )
    assert (model(tokens).logits - logits).norm() < 0.02 * logits.norm()
