"""The findings of one run in sentences."""

import math

from qbench.model.unquantized import describe_unquantized
from qbench.report.task_wording import STAGES, better_sign, is_significant, list_scores
from qbench.report.wording import (
    SIGNIFICANT,
    UNTUNED,
    format_number,
    init_name,
    merged_scores,
    method_name,
    recipe_name,
    relative_change,
    shorten,
)


def describe_run(result: dict) -> list[str]:
    """The findings of a finished run, a sentence or two each."""
    return [
        *_describe_format(result),
        *_describe_unquantized(result),
        *_describe_fine_tune(result),
        *_describe_init(result),
        *_describe_merged(result),
        *_describe_tasks(result),
    ]


def describe_speed(result: dict) -> str:
    """How much text was scored, and how fast the format quantizes, dequantizes and is fine-tuned."""
    rates, tokens = result["metrics"]["throughput"], result["metrics"]["quality"]["baseline"]["tokens"]
    sentences = [f"The scores are of {tokens:,} held-out tokens of {result['config']['data']['path']}."]
    quantize, dequantize = (rates.get(f"{verb}_weights_s") for verb in ("quantize", "dequantize"))
    if quantize and dequantize:
        tuning = rates.get("tune_tokens_s")
        fine_tune = f", and the fine-tune at {format_rate(tuning)} tokens/s" if tuning else ""
        sentences.append(
            f"Quantizing runs at {format_rate(quantize, 1e-6)} million weights/s, dequantizing at"
            f" {format_rate(dequantize, 1e-6)} million weights/s{fine_tune}."
        )
    return " ".join(sentences)


def format_rate(rates: dict | None, scale: float = 1) -> str:
    """The median of measured rates; empty if there are none."""
    return format_number(rates["median"] and scale * rates["median"], ",.0f") if rates else ""


def _describe_format(result: dict) -> list[str]:
    """The size and the error of the weights, then the perplexity before any fine-tune."""
    metrics, config = result["metrics"], result["config"]
    bits, quality, sqnr_db = metrics["bits"], metrics["quality"], metrics["error"]["sqnr_db"]
    baseline = format_number(quality["baseline"]["perplexity"], ".2f")
    if config["format"]["name"] == "none":
        return [f"This is the 16-bit baseline that formats are compared with. Its perplexity is {baseline}."]
    noise = f"a signal-to-quantization-noise ratio of {_format_sqnr(sqnr_db)}" if sqnr_db else "no quantization error"
    against = quality["quantized"]["against_baseline"]
    change = _describe_change(against, f"the baseline's {baseline}")
    return [
        f"{recipe_name(config)} takes {format_number(bits['per_parameter'], '.3f')} bits per weight,"
        f" {format_number(bits['compression'], '.2f')}× less than 16 bit, with {noise}.",
        f"Its perplexity on held-out text is {format_number(quality['quantized']['perplexity'], '.2f')},"
        f" {change}. The most probable token is the baseline's at {format_number(against['top1_agreement'], '.1%')} of the"
        " positions.",
    ]


def _describe_unquantized(result: dict) -> list[str]:
    """Which layers stayed in 16 bit, if any did."""
    bits = result["metrics"]["bits"]
    quantized, eligible = (bits.get(f"{which}_parameters") for which in ("quantized", "eligible"))
    share = quantized / eligible if quantized is not None and eligible else 1.0
    sentence = describe_unquantized(bits.get("left", {}), share)
    return (
        [f"{sentence} The whole model takes {format_number(bits['model'], '.2f')} bits per weight."] if sentence else []
    )


def _describe_fine_tune(result: dict) -> list[str]:
    """The perplexity after the fine-tune."""
    quality, tune = result["metrics"]["quality"], result["config"]["tune"]
    if "tuned" not in quality or tune["method"] == UNTUNED:
        return []
    if tune["method"] in ("full", "ia3"):
        size = ""
    elif tune["method"] in ("prefix", "p_tuning"):
        size = f" with {tune['virtual_tokens']} virtual tokens"
    else:
        size = f" of rank {tune['rank']}"
    change = _describe_change(quality["tuned"]["against_baseline"], "the baseline's")
    perplexity = format_number(quality["tuned"]["perplexity"], ".2f")
    return [f"After {tune['steps']} steps of {method_name(tune)}{size}, the perplexity is {perplexity}, {change}."]


def _describe_init(result: dict) -> list[str]:
    """Where LoRA started, if not at B = 0."""
    metrics = result["metrics"]
    if "init" not in metrics or "initial" not in metrics["quality"]:
        return []
    alone, initial = (_format_sqnr(metrics["init"][key]["sqnr_db"]) for key in ("quantized", "initial"))
    perplexity = format_number(metrics["quality"]["initial"]["perplexity"], ".2f")
    return [
        f"With {init_name(result['config']['tune']['init'])}, the fine-tune begins at a perplexity of {perplexity}. Signal"
        f" to quantization noise: {initial} with A and B, {alone} without."
    ]


def _describe_merged(result: dict) -> list[str]:
    """The perplexity with packed adapters, and with merged ones."""
    config = result["config"]
    subjects = {
        "adapters": f"With A and B packed as {shorten(str(config['tune'].get('adapter_format')))}",
        "16bit": "Merged into 16-bit weights",
        "requantized": f"Merged and quantized to {shorten(config['format']['name'])} again",
    }
    return [
        f"{subjects[kind]}, the model takes {format_number(scores['bits']['model'], '.3f')} bits per parameter. Its"
        f" perplexity is {format_number(scores['perplexity'], '.2f')},"
        f" {_describe_change(scores['against_unmerged'], 'that with separate adapters')}."
        for kind, scores in merged_scores(result["metrics"]).items()
    ]


def _describe_tasks(result: dict) -> list[str]:
    """How many task scores get worse or better at each stage."""
    stages = result["metrics"].get("tasks", {})
    parts, tested = [], []
    for name in (stage for stage in STAGES if stage in stages):
        stage = stages[name]
        scores = [stage[task][metric] for task, metric in list_scores(stage)]
        tested = [score for score in scores if "against_baseline" in score]
        changed = [score for score in tested if is_significant(score["against_baseline"]["p"])]
        worse = sum((score["against_baseline"]["delta"] or 0) * better_sign(score) < 0 for score in changed)
        if tested:
            parts.append(f"{worse} of the {name} model are distinguishably worse and {len(changed) - worse} better")
    return [f"Of {len(tested)} task scores, {'; '.join(parts)} than the baseline's."] if parts else []


def _describe_change(against: dict, reference: str) -> str:
    """A difference of mean nll, as per cent of the reference's perplexity: `2.02% ± 0.51% above the baseline's`."""
    delta, stderr = against["delta_nll"], against["stderr"]
    if delta is None or not math.isfinite(delta):
        return f"which cannot be compared with {reference}"
    change = relative_change(delta)
    percent = f"{format_number(100 * abs(change), '.2f')}%"
    if stderr is not None:
        percent += f" ± {format_number(100 * (change + 1) * stderr, '.2f')}%"
    if against["p"] is None or against["p"] > SIGNIFICANT:
        return f"not distinguishable from {reference} ({'+' if delta > 0 else '−'}{percent})"
    return f"{percent} {'above' if delta > 0 else 'below'} {reference}"


def _format_sqnr(sqnr_db: float | None) -> str:
    return "no error" if sqnr_db is None else f"{format_number(sqnr_db, '.2f')} dB"
