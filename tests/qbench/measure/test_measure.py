"""Measures against simple references in float64."""

import math
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from scipy import stats

import formats
from qbench.checkpoint import loading
from qbench.measure import distribution, error, quality, statistics, throughput
from qbench.measure.live_tensors import DECODED, LiveBytes
from qbench.model import quantizing
from qbench.model.replacement import replace_layers
from qbench.model.selection import linear_layers

CPU = torch.device("cpu")


@pytest.fixture
def llama(tiny_llama):
    return loading.load(str(tiny_llama), torch.float32, CPU).model


def windows(n=6, seq=24):
    return torch.randint(0, 4096, (n, seq), generator=torch.Generator().manual_seed(0))


def logits_in(folder):
    return quality.BaselineLogits(tempfile.TemporaryFile(dir=folder))


def test_quality_against_float64(llama, tmp_path):
    tokens = windows()
    logits = logits_in(tmp_path)
    baseline = quality.evaluate(llama, tokens, logits, is_baseline=True)
    before = llama(input_ids=tokens).logits[:, :-1].double().log_softmax(-1)
    layers = linear_layers(llama)
    replace_layers(llama, quantizing.quantize(layers, formats.get("fp4_e3m0")))
    scores = quality.evaluate(llama, tokens, logits)
    after = llama(input_ids=tokens).logits[:, :-1].double().log_softmax(-1)

    def nll(log_p):
        return -log_p.gather(-1, tokens[:, 1:, None])[..., 0]

    kl = (before.exp() * (before - after)).sum(-1)
    metrics = scores.metrics(baseline)
    against = metrics["against_baseline"]
    assert metrics["nll"] == pytest.approx(float(nll(after).mean()), rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(float(nll(after).mean())), rel=1e-4)
    assert against["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert against["kl_p99"] == pytest.approx(float(kl.flatten().quantile(0.99)), rel=1e-3)
    assert against["top1_agreement"] == float((before.argmax(-1) == after.argmax(-1)).double().mean())
    difference = (nll(after) - nll(before)).mean(1).numpy()
    assert against["delta_nll"] == pytest.approx(difference.mean(), rel=1e-3)
    assert against["stderr"] == pytest.approx(stats.sem(difference), rel=1e-3)
    assert against["p"] == pytest.approx(stats.ttest_rel(nll(after).mean(1), nll(before).mean(1)).pvalue, rel=1e-2)


def test_masked_tokens_add_nothing_to_the_divergence(llama, tmp_path):
    """Some models mask part of their vocabulary: its logits are −inf, quantized or not."""
    log_p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]]).log()
    log_q = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.0, 0.5]]).log()
    expected = [0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75), math.log(2)]
    assert quality.kl_divergence(log_p, log_q).tolist() == pytest.approx(expected)
    masked = torch.arange(904, 914)
    llama.lm_head.register_forward_hook(lambda head, inputs, logits: logits.index_fill(-1, masked, -torch.inf))
    tokens, logits = windows() % 900, logits_in(tmp_path)
    baseline = quality.evaluate(llama, tokens, logits, is_baseline=True)
    replace_layers(llama, quantizing.quantize(linear_layers(llama), formats.get("fp4_e3m0")))
    metrics = quality.evaluate(llama, tokens, logits).metrics(baseline)["against_baseline"]
    assert 0 < metrics["kl_mean"] < metrics["kl_p99"] < math.inf


def test_batches_do_not_matter(llama, tmp_path, monkeypatch):
    logits = logits_in(tmp_path)
    whole = quality.evaluate(llama, windows(), logits, is_baseline=True).nll
    monkeypatch.setattr(quality, "BATCH_LOGITS", 1)
    single = quality.evaluate(llama, windows(), logits_in(tmp_path), is_baseline=True).nll
    assert np.abs(whole - single).max() < 1e-4


