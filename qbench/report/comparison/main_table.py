"""The main table of a comparison, a row for each configuration, and the cells that other tables share with it."""

from collections.abc import Sequence

from qbench.report.table import Cell, Column, Row, Table
from qbench.report.wording import format_number, plus_minus

from .configurations import Configuration, Setting
from .differences import Difference

COLUMNS = [
    Column("format", "format, block and double quantization"),
    Column("bits/weight", "of the quantized weights, counted from the bytes in memory", "less"),
    Column("model, MB", "the whole model after quantization", "less"),
    Column("perplexity", "on held-out text, before any fine-tune", "less"),
    Column("Δ nll", "difference from 16 bit on the same tokens, nats per token", "less"),
    Column("KL", "mean divergence from the 16-bit model's next-token distribution, nats", "less"),
    Column("tuned perplexity", "after the fine-tune; ± is half the 95% interval over seeds", "less"),
    Column("tuned Δ nll", "difference from the same fine-tune of 16 bit with the same seeds, nats per token", "less"),
    Column("top-1", "how often the most probable token is the 16-bit model's", "more"),
    Column("SQNR, dB", "10·log10(Σw² / Σ(w − ŵ)²) over the quantized weights", "more"),
    Column("output error", "relative error of the layers' outputs on real text", "less"),
    Column("prefill", "tokens/s of one sequence read at once, quantized", "more"),
    Column("decode", "tokens/s of one sequence, token by token, quantized", "more"),
    Column("fine-tune", "tokens/s", "more"),
    Column("peak, MB", "the largest peak of load, eval and tune: resident memory, or allocated memory on CUDA", "less"),
]
QUALITY = ("quality", "quantized")


def build_table(setting: Setting, heads: Sequence[str] | None = None) -> Table:
    """A row for each configuration; the columns named by `heads`, or all, that are not empty."""
    rows = [build_row(c, _cells(c)) for c in setting.configurations]
    return Table(COLUMNS, rows, setting.title).without_empty_columns(heads)


def build_row(c: Configuration, cells: list[Cell]) -> Row:
    """A row about a configuration, with the files of its runs."""
    return Row(cells, {seed: file for seed, (file, _) in sorted(c.runs.items())}, c.is_16_bit)


def _cells(c: Configuration) -> list[Cell]:
    """The cells of COLUMNS."""

    def cell(form: str, *keys: str, scale: float = 1.0) -> Cell:
        return number_cell(c.mean(*keys), form, scale)

    def delta(stage: str) -> Cell:
        d = c.differences.get(stage)
        return difference_cell(d) if d else Cell("0" if c.is_16_bit and c.nll(stage) else "", 0.0)

    seeds = f" ({len(c.runs)} seeds)" if len(c.runs) > 1 else ""
    return [
        Cell(c.title + seeds),
        cell(".3f", "bits", "per_parameter"),
        cell(",.1f", "memory", "model_bytes", scale=1e-6),
        cell(".2f", *QUALITY, "perplexity"),
        delta("quantized"),
        cell(".4f", *QUALITY, "against_baseline", "kl_mean"),
        tuned_perplexity_cell(c),
        delta("tuned"),
        cell(".1%", *QUALITY, "against_baseline", "top1_agreement"),
        cell(".2f", "error", "sqnr_db"),
        cell(".4f", "error", "output_relative"),
        cell(",.0f", "throughput", "prefill_tokens_s", "median"),
        cell(",.0f", "throughput", "decode_tokens_s", "median"),
        cell(",.0f", "throughput", "tune_tokens_s", "median"),
        number_cell(_peak_bytes(c) or None, ",.0f", 1e-6),
    ]


def _peak_bytes(c: Configuration) -> float | None:
    """The largest peak of any phase of any run."""
    phases = [result["metrics"].get("memory", {}).get("peak_bytes", {}) for result in c.results]
    peaks = [kinds.get("allocated", kinds.get("rss", 0)) for phase in phases for kinds in phase.values()]
    return max(peaks, default=None)


def number_cell(value: float | None, form: str, scale: float = 1.0) -> Cell:
    """The number times `scale`; empty for None."""
    return Cell() if value is None else Cell(format_number(value * scale, form), value)


def difference_cell(d: Difference | None) -> Cell:
    return Cell(str(d), d.delta) if d else Cell()


def tuned_perplexity_cell(c: Configuration) -> Cell:
    """The perplexity after the fine-tune, with half its interval over seeds."""
    keys = ("quality", "tuned", "perplexity")
    value, diverged = c.mean(*keys), c.count_diverged("tuned")
    if value is None:
        return Cell("diverged" if diverged else "")
    note = f" ({diverged} diverged)" if diverged else ""
    return Cell(plus_minus(value, c.half_interval(*keys), ".2f") + note, value)
