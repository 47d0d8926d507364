"""Trainers of other libraries on a packed model give the losses of PEFT on the dequantized model."""

import importlib.util
import re

import pytest
import torch
import transformers
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

import formats
import qbench
from qbench.checkpoint.location import BUNDLED
from qbench.model.quant_linear import QuantLinear
from qbench.training import data
from qbench.training.lora_layer import LoraQuantLinear

STEPS, SEQ, CLOSE = 20, 48, 1e-3
needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")


class Windows(Dataset):
    """Windows of the bundled text."""

    def __init__(self):
        text = data.read("kjv")
        self.tokens = data.windows(text.train, AutoTokenizer.from_pretrained(BUNDLED), 4096, SEQ, 4 * STEPS, 0)

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, i):
        return {"input_ids": self.tokens[i], "labels": self.tokens[i]}


class Losses(TrainerCallback):
    def __init__(self):
        self.losses: list[float] = []

    def on_log(self, args, state, control, logs, **_):
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def by_trainer(model, windows, trainer_args, folder, trl=False):
    log, adapters = Losses(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    options = trainer_args | {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1,
        "report_to": [], "save_strategy": "no", "use_cpu": True, "seed": 0, "disable_tqdm": True,
    }  # fmt: skip
    torch.manual_seed(0)
    if trl:
        import datasets
        from trl import SFTConfig, SFTTrainer

        rows = datasets.Dataset.from_dict({"input_ids": windows.tokens.tolist()})
        tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
        SFTTrainer(
            model=model, args=SFTConfig(**options), train_dataset=rows, processing_class=tokenizer,
            peft_config=adapters, callbacks=[log],
        ).train()  # fmt: skip
        return log.losses
    model = get_peft_model(model, adapters)
    if trainer_args.get("gradient_checkpointing_kwargs", {}).get("use_reentrant"):
        model.enable_input_require_grads()
    Trainer(model=model, args=TrainingArguments(**options), train_dataset=windows, callbacks=[log]).train()
    assert any(isinstance(module, LoraQuantLinear) for module in model.modules()) == _packed(model)
    return log.losses


def _packed(model):
    return any(isinstance(module, QuantLinear) for module in model.modules())


def by_trl(model, windows, trainer_args, folder):
    return by_trainer(model, windows, trainer_args, folder, trl=True)


def by_accelerate(model, windows, trainer_args, folder):
    """With PEFT's preparation of a packed model."""
    checkpointing = trainer_args.get("gradient_checkpointing_kwargs")
    model = prepare_model_for_kbit_training(model, bool(checkpointing), checkpointing)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    accelerator = Accelerator(
        mixed_precision="bf16" if trainer_args.get("bf16") else "no", cpu=True, gradient_accumulation_steps=2
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(windows, 2))
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model.train()(**batch, use_cache=False).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


WAYS = {"trainer": by_trainer, "accelerate": by_accelerate, "trl": by_trl}
CHECKPOINTING = {
    "kept": {},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "not reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


def compare(path, way, dtype, trainer_args, folder):
    windows, losses = Windows(), []
    for packed in (True, False):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        model = qbench.pack(model, "nf4", block=32, dq=True)
        model = model if packed else model.dequantize()
        losses.append(WAYS[way](model, windows, trainer_args, folder))
    assert len(losses[0]) == (2 * STEPS if way == "accelerate" else STEPS)
    assert losses[0] == pytest.approx(losses[1], abs=CLOSE)
    start, end = (sum(part) for part in (losses[0][:5], losses[0][-5:]))
    assert end < start


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity_warning()


@pytest.mark.parametrize(
    ("dtype", "checkpointing"),
    [
        (torch.float32, "kept"),
        (torch.bfloat16, "kept"),
        (torch.bfloat16, "reentrant"),
        (torch.float32, "not reentrant"),
    ],
)
@pytest.mark.parametrize("way", ["trainer", "accelerate", pytest.param("trl", marks=[needs_trl, pytest.mark.thorough])])
def test_it_trains_as_peft_on_the_dequantized_model(tiny_llama, tmp_path, way, dtype, checkpointing):
    """Under bf16 autocast, with two batches a step."""
    compare(tiny_llama, way, dtype, {"bf16": True} | CHECKPOINTING[checkpointing], tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_autocast(tiny_llama, tmp_path, dtype):
    compare(tiny_llama, "trainer", dtype, {}, tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", ["trainer", "accelerate", pytest.param("trl", marks=needs_trl)])
def test_the_bundled_model_trains_so(tmp_path, way, dtype, checkpointing):
    compare(BUNDLED, way, dtype, {"bf16": True} | CHECKPOINTING[checkpointing], tmp_path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fp16_with_a_scaler(tiny_llama, tmp_path, dtype):
    compare(tiny_llama, "trainer", dtype, {"fp16": True, "use_cpu": False}, tmp_path)


def test_the_parameters_of_packed_layers_are_counted(capsys):
    plain = AutoModelForCausalLM.from_pretrained(BUNDLED)
    weights = plain.num_parameters()
    qbench.pack(plain, "nf4", dq=True)
    assert plain.num_parameters() == weights
    assert plain.num_parameters(exclude_embeddings=True) == weights - plain.model.embed_tokens.weight.numel()
    model = get_peft_model(plain, LoraConfig(r=4, target_modules="all-linear"))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert model.get_nb_trainable_parameters() == (trained, weights + trained)
    model.print_trainable_parameters()
    assert re.search(rf"all params: {weights + trained:,} ", capsys.readouterr().out)


def test_a_model_of_packed_layers_alone(tmp_path):
    torch.manual_seed(0)
    layers = [QuantLinear(formats.get("nf4").quantize(torch.randn(64, 64) / 8)) for _ in range(2)]
    model = get_peft_model(torch.nn.Sequential(*layers), LoraConfig(r=4, target_modules=["0", "1"]))
    x, before = torch.randn(8, 64), None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(5):
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        before = before or loss.item()
    assert loss.item() < before