def test_the_standard_error_covers_the_truth():
    """95% intervals from correlated tokens contain the true mean in about 95% of cases."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(400):
        values = generator.normal(size=(40, 1)) + generator.normal(size=(40, 50))
        mean, stderr = statistics.clustered_mean(values)
        hits += abs(mean) < stats.t.ppf(0.975, 39) * stderr
    assert 0.92 < hits / 400 < 0.98


@pytest.mark.parametrize("shape", [(1, 30), (4, 12), (1, 9, 50), (3, 20, 7)])
def test_paired_difference_against_a_sum_by_hand(shape):
    generator = np.random.default_rng(0)
    ours = (generator.normal(size=shape) + 0.3).astype(np.float32)
    theirs = generator.normal(size=shape).astype(np.float32)
    rows = ours.astype(np.float64) - theirs
    rows = rows if rows.ndim == 2 else rows.mean(2)
    seeds, windows = rows.shape
    variance = rows.mean(0).var(ddof=1) / windows + (rows.mean(1).var(ddof=1) / seeds if seeds > 1 else 0)
    delta, stderr, p = statistics.paired_difference(ours, theirs)
    assert delta == pytest.approx(rows.mean(), rel=1e-12)
    assert stderr == pytest.approx(variance**0.5, rel=1e-12)
    assert p == pytest.approx(2 * stats.t.sf(abs(rows.mean()) / variance**0.5, windows - 1), rel=1e-12)
    if seeds == 1:
        assert p == pytest.approx(stats.ttest_1samp(rows[0], 0).pvalue, rel=1e-12)


def test_paired_difference_without_variance():
    zeros, ones = np.zeros((1, 5)), np.ones((1, 5))
    assert statistics.paired_difference(zeros, zeros) == (0, 0, 1)
    assert statistics.paired_difference(ones, zeros) == (1, 0, 0)
    delta, stderr, p = statistics.paired_difference(ones[:, :1], zeros[:, :1])
    assert delta == 1 and math.isnan(stderr) and math.isnan(p)


def test_error_against_float64(llama):
    layers = linear_layers(llama)
    fmt = formats.get("nf4", block=32)
    packed = quantizing.quantize(layers, fmt)
    tokens = windows(2)
    errors = error.layer_errors(llama, layers, packed, tokens)
    name = "model.layers.1.mlp.down_proj"
    inputs = []
    hook = layers[name].register_forward_hook(lambda layer, args, out: inputs.append(args[0]))
    llama(input_ids=tokens)
    hook.remove()
    w, back, x = layers[name].weight.double(), packed[name].dequantize().double(), inputs[0].double()
    row = next(row for row in errors["layers"] if row["name"] == name)
    noise = w - back
    assert row["sqnr_db"] == pytest.approx(10 * math.log10(w.square().sum() / noise.square().sum()), rel=1e-5)
    assert row["mse"] == pytest.approx(float(noise.square().mean()), rel=1e-4)
    assert row["relative"] == pytest.approx(float(noise.norm() / w.norm()), rel=1e-4)
    assert row["max_abs"] == pytest.approx(float(noise.abs().max()), rel=1e-4)
    assert row["output_relative"] == pytest.approx(float((x @ noise.t()).norm() / (x @ w.t()).norm()), rel=1e-4)
    everything = sum(float(layer.weight.double().square().sum()) for layer in layers.values())
    lost = sum(row["mse"] * math.prod(row["shape"]) for row in errors["layers"])
    assert errors["relative"] == pytest.approx(math.sqrt(lost / everything), rel=1e-4)


@pytest.mark.parametrize("name", formats.names())
def test_normalized_weights_are_a_density_within_the_levels(llama, name):
    layers = linear_layers(llama)
    histogram = distribution.normalized_weights(layers, quantizing.quantize(layers, formats.get(name)))
    width = np.diff(histogram["edges"])
    assert (np.array(histogram["density"]) * width).sum() == pytest.approx(1)
    for levels in histogram["levels"]:
        assert levels == sorted(levels) and len(levels) == 2 ** formats.get(name).bits
    assert bool(histogram["levels"]) == (name != "none")


def test_peak_memory_sees_what_was_let_go():
    """In its own process: on systems that cannot reset the peak, it counts from the start of the process."""
    program = """
import torch
from qbench.measure.memory import PeakMemory
with PeakMemory(torch.device("cpu")) as quiet:
    pass
with PeakMemory(torch.device("cpu")) as loud:
    torch.ones(32 * 2**20).sum()
print(loud.bytes["rss"] - quiet.bytes["rss"])
"""
    assert int(subprocess.check_output([sys.executable, "-c", program])) > 100 * 2**20


def test_rates_keep_their_samples(llama):
    rates = throughput.generation_rates(llama, windows(1)[0], prefills=3, decodes=4)
    assert len(rates["prefill_tokens_s"]["samples"]) == 3 and len(rates["decode_tokens_s"]["samples"]) == 4
    by_rows = rates.pop("by_rows")
    assert [rate["rows"] for rate in by_rows] == [1, 4, 16, 24]
    assert all(sample > 0 for rate in [*rates.values(), *by_rows] for sample in rate["samples"])


def test_live_bytes_count_a_storage_until_it_is_gone():
    outside = torch.ones(100)
    with LiveBytes() as live:
        live.kind = live.label = "first"
        x = torch.zeros(1000, requires_grad=True)
        y = (x * outside.sum()).exp()  # the product is freed; the result and the saved sum are alive
        assert live.live["first"] == 4000 + 4000 + 4
        z, y, view = y.sum(), None, x[10:]
        assert live.live["first"] == 4000 + 4000 + 4 + 4, "autograd has kept y, and a view costs nothing"
        live.kind = live.label = "second"
        z.backward()
        assert live.live["first"] == 4000 + 4 and live.live["second"] == 4000, "the gradient is there, y gone"
        live.tag(x.grad, "gradient", 8000)
        assert live.live["gradient"] == 8000 and not live.live["second"]
        del x, view
    assert live.peaks["first"] == {"first": 12004} and live.peak == 3 * 4000 + 3 * 4, "x, y, their product"


def test_live_bytes_count_what_the_allocator_gives(llama):
    """The peak equals that of PyTorch's allocator for the same step."""
    tokens = windows(4, 32)
    optimizer = torch.optim.AdamW(llama.parameters())
    llama.requires_grad_(True)

    def step():
        llama(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    optimizer.state.clear()
    with LiveBytes() as live:
        step()
    changes = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())]
    assert live.peak == pytest.approx(max(np.cumsum(changes)), rel=0.01)


def test_live_bytes_see_the_layer_that_a_product_decodes(llama):
    replace_layers(llama, quantizing.quantize(linear_layers(llama), formats.get("nf4")))
    with LiveBytes() as live, torch.no_grad():
        llama(input_ids=windows(4, 32))
    assert not live.live[DECODED] and live.peak > 0
    seen = LiveBytes()
    seen.label = "product"
    layer = llama.model.layers[0].mlp.up_proj
    with seen, torch.no_grad():
        layer(torch.randn(32, 64))
    assert seen.peaks["product"][DECODED] == 4 * 64 * 96
