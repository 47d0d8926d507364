"""The plan against the paper, against arithmetic, and against steps that are taken."""

import io

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig

import formats
from qbench.errors import InputError, byte_count
from qbench.model import quantizing
from qbench.model.replacement import replace_layers
from qbench.model.selection import linear_layers
from qbench.plan import advice, check, paper, step, wording
from qbench.plan.count import count_memory
from qbench.plan.settings import Dtypes, PlanSettings
from qbench.plan.shapes import Shape, built_in_shapes, decoder_blocks, find_shape
from qbench.settings import TuneSettings
from qbench.training.adapters import add as add_adapters

NF4, BF16 = formats.get("nf4", dq=True), formats.get("none")
QLORA = PlanSettings(format=NF4, rank=64, batch=1, seq=512, checkpointing=True, optimizer="paged_adamw")
BUNDLED = find_shape("bundled")  # one object, so that what was traced for a test serves the next
HERE = PlanSettings(format=NF4, device="cpu", dtype=Dtypes(compute="float32"))
GB = 10**9


def off(actual: float, expected: float) -> float:
    return abs(actual / expected - 1)


# parameters as the publishers count them: arXiv 2302.13971, 2407.21783, 2412.15115, 2310.06825, and the model cards
PUBLISHED = {
    "llama-7b": 6.7e9,
    "llama-13b": 13.0e9,
    "llama-33b": 32.5e9,
    "llama-65b": 65.2e9,
    "llama3-8b": 8.03e9,
    "llama3-70b": 70.6e9,
    "qwen2.5-7b": 7.61e9,
    "qwen2.5-72b": 72.7e9,
    "mistral-7b": 7.24e9,
    "smollm-135m": 134.5e6,
}


def test_shapes_have_the_parameters_that_are_published():
    assert set(PUBLISHED) == set(built_in_shapes())
    for name, parameters in PUBLISHED.items():
        assert off(sum(find_shape(name).sizes.all), parameters) < 0.006, name


def test_65b_has_the_bytes_of_its_format_exactly():
    shape = find_shape("llama-65b")
    plan = count_memory(shape, QLORA)
    lines = plan.moments[plan.peak]
    numels = [layer.numel() for layer in shape.sizes.layers.values()]
    assert len(numels) == 560 and sum(numels) == plan.linear == 80 * (4 * 8192**2 + 3 * 8192 * 22016)
    assert lines["weights"] + lines["scales"] == sum(NF4.count_bytes(n) for n in numels)
    assert f"{plan.bits:.3f}" == "4.127"
    assert lines["adapters"] == 4 * plan.trainable and plan.trainable == 80 * 64 * (8 * 8192 + 3 * (8192 + 22016))


def test_65b_under_qlora_fits_48_gb_and_in_16_bits_takes_780():
    shape = find_shape("llama-65b")
    for adapters in ("float32", "bfloat16"):
        settings = QLORA.replace(gpu=48 * GB, dtype=Dtypes(adapters=adapters))
        assert count_memory(shape, settings).margin > 0
    assert count_memory(shape, QLORA.replace(gpu=48 * GB, optimizer="adamw")).margin < 0
    full = count_memory(shape, QLORA.replace(format=BF16, method="full", optimizer="adamw"))
    lines = full.moments[full.peak]
    assert lines["weights"] + lines["embeddings"] + lines["head"] + lines["gradients"] + lines["states"] >= 780 * GB
    assert full.needed > 780 * GB


def test_33b_fits_24_gb_only_with_paging():
    shape = find_shape("llama-33b")
    for adapters in ("float32", "bfloat16"):
        settings = QLORA.replace(gpu=24 * GB, dtype=Dtypes(adapters=adapters))
        paged = count_memory(shape, settings)
        assert paged.margin > 0 and 0 < paged.in_host < paged.paged
        assert count_memory(shape, settings.replace(optimizer="adamw")).margin < 0


