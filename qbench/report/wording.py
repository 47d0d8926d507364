"""The answer of a run in sentences and as the rows of one table, for the terminal and the page alike."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from qbench.system.messages import left_in_words, visible

SIGNIFICANT = 0.05
MOST = 6  #: names in a list before it is cut
_MARKS = re.compile(
    r"[\\`*\[\]<|$~]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)"  # anywhere
    r"|^(?:>|#+(?=\s|$)|[-+=]+(?=\s|$))|(?<=^\d)[.)](?=\s|$)"  # as a line begins
)


def escaped(text: str) -> str:
    """A text in Markdown that shows it as it is: it brings no link, no HTML, no formula, no cell of a table."""
    return _MARKS.sub(r"\\\g<0>", text)


def number(value: float | None, form: str) -> str:
    """A number in digits, or where they would be too many as a power of ten; a result has None for one not finite."""
    if value is None or not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1e12:
        form = ".3g"
    return f"{value:{form}}".replace("-", "−")


def short(name: str) -> str:
    """A name of others' as a table or a figure has room for it."""
    return visible(name, 60)


def title(config: dict) -> str:
    """What a run is called: `nf4 + dq, block 64`."""
    if config["format"]["name"] == "none":
        return "16 bit"
    return f"{short(config['format']['name'])}{' + dq' if config['dq'] else ''}, block {config['block']}"


UNTUNED = "none"  #: the method where there is no fine-tune
METHODS = {
    UNTUNED: "untuned", "lora": "LoRA", "dora": "DoRA", "rslora": "rsLoRA", "ia3": "(IA)³", "prefix": "prefix tuning",
    "p_tuning": "P-tuning", "full": "full fine-tuning",
}  # fmt: skip

INITS = {"default": "B = 0", "loftq": "LoftQ", "pissa": "PiSSA"}

STAGES = ("baseline", "quantized", "initial", "tuned")  #: of which there are scores

#: what became of the adapters, as a row is called
MERGED = {"adapters": "A, B packed", "16bit": "merged", "requantized": "requantized"}


def method(tune: dict) -> str:
    """What a fine-tune is called: `LoRA`."""
    return METHODS.get(tune["method"], short(tune["method"]))


def start(init: str) -> str:
    """Where LoRA begins: `B = 0`."""
    return INITS.get(init, short(init))


def _sized(tune: dict) -> str:
    """With what there is to choose: `LoRA, rank 16`."""
    size = {"full": "", "ia3": ""} | dict.fromkeys(("prefix", "p_tuning"), f", {tune['virtual_tokens']} virtual tokens")
    return method(tune) + size.get(tune["method"], f", rank {tune['rank']}")


def grown(delta: float) -> float:
    """By what share a perplexity grows where its logarithm grows by `delta`: infinite beyond what floats hold."""
    try:
        return math.expm1(delta)
    except OverflowError:
        return math.inf


def _change(against: dict, other: str = "the baseline's") -> str:
    """A difference of log-likelihoods as the per cent of the other perplexity that it is."""
    delta, stderr = against["delta_nll"], against["stderr"]
    if delta is None or not math.isfinite(delta):
        return f"not to be compared with {other}"
    percent = f"{number(100 * abs(grown(delta)), '.2f')}%"
    if stderr is not None:
        percent += f" ± {number(100 * (grown(delta) + 1) * stderr, '.2f')}%"
    if against["p"] is None or against["p"] > SIGNIFICANT:
        return f"not distinguishable from {other} ({'+' if delta > 0 else '−'}{percent})"
    return f"{'above' if delta > 0 else 'below'} {other} by {percent}"


def answer(result: dict) -> list[str]:
    """The findings of a finished run, a sentence each."""
    metrics, config = result["metrics"], result["config"]
    bits, quality, error = metrics["bits"], metrics["quality"], metrics["error"]
    scores, baseline = quality["quantized"], quality["baseline"]["perplexity"]
    if config["format"]["name"] == "none":
        sentences = [
            f"16 bit: the baseline that formats are compared with. Its perplexity is {number(baseline, '.2f')}."
        ]
    else:
        against = scores["against_baseline"]
        noise = f"{number(error['sqnr_db'], '.2f')} dB signal to quantization noise" if error["sqnr_db"] else "no error"
        sentences = [
            f"{title(config)}: {number(bits['per_parameter'], '.3f')} bits a weight, {number(bits['compression'], '.2f')}×"
            f" smaller than 16 bit; {noise}.",
            f"Its perplexity on held-out text, {number(scores['perplexity'], '.2f')}, is {_change(against)}"
            f" ({number(baseline, '.2f')}); {number(against['top1_agreement'], '.1%')} of the most probable tokens stay"
            " the same.",
        ]
    quantized, eligible = (bits.get(f"{which}_parameters") for which in ("quantized", "eligible"))
    share = quantized / eligible if quantized is not None and eligible else 1.0
    if sentence := left_in_words(bits.get("left", {}), share):
        sentences.append(f"{sentence} The whole model takes {number(bits['model'], '.2f')} bits a weight.")
    if "tuned" in quality and config["tune"]["method"] != UNTUNED:
        tune = config["tune"]
        sentences.append(
            f"After {tune['steps']} steps of {_sized(tune)}, the perplexity is"
            f" {number(quality['tuned']['perplexity'], '.2f')}, {_change(quality['tuned']['against_baseline'])}."
        )
    return [*sentences, *_around_the_fine_tune(metrics, config)]


