"""LoRA on packed weights learns, changes nothing else, and reloads from disk with the same logits."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import formats
from qbench.checkpoint import loading
from qbench.errors import InputError
from qbench.model import quantizing
from qbench.model.quant_linear import QuantLinear
from qbench.model.replacement import replace_layers
from qbench.model.selection import linear_layers, weight_of
from qbench.settings import METHODS, TuneSettings
from qbench.training import adapters, lora_init, merging
from qbench.training.loop import _training_order, train
from qbench.training.lora_layer import LoraQuantLinear
from qbench.training.losses import logits_of, next_token_loss

CPU = torch.device("cpu")
SETTINGS = TuneSettings(steps=12, batch=4, rank=8, lr=2e-2, warmup=1)


def quantized(folder, name="nf4", dtype=torch.float32):
    model = loading.load(str(folder), dtype, CPU).model
    packed = quantizing.quantize(linear_layers(model), formats.get(name, dq=True))
    replace_layers(model, packed)
    return model, list(packed)


def windows():
    return torch.randint(0, 64, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["nf4", "int4_asym", "none"])
def test_learns_and_reloads(any_model, name, tmp_path):
    base, targets = quantized(any_model, name)
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    untouched = base(input_ids=windows()).logits
    model = adapters.add(base, targets, SETTINGS, seed=0)
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
    again = adapters.load(fresh, tmp_path).eval()
    assert torch.equal(again(input_ids=windows()).logits, logits)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns(any_model, method, tmp_path):
    """The packed weights do not change, and a reloaded adapter gives the same logits."""
    base, targets = quantized(any_model, "none" if method == "full" else "nf4")
    settings = TuneSettings(method=method, steps=12, batch=4, rank=8, virtual_tokens=4, lr=2e-2, warmup=1)
    kept = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model = adapters.add(base, targets, settings, seed=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)
    log = train(model, windows(), settings, seed=0)
    assert log.loss[-1] < log.loss[0] and log.trainable == sum(p.numel() for p in trained)
    logits = logits_of(model, windows())
    assert logits.shape[:2] == windows().shape
    model.save_pretrained(tmp_path)
    if method == "full":
        assert not any(isinstance(layer, QuantLinear) for layer in model.modules())
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert torch.allclose(logits_of(again, windows()), logits, atol=1e-5)
        return
    fresh, _ = quantized(any_model)
    after = fresh.state_dict()
    assert all(torch.equal(kept[key], after[key]) for key in kept)
    assert torch.allclose(logits_of(adapters.load(fresh, tmp_path).eval(), windows()), logits, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "ia3"])
def test_what_it_saves_is_plain_peft(any_model, method, tmp_path):
    """Without qbench, PEFT on a model with the dequantized weights gives the same logits, to 1e-5."""
    base, targets = quantized(any_model)
    weights = {name: base.get_submodule(name).weight for name in targets}
    model = adapters.add(base, targets, TuneSettings(method=method, rank=8), seed=0)
    train(model, windows(), TuneSettings(method=method, steps=12, batch=4, rank=8, lr=2e-2, warmup=1), seed=0)
    model.save_pretrained(tmp_path)
    logits = logits_of(model, windows())
    plain = loading.load(str(any_model), torch.float32, CPU).model
    for name in targets:
        weight_of(plain.get_submodule(name)).data.copy_(weights[name])
    plain = PeftModel.from_pretrained(plain, tmp_path).eval()
    assert torch.allclose(logits_of(plain, windows()), logits, rtol=0, atol=1e-5)


def ragged(lengths):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (n,), generator=generator) for n in lengths]


def gradients(model, examples, **settings):
    """The gradients of one step without clipping, computed from the change that SGD makes."""
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    train(model, examples, TuneSettings(steps=1, lr=1.0, optimizer="sgd", clip=1e9, warmup=0, **settings), seed=0)
    return {name: before[name] - p for name, p in model.named_parameters() if name in before}


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_a_batch_of_documents_is_the_mean_over_its_targets(tiny_llama, accumulate):
    """Padding and accumulation do not matter: the gradient is that of each document alone, in fp32."""
    examples = ragged([5, 32, 9, 17])
    model, targets = quantized(tiny_llama)
    model = adapters.add(model, targets, SETTINGS, seed=0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02, generator=torch.Generator().manual_seed(0))
    total = sum(next_token_loss(logits_of(model, e[None]), e[None]) * (len(e) - 1) for e in examples) / sum(
        len(e) - 1 for e in examples
    )
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))
    batched = gradients(model, examples, batch=4, accumulate=accumulate, group_by_length=True)
    for name in parameters:
        assert torch.allclose(batched[name], expected[name], rtol=1e-3, atol=1e-6), name


def test_batches_have_examples_of_like_length(tiny_llama):
    """Then less is padded; each example still comes once an epoch, and the seed decides the order."""
    lengths = [4 + 7 * i % 29 for i in range(101)]
    settings = TuneSettings(steps=25, batch=4, group_by_length=True)
    order = _training_order(lengths, settings, seed=0)
    assert order == _training_order(lengths, settings, seed=0) != _training_order(lengths, settings, seed=1)
    assert len(set(order)) == 100
    spread = [max(b) - min(b) for b in ([lengths[i] for i in order[k : k + 4]] for k in range(0, 100, 4))]
    assert sorted(spread)[12] <= 4
    model, targets = quantized(tiny_llama)
    model = adapters.add(model, targets, SETTINGS, seed=0)
    grouped, shuffled = (
        train(model, ragged(lengths), TuneSettings(steps=25, batch=4, group_by_length=grouped), 0).padding
        for grouped in (True, False)
    )
    assert 0 < grouped < 0.5 * shuffled


def test_fewer_examples_than_a_batch(tiny_llama):
    assert len(_training_order([3, 4], TuneSettings(steps=5, batch=4, group_by_length=True), 0)) >= 20


def test_checkpointing_changes_only_memory(tiny_llama):
    logs = []
    for checkpointing in (False, True):
        model, targets = quantized(tiny_llama)
        settings = TuneSettings(steps=4, batch=4, rank=4, checkpointing=checkpointing)
        logs.append(train(adapters.add(model, targets, settings, 0), windows(), settings, seed=0).loss)
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)


@pytest.mark.parametrize("name", formats.names())
@pytest.mark.parametrize("init", ["loftq", "pissa"])
def test_a_start_is_nearer_than_the_format_alone(name, init):
    w = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    w += 3 * torch.outer(w[:, 0], w[0]) / 10  # PiSSA needs weights with large singular values
    fmt = formats.get(name, block=32)
    start = lora_init.initialize(w.bfloat16(), fmt, rank=8, init=init, rounds=3)
    assert start.packed.dtype == torch.bfloat16 and start.a.shape == (8, 128) and start.b.shape == (96, 8)
    alone = (w.bfloat16().float() - fmt.quantize(w.bfloat16()).dequantize(torch.float32)).norm()
    left = (w.bfloat16().float() - start.dequantize()).norm()
    assert left < alone or (name == "none" and left < 2**-8 * w.norm()), "16 bit has no error to make up for"


def test_loftq_is_its_algorithm():
    w = torch.randn(40, 64, dtype=torch.float64)
    fmt, a, b = formats.get("nf4", block=32), 0, 0
    errors = []
    for _ in range(4):
        q = fmt.quantize((w - (b @ a if torch.is_tensor(b) else 0)).float()).dequantize(torch.float32).double()
        u, s, vh = torch.linalg.svd(w - q, full_matrices=False)
        b, a = u[:, :6] * s[:6].sqrt(), s[:6].sqrt()[:, None] * vh[:6]
        errors.append((w - q - b @ a).norm())
    start = lora_init.initialize(w.float(), fmt, rank=6, init="loftq", rounds=4)
    assert float((w - start.dequantize()).norm()) == pytest.approx(float(min(errors)), rel=1e-4)


def test_low_rank_of_a_large_matrix():
    m = torch.randn(1100, 12) @ torch.randn(12, 1200) + 0.01 * torch.randn(1100, 1200)
    b, a = lora_init.low_rank(m, 8)
    s = torch.linalg.svdvals(m)
    assert float((m - b @ a).norm()) == pytest.approx(float(s[8:].norm()), rel=1e-3)
    assert all(torch.equal(x, y) for x, y in zip((b, a), lora_init.low_rank(m, 8), strict=True))


def test_a_model_starts_from_the_starts_of_its_layers(tiny_llama):
    """Q + B·A through PEFT is the product with the matrix, whatever the scaling."""
    model = loading.load(str(tiny_llama), torch.float32, CPU).model
    layers = linear_layers(model)
    fmt = formats.get("int4")
    starts = {n: lora_init.initialize(layer.weight, fmt, 8, "loftq", 2) for n, layer in layers.items()}
    replace_layers(model, {n: start.packed for n, start in starts.items()})
    settings = TuneSettings(rank=8, alpha=24, init="loftq", dropout=0.5)
    adapted = adapters.add(model, list(starts), settings, 0, starts).eval()
    name = "model.layers.1.mlp.up_proj"
    layer = adapted.base_model.model.get_submodule(name)
    x = torch.randn(5, layer.in_features)
    assert torch.allclose(layer(x), x @ starts[name].dequantize().t(), atol=1e-4)


def test_lora_learns_also_if_there_is_no_error_to_start_from(tiny_llama):
    """On 16 bit LoftQ gives zeros; with A = B = 0 no gradient would flow."""
    model = loading.load(str(tiny_llama), torch.float32, CPU).model
    layers = linear_layers(model)
    fmt = formats.get("none")
    starts = {n: lora_init.initialize(layer.weight, fmt, 8, "loftq", 2) for n, layer in layers.items()}
    assert not any(start.a.any() or start.b.any() for start in starts.values())
    replace_layers(model, quantizing.quantize(layers, fmt))
    log = train(adapters.add(model, list(starts), SETTINGS, 0, starts), windows(), SETTINGS, seed=0)
    assert log.loss[-1] < log.loss[0] - 0.1


@pytest.mark.parametrize("method", ["lora", "dora", "rslora"])
def test_merged_is_the_sum(any_model, method):
    base, targets = quantized(any_model)
    settings = TuneSettings(method=method, steps=4, batch=4, rank=8, lr=1e-2, warmup=0)
    model = adapters.add(base, targets, settings, seed=0)
    train(model, windows(), settings, seed=0)
    apart = logits_of(model, windows())
    with merging.quantized_adapters(model, formats.get("int8")) as held:
        assert 0 < held < sum(p.nbytes for n, p in model.named_parameters() if "lora_" in n) / 3
        near = logits_of(model, windows())
        assert 0 < (near - apart).abs().max() < 0.1
    assert torch.equal(logits_of(model, windows()), apart)
    merged = merging.merged(model)
    assert not any(isinstance(m, QuantLinear | LoraQuantLinear) for m in merged.modules())
    assert torch.allclose(logits_of(merged, windows()), apart, atol=1e-3)
    again = merging.requantized(merged, targets, formats.get("nf4", dq=True))
    assert sum(isinstance(m, QuantLinear) for m in again.modules()) == len(targets)
    assert (logits_of(again, windows()) - apart).abs().max() > 1e-3, "what passes through 4 bits loses something"


def test_a_rank_above_that_of_a_layer(tiny_llama):
    layers = linear_layers(loading.load(str(tiny_llama), torch.float32, CPU).model)
    adapters.check_rank(layers, TuneSettings(rank=64))
    with pytest.raises(InputError, match=r"tune.rank: 65 is more than .* accepted: up to 64"):
        adapters.check_rank(layers, TuneSettings(rank=65))


def test_accumulation_gives_the_losses_of_one_batch(tiny_llama):
    logs = []
    for parts in (1, 2):
        model, targets = quantized(tiny_llama)
        settings = TuneSettings(steps=4, batch=4, rank=4, accumulate=parts)
        logs.append(train(adapters.add(model, targets, settings, 0), windows(), settings, seed=0).loss)
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_schedules(tiny_llama, schedule):
    model, targets = quantized(tiny_llama)
    settings = TuneSettings(steps=10, batch=2, rank=2, schedule=schedule, warmup=2, lr=1e-3)
    lr = train(adapters.add(model, targets, settings, 0), windows(), settings, seed=0).lr
    assert lr[0] == 0 and lr[2] == pytest.approx(1e-3)
    assert lr[-1] == pytest.approx(1e-3) if schedule == "constant" else lr[-1] < 3e-4


def test_the_gradient_is_clipped(tiny_llama):
    model, targets = quantized(tiny_llama)
    settings = TuneSettings(steps=2, batch=2, rank=2, clip=1e-9, optimizer="sgd", lr=1.0, warmup=0)
    model = adapters.add(model, targets, settings, 0)
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    train(model, windows(), settings, seed=0)
    moved = (
        sum(float((p - before[n]).detach().square().sum()) for n, p in model.named_parameters() if n in before) ** 0.5
    )
    assert 0 < moved < 1e-8


def test_a_paged_optimizer_trains_the_same_and_reports_its_paging(tiny_llama):
    logs = {}
    for name, more in {
        "adamw": {},
        "paged_adamw": {"optimizer_page": "4KiB", "optimizer_budget": "20kB"},
        "paged_adamw_8bit": {"optimizer_page": "4KiB", "optimizer_budget": "20kB"},
    }.items():
        model, targets = quantized(tiny_llama)
        settings = TuneSettings(steps=4, batch=2, rank=64, optimizer=name, weight_decay=0.01, **more)
        logs[name] = train(adapters.add(model, targets, settings, 0), windows(), settings, seed=0)
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
        adapters.add(model, targets, SETTINGS, 0).merge_and_unload()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 0),
        ("rank", 2.5),
        ("schedule", "linear"),
        ("accumulate", 3),
        ("method", "loha"),
        ("init", "zero"),
        ("group_by_length", "yes"),
        ("merge", 1),
    ],
)
def test_bad_settings(key, value):
    with pytest.raises(InputError, match=f"tune.{key}"):
        TuneSettings(**{key: value})