def test_beside_the_papers_table_each_line_agrees_or_is_explained():
    comparisons = paper.compare_with_paper()
    for comparison in comparisons:
        for line in ("adapters", "optimizer", "total"):
            assert abs(comparison.difference(line)) < 0.1, (comparison.name, line)
        assert 8 * paper.textbook_parameters(comparison.name) / paper.MIB == comparison.paper["optimizer"], (
            "which is how its lines were found"
        )
        assert 300 < comparison.unexplained < 600, "a CUDA context, not a share of the model"
    said = " ".join(paper.explain(comparisons))
    assert "model: " in said and "embeddings and head in 32 bits" in said and "33B on 24 GB" in said


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_the_bundled_model_holds_what_is_planned(checkpointing):
    settings, shape = HERE.replace(checkpointing=checkpointing), BUNDLED
    plan = check.comparable_plan(shape, settings)
    assert off(plan.needed, check.measure_step(shape, settings)) < 0.005


SMALL = HERE.replace(rank=4, batch=2, seq=96)
ENDS = {"llama": "mlp.up_proj", "qwen2": "mlp.up_proj", "gpt2": "c_fc", "gpt_neox": "dense_h_to_4h"}
KINDS = {
    "lora": SMALL,
    "bf16, parts": SMALL.replace(dtype=Dtypes(), accumulate=2, checkpointing=True),
    "eager, dropout": SMALL.replace(attention="eager", dropout=0.1, format=formats.get("int4_asym", block=32)),
    "dora": SMALL.replace(method="dora"),
    "full": SMALL.replace(method="full", format=BF16, checkpointing=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_any_model_holds_what_is_planned(any_model, kind):
    shape, settings = find_shape(any_model), KINDS[kind]
    if kind == "eager, dropout":
        settings = settings.replace(targets=(ENDS[shape.config.model_type],))
    assert off(check.comparable_plan(shape, settings).needed, check.measure_step(shape, settings)) < 0.02


def test_the_lines_are_those_of_a_quantized_model_with_adapters():
    shape = BUNDLED
    model = shape.build(torch.bfloat16, "sdpa", "cpu").requires_grad_(False)
    head = sum(p.nbytes for p in model.get_input_embeddings().parameters())
    packed = quantizing.quantize(linear_layers(model), NF4)
    replace_layers(model, packed)
    plan = count_memory(shape, PlanSettings(format=NF4))
    lines = plan.moments[plan.peak]
    assert lines["weights"] + lines["scales"] == sum(q.nbytes for q in packed.values())
    assert lines["embeddings"] == head and not lines["head"], "which is tied"
    frozen = sum(lines[name] for name in ("weights", "scales", "embeddings", "norms"))
    assert 0 <= quantizing.model_bytes(model) - frozen < 100, "but for the one table of levels that all layers share"
    adapted = add_adapters(model, list(packed), TuneSettings(), seed=0)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert lines["adapters"] == sum(p.nbytes for p in trained)
    assert plan.trainable == sum(p.numel() for p in trained)


@pytest.mark.parametrize(
    "settings",
    [
        PlanSettings(format=step.QUANTIZED),
        PlanSettings(format=step.UNQUANTIZED, method="full", checkpointing=True),
        PlanSettings(format=step.QUANTIZED, method="none", device="cpu"),
    ],
)
def test_two_blocks_and_three_tell_what_nine_hold(settings):
    shape = BUNDLED
    peaks, whole = step.peaks(shape, settings), step.trace(shape, settings, shape.sizes.depth)
    between = [sum(whole.pop(label).values()) for label in list(whole) if label.endswith("between")]
    assert peaks == whole and max(between) <= max(sum(kinds.values()) for kinds in peaks.values())


def test_a_model_whose_blocks_differ_is_run_whole(monkeypatch):
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["full_attention", "sliding_attention"] * 3,
        use_sliding_window=True,
        sliding_window=32,
    )
    shape, depths = Shape("mixed", config), []
    trace = step.trace
    monkeypatch.setattr(step, "trace", lambda *args: depths.append(args[-1]) or trace(*args))
    assert not shape.sizes.alike and count_memory(shape, SMALL).needed > 0
    assert depths == [6] and len(decoder_blocks(shape.build(torch.bfloat16, "sdpa"))) == 6


def test_eager_attention_keeps_a_matrix_of_seq_squared():
    shape, settings = BUNDLED, PlanSettings(format=NF4, batch=1, seq=512)
    config = shape.config
    matrix = config.num_attention_heads * 512**2 * 2
    grown = count_memory(shape, settings.replace(attention="eager")).needed - count_memory(shape, settings).needed
    assert grown > config.num_hidden_layers * matrix
    assert count_memory(shape, settings.replace(attention="flash")).needed == count_memory(shape, settings).needed


def test_states_and_copies_by_optimizer():
    n = count_memory(BUNDLED, QLORA).trainable
    sizes = [64 * features for layer in BUNDLED.sizes.layers.values() for features in layer]
    assert n == sum(sizes)

    def states(optimizer):
        plan = count_memory(BUNDLED, QLORA.replace(optimizer=optimizer))
        return plan.moments["step"]["states"], plan.paged, plan.moments["step"]["copies"]

    assert states("adamw") == (8 * n, 0, 4 * n), "PyTorch's loop over all at once makes a copy of a moment"
    largest = 4 * max(sizes)
    assert states("sgd") == (0, 0, 0)
    held, paged, copied = states("adamw_8bit")
    assert (held, paged) == (2 * n + 2 * n // 64, 0) and 0 < copied <= 5 * largest, (
        "one tensor after the other, in fp32"
    )
    held, paged, copied = states("paged_adamw")
    assert (held, paged) == (0, 8 * n) and 0 < copied <= 2 * largest
    n = count_memory(find_shape("llama-7b"), QLORA).trainable
    assert count_memory(find_shape("llama-7b"), QLORA).paged == 8 * n


@pytest.mark.thorough
def test_what_would_make_it_fit():
    settings = PlanSettings(format=formats.get("int8"), batch=8, gpu=700 * 10**6)
    plan = count_memory(BUNDLED, settings)
    remedies = {remedy.arguments: remedy.plan for remedy in advice.find_remedies(plan)}
    assert (
        plan.margin < 0
        and list(remedies)[:2] == ["tune.checkpointing=true", "tune.accumulate=8"]
        and "tune.batch=4" in remedies
    )
    assert all(change.margin >= 0 for change in remedies.values())
    alone = [advice.apply_change(plan, ladder[-1]).needed for ladder in advice.ladders(settings)]
    (together,) = advice.find_remedies(count_memory(BUNDLED, settings.replace(gpu=min(alone) - 1)))
    assert together.arguments.startswith("tune.checkpointing=true tune.accumulate=8") and together.plan.margin >= 0
    parts = count_memory(BUNDLED, settings.replace(accumulate=4, checkpointing=True, gpu=plan.needed))
    assert advice.apply_change(parts, {"batch": 2}).settings.accumulate == 2, "which divides it"
    assert not advice.find_remedies(count_memory(BUNDLED, settings.replace(gpu=500 * 10**6))), "less than the context"


def test_a_sweep_has_every_format_smallest_first():
    plans = advice.compare_formats(BUNDLED, PlanSettings(), (32, 64))
    needed = [plan.needed for plan in plans]
    assert needed == sorted(needed) and plans[-1].settings.format.name == "none"
    assert {plan.settings.format.name for plan in plans} == set(formats.names())
    assert len(plans) == 4 * (len(formats.names()) - 1) + 1


def test_sizes():
    assert (
        byte_count("gpu", "24GB") == 24 * 10**9
        and byte_count("gpu", "24 GiB") == 24 * 2**30
        and byte_count("gpu", "0.5gb") == 5e8
    )


@pytest.mark.parametrize("bad", [{"rank": 0}, {"accumulate": 3}, {"dropout": 1.0}, {"checkpointing": "yes"}])
def test_settings_are_checked_without_a_command(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        PlanSettings(format=NF4, **bad)


@pytest.mark.parametrize("kind", [MixtralConfig, Qwen2MoeConfig])
def test_what_is_in_no_linear_layer_stays_in_16_bits(kind, tmp_path):
    """The experts of a mixture are one tensor each kind, and the gate that gives one number carries no adapter."""
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512)
    config = kind(**sizes, num_key_value_heads=2)
    config.save_pretrained(tmp_path)
    plan = count_memory(find_shape(str(tmp_path)), PlanSettings(format=formats.get("nf4"), gpu=10**9))
    model = AutoModelForCausalLM.from_config(config)
    experts = sum(p.nbytes for p in model.parameters() if p.dim() > 2) // 2  # in bf16
    line = plan.moments["forward"]
    assert experts <= line["others"] <= 1.2 * experts
    assert line["norms"] < 0.01 * experts
    printed = Console(width=200, record=True, file=io.StringIO())
    wording.print_plan(plan, [], printed)
    assert "in no format and carry no adapters" in printed.export_text()
