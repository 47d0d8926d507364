"""LoRA on packed weights: it learns, touches nothing else, and comes back from disk with the same logits."""

import json

import pytest
import torch

import formats
from qbench import models
from qbench.errors import InputError
from qbench.tune import LoraQuantLinear, TuneSettings, add_lora, load_lora, train

CPU = torch.device("cpu")
SETTINGS = TuneSettings(steps=12, batch=4, rank=8, lr=2e-2, warmup=1)


def quantized(folder, name="nf4", dtype=torch.float32):
    model = models.load(str(folder), dtype, CPU).model
    packed = models.quantize(models.linear_layers(model), formats.get(name, dq=True))
    models.replace(model, packed)
    return model, list(packed)


def windows():
    return torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["nf4", "int4_asym", "none"])
def test_learns_and_reloads(any_model, name, tmp_path):
    base, targets = quantized(any_model, name)
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    untouched = base(input_ids=windows()).logits
    model = add_lora(base, targets, SETTINGS, seed=0)
    assert torch.equal(model(input_ids=windows()).logits, untouched), "B starts at zero"
    adapted = [m for m in model.modules() if isinstance(m, LoraQuantLinear)]
    assert len(adapted) == len(targets)
    log = train(model, windows(), SETTINGS, seed=0)
    assert log.loss[-1] < log.loss[0] - 0.1 and len(log.tokens_s) == 12
    assert log.trainable == sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    model.save_pretrained(tmp_path)
    logits = model(input_ids=windows()).logits

    fresh, _ = quantized(any_model, name)
    after = fresh.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = load_lora(fresh, tmp_path).eval()
    assert torch.equal(again(input_ids=windows()).logits, logits)


def test_accumulation_is_one_batch_in_parts(tiny_llama):
    logs = []
    for parts in (1, 2):
        model, targets = quantized(tiny_llama)
        settings = TuneSettings(steps=4, batch=4, rank=4, accumulate=parts)
        logs.append(train(add_lora(model, targets, settings, 0), windows(), settings, seed=0).loss)
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_schedules(tiny_llama, schedule):
    model, targets = quantized(tiny_llama)
    settings = TuneSettings(steps=10, batch=2, rank=2, schedule=schedule, warmup=2, lr=1e-3)
    lr = train(add_lora(model, targets, settings, 0), windows(), settings, seed=0).lr
    assert lr[0] == 0 and lr[2] == pytest.approx(1e-3)
    assert lr[-1] == pytest.approx(1e-3) if schedule == "constant" else lr[-1] < 3e-4


def test_the_gradient_is_clipped(tiny_llama):
    model, targets = quantized(tiny_llama)
    settings = TuneSettings(steps=2, batch=2, rank=2, clip=1e-9, optimizer="sgd", lr=1.0, warmup=0)
    model = add_lora(model, targets, settings, 0)
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    train(model, windows(), settings, seed=0)
    moved = (
        sum(float((p - before[n]).detach().square().sum()) for n, p in model.named_parameters() if n in before) ** 0.5
    )
    assert 0 < moved < 1e-8


def test_a_paged_optimizer_trains_the_same_and_tells_what_moved(tiny_llama):
    logs = {}
    for name, more in {
        "adamw": {},
        "paged_adamw": {"optimizer_page": "4KiB", "optimizer_budget": "20kB"},
        "paged_adamw_8bit": {"optimizer_page": "4KiB", "optimizer_budget": "20kB"},
    }.items():
        model, targets = quantized(tiny_llama)
        settings = TuneSettings(steps=4, batch=2, rank=64, optimizer=name, weight_decay=0.01, **more)
        logs[name] = train(add_lora(model, targets, settings, 0), windows(), settings, seed=0)
    exact, paged, rounded = logs.values()
    assert paged.loss == exact.loss and paged.grad_norm == exact.grad_norm
    assert rounded.loss == pytest.approx(exact.loss, rel=1e-2)
    assert exact.optimizer == {"peak_bytes": 8 * exact.trainable}
    assert paged.optimizer["peak_bytes"] == rounded.optimizer["peak_bytes"] == 16384
    assert paged.optimizer["pages_in"] == 3 * (paged.optimizer["pages"] - 4) > 0
    assert rounded.optimizer["pages"] < 0.4 * paged.optimizer["pages"]
    json.dumps(paged.optimizer)


def test_a_packed_weight_refuses_to_merge(tiny_llama):
    model, targets = quantized(tiny_llama)
    with pytest.raises(TypeError, match="packed"):
        add_lora(model, targets, SETTINGS, 0).merge_and_unload()


@pytest.mark.parametrize(("key", "value"), [("steps", 0), ("rank", 2.5), ("schedule", "linear"), ("accumulate", 3)])
def test_bad_settings(key, value):
    with pytest.raises(InputError, match=f"tune.{key}"):
        TuneSettings(**{key: value})