def _around_the_fine_tune(metrics: dict, config: dict) -> list[str]:
    """Where LoRA began, if not at nothing, and what became of its matrices."""
    sentences, tune = [], config["tune"]
    if "init" in metrics and "initial" in metrics["quality"]:
        alone, initial = (_noise(metrics["init"][key]) for key in ("quantized", "initial"))
        sentences.append(
            f"{start(tune['init'])} starts from {initial}, the quantized weights alone have {alone};"
            f" before the first step the perplexity is {number(metrics['quality']['initial']['perplexity'], '.2f')}."
        )
    told = {
        "adapters": f"With A and B in {short(str(tune.get('adapter_format')))}",
        "16bit": "Merged into 16 bits",
        "requantized": f"Merged and in {short(config['format']['name'])} again",
    }
    for name, found in merged(metrics).items():
        change = _change(found["against_unmerged"], "that of the adapters kept apart")
        sentences.append(
            f"{told[name]}, at {number(found['bits']['model'], '.3f')} bits a parameter of the whole model, the perplexity"
            f" is {number(found['perplexity'], '.2f')}, {change}."
        )
    return sentences


def merged(metrics: dict) -> dict[str, dict]:
    """What became of the adapters, of the kinds that are known."""
    return {name: found for name, found in metrics.get("merged", {}).items() if name in MERGED}


def _noise(error: dict) -> str:
    return "no error" if error["sqnr_db"] is None else f"{number(error['sqnr_db'], '.2f')} dB"


@dataclass
class Table:
    """columns: heads. rows: texts, the first of each the row's name. note: what the heads mean."""

    columns: list[str]
    rows: list[list[str]]

    note: str = (
        "± is one standard error over windows; Δ nll and KL are against the baseline on the same tokens, nats a token;"
        " top-1 is how often the most probable token is the baseline's; prefill and decode are tokens/s of one sequence."
    )

    def markdown(self) -> list[str]:
        """Its lines."""
        head, *rows = (f"| {' | '.join(map(escaped, row))} |" for row in (self.columns, *self.rows))
        return [head, "|---" * len(self.columns) + "|", *rows]


def _rate(rates: dict | None, scale: float = 1) -> str:
    return number(rates["median"] and scale * rates["median"], ",.0f") if rates else ""


def table(result: dict) -> Table:
    """Baseline, quantized, tuned, and what else was scored between and after, a row each."""
    metrics = result["metrics"]
    bits, memory, rates, quality = (metrics[k] for k in ("bits", "memory", "throughput", "quality"))
    columns = ["", "perplexity", "Δ nll", "KL", "top-1", "bits/w", "MB", "prefill", "decode"]
    tuned = memory.get("tuned_bytes")
    rows = [
        _row(name, scores, *found)
        for name, *found in (
            ("baseline", bits["baseline"], memory["baseline_bytes"], rates.get("baseline")),
            ("quantized", bits["per_parameter"], memory["model_bytes"], rates),
            ("initial", bits["per_parameter"], tuned, None),
            ("tuned", bits["per_parameter"], tuned, rates.get("tuned")),
        )
        if (scores := quality.get(name))
    ]
    rows += [_row(MERGED[name], found, None, found["bytes"], None) for name, found in merged(metrics).items()]
    return Table(columns, rows)


def _row(name: str, scores: dict, per_weight: float | None, held: int | None, speeds: dict | None) -> list[str]:
    against, speeds = scores.get("against_baseline"), speeds or {}
    return [
        name,
        plus_minus(scores["perplexity"], (scores["perplexity"] or 0) * (scores["stderr"] or 0), ".2f"),
        plus_minus(against["delta_nll"], against["stderr"], "+.4f") if against else "",
        number(against["kl_mean"], ".4f") if against else "",
        number(against["top1_agreement"], ".1%") if against else "",
        number(per_weight, ".3f") if per_weight else "",
        number(held / 1e6, ".1f") if held else "",
        _rate(speeds.get("prefill_tokens_s")),
        _rate(speeds.get("decode_tokens_s")),
    ]


def speed(result: dict) -> str:
    """The rates that are the format's own, and the number of tokens scored, in a sentence each."""
    rates, scored = result["metrics"]["throughput"], result["metrics"]["quality"]["baseline"]["tokens"]
    sentences = [f"{scored:,} held-out tokens of {result['config']['data']['path']} were scored."]
    quantize, dequantize = (rates.get(f"{verb}_weights_s") for verb in ("quantize", "dequantize"))
    if quantize and dequantize:
        tuning = f", fine-tuning at {_rate(rates['tune_tokens_s'])} tokens/s" if rates.get("tune_tokens_s") else ""
        sentences.append(
            f"Quantizing runs at {_rate(quantize, 1e-6)} and dequantizing at {_rate(dequantize, 1e-6)} million"
            f" weights/s{tuning}."
        )
    return " ".join(sentences)


def plus_minus(value: float | None, stderr: float | None, form: str) -> str:
    text = number(value, form)
    return f"{text}±{number(stderr, form.lstrip('+'))}" if stderr else text


def listed(names: Sequence[str], between: str = ", ") -> str:
    """The first of the names, and how many more there are: `a, b and 3 more`."""
    more = f"{between.strip(', ')} and {len(names) - MOST} more" if len(names) > MOST else ""
    return between.join(names[:MOST]) + more


def count(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number:,} {noun}{'s' * (number != 1)}"
