"""Every causal LM of transformers is quantized, fine-tuned and saved, or refused in one line."""

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

import qbench
from experiments import architectures
from qbench.checkpoint import loading
from qbench.model import selection
from qbench.settings import TuneSettings
from qbench.training import adapters

#: and the share of their weights that is quantized, at least and at most
QUICK = {
    "llama": (1, 1),
    "gpt2": (1, 1),
    "gemma": (1, 1),
    "mixtral": (0.1, 0.2),
    "mamba": (0.9, 1),
    "jamba": (0.3, 0.5),
}
#: a step that refuses, and what it says
REFUSED = {
    "zamba": ("run", "is tied to another tensor"),
    "gemma4_assistant": ("run", "gives no logits of tokens alone"),
    "reformer": ("run", "hands no gradient to its layers"),
    "lara_mini": ("save", "is saved in a layout that has no place for packed weights"),
    "inkling2_text": ("save", "is saved in a layout that has no place for packed weights"),
}


@pytest.mark.parametrize("kind", QUICK)
def test_a_model_is_taken_through_all_that_is_done_with_one(kind, tmp_path):
    row = architectures.tried(kind, tmp_path)
    least, most = QUICK[kind]
    assert row.outcome == ("ok" if least == 1 else "told"), row.said
    assert least <= row.share <= most


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_done_with_a_model_is_refused_in_a_line(kind, tmp_path):
    if kind not in architectures.CLASSES:
        pytest.skip("this release of transformers does not know it")
    step, line = REFUSED[kind]
    row = architectures.tried(kind, tmp_path, [step])
    if row.outcome == "not built":
        pytest.skip(f"this release of transformers does not make it: {row.said[0]}")
    assert row.outcome == "refused" and line in row.said[0] and "accepted: " in row.said[0]


def test_a_packed_model_may_be_trained_although_its_own_code_clips_its_weights(tmp_path):
    """Gemma 3n edits weights in training."""
    architectures.build("gemma3n_text", tmp_path)
    model = qbench.pack(loading.load(str(tmp_path), torch.float32, torch.device("cpu")).model, "nf4")
    tokens = torch.arange(20)[None]
    assert model.train()(tokens).logits.isfinite().all()
    assert model.config.altup_coef_clip, "it is saved as it was"


@pytest.mark.thorough
@pytest.mark.parametrize("kind", architectures.CLASSES)
def test_every_model_is_quantized_or_refused_in_a_line(kind, tmp_path):
    """`experiments/architectures.py` runs all steps; these are the fast ones."""
    row = architectures.tried(kind, tmp_path, ("quantize", "save"))
    assert row.outcome != "traceback", row.said


@pytest.mark.parametrize("kind", ["qwen2_moe", "deepseek_v2", "mixtral"])
def test_adapters_of_a_mixture_are_on_its_linear_layers_and_on_nothing_else(kind, tmp_path):
    """PEFT mistakes some layers for old experts and would adapt the 16-bit experts. These layers get no adapter."""
    architectures.build(kind, tmp_path)
    model = loading.load(str(tmp_path), torch.float32, torch.device("cpu")).model
    names = selection.linear_layers(model).keys()
    settings = TuneSettings(rank=2)
    left = adapters.refused_layers(model, names, settings)
    adapted = adapters.add(model, names, settings, seed=0).get_base_model()
    on = {name for name, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)}
    assert on == names - left.keys() and bool(left) == (kind != "mixtral")
