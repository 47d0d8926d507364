"""Tiny random models and a text, made once; real architectures, real tokenizers, no network."""

import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # the kernels run on CPU tensors; to be set before anything imports Triton

import transformers
from hypothesis import settings
from transformers import AutoModelForCausalLM, AutoTokenizer

from qbench.checkpoint.location import BUNDLED

settings.register_profile("qbench", deadline=None, print_blob=True)
settings.load_profile("qbench")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes minutes begins first, so that in the end no process waits for another's."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def quiet_loggers():
    """What a command sets up in this process, as --info does, writes to the standard error of its own test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level


VOCABULARY = 4096
ARCHITECTURES = {
    "llama": transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    ),
    "gpt2": transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, n_positions=128),
    "gpt_neox": transformers.GPTNeoXConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    ),
    "qwen2": transformers.Qwen2Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    ),
}  # fmt: skip


def make_model(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name], dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(BUNDLED).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=sorted(ARCHITECTURES))
def any_model(request, tmp_path_factory) -> Path:
    """A folder with a tiny random model of each architecture."""
    return make_model(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    return make_model("llama", tmp_path_factory.mktemp("llama"))
