"""The comparison as one table, for the page, its Markdown twin and the terminal alike."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from qbench.report.wording import number, plus_minus
from qbench.results import archive
from qbench.system.messages import visible

from .configurations import Configuration, Setting
from .differences import Difference


@dataclass(frozen=True)
class Column:
    """head: what stands above, with its unit. about: what it means. best: whether less or more is better, or neither."""

    head: str
    about: str
    best: str = ""


@dataclass(frozen=True)
class Cell:
    """text, and the number that it sorts by."""

    text: str = ""
    value: float | None = None


@dataclass(frozen=True)
class Row:
    """The configuration that it is about, and a cell for each column."""

    configuration: Configuration
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    """about: how it is to be read."""

    title: str
    columns: list[Column]
    rows: list[Row]
    about: str = ""


COLUMNS = [
    Column("format", "the whole recipe: levels, block, double quantization"),
    Column("bits/weight", "of the quantized weights, counted from the bytes held", "less"),
    Column("model, MB", "all that the model holds after quantization", "less"),
    Column("perplexity", "on held-out text, before any fine-tune", "less"),
    Column("Δ nll", "against 16 bit on the same tokens, nats a token", "less"),
    Column("KL", "from the 16-bit model's next-token distribution, mean, nats", "less"),
    Column("tuned perplexity", "after the fine-tune; ± is half the 95% interval over seeds", "less"),
    Column("tuned Δ nll", "against the same fine-tune of 16 bit with the same seeds, nats a token", "less"),
    Column("top-1", "how often the most probable token is the 16-bit model's", "more"),
    Column("SQNR, dB", "10·log10(Σw² / Σ(w − ŵ)²) over the quantized weights", "more"),
    Column("output error", "relative error of the layers' outputs on real text", "less"),
    Column("prefill", "tokens/s of one sequence read whole, quantized", "more"),
    Column("decode", "tokens/s of one sequence, token by token, quantized", "more"),
    Column("fine-tune", "tokens/s", "more"),
    Column("peak, MB", "largest of the phases load, eval and tune: resident, or allocated on CUDA", "less"),
]
QUALITY = ("quality", "quantized")


def row(c: Configuration) -> list[Cell]:
    """The cells of a configuration, one for each of COLUMNS."""

    def cell(form: str, *keys: str, scale: float = 1.0) -> Cell:
        return numeral(c.mean(*keys), form, scale)

    def delta(stage: str) -> Cell:
        found = c.differences.get(stage)
        return difference(found) if found else Cell("0" if c.is_16_bit and c.nll(stage) else "", 0.0)

    seeds = f" ({len(c.runs)} seeds)" if len(c.runs) > 1 else ""
    peak = peak_bytes(c)
    return [
        Cell(c.title + seeds),
        cell(".3f", "bits", "per_parameter"),
        cell(",.1f", "memory", "model_bytes", scale=1e-6),
        cell(".2f", *QUALITY, "perplexity"),
        delta("quantized"),
        cell(".4f", *QUALITY, "against_baseline", "kl_mean"),
        tuned(c),
        delta("tuned"),
        cell(".1%", *QUALITY, "against_baseline", "top1_agreement"),
        cell(".2f", "error", "sqnr_db"),
        cell(".4f", "error", "output_relative"),
        cell(",.0f", "throughput", "prefill_tokens_s", "median"),
        cell(",.0f", "throughput", "decode_tokens_s", "median"),
        cell(",.0f", "throughput", "tune_tokens_s", "median"),
        numeral(peak or None, ",.0f", 1e-6),
    ]


def peak_bytes(c: Configuration) -> float | None:
    """The largest peak of any phase of any of its runs."""
    phases = [r["metrics"].get("memory", {}).get("peak_bytes", {}) for _, r in c.runs.values()]
    peaks = [kinds.get("allocated", kinds.get("rss", 0)) for found in phases for kinds in found.values()]
    return max(peaks, default=None)


def numeral(value: float | None, form: str, scale: float = 1.0) -> Cell:
    return Cell() if value is None else Cell(number(value * scale, form), value)


def difference(found: Difference | None) -> Cell:
    return Cell(str(found), found.delta) if found else Cell()


def tuned(c: Configuration) -> Cell:
    """The perplexity after the fine-tune, with half its interval."""
    keys = ("quality", "tuned", "perplexity")
    value, diverged = c.mean(*keys), c.diverged("tuned")
    if value is None:
        return Cell("diverged" if diverged else "")
    lost = f" ({diverged} diverged)" if diverged else ""
    return Cell(plus_minus(value, c.interval(*keys), ".2f") + lost, value)


def shown(setting: Setting, columns: list[str] | None = None) -> Table:
    """Every configuration a row; the columns, those named or all, that have a cell in some row."""
    rows = [Row(c, row(c)) for c in setting.configurations]
    return filled(Table(setting.title, COLUMNS, rows), columns)


def filled(table: Table, columns: list[str] | None = None) -> Table:
    """With the columns, those named or all, that have something to say."""
    kept = [
        i
        for i, column in enumerate(table.columns)
        if (columns is None or column.head in columns) and any(r.cells[i].text not in ("", "0") for r in table.rows)
    ]
    rows = [Row(r.configuration, [r.cells[i] for i in kept]) for r in table.rows]
    return replace(table, columns=[table.columns[i] for i in kept], rows=rows)


@dataclass(frozen=True)
class Source:
    """Where the result of a run lies. link: from the page to the file. run: names it in an archive of many; or empty."""

    seed: int
    link: str
    run: str


def sources(c: Configuration, folder: Path) -> list[Source]:
    """The result behind each run of a row, for a page in `folder`."""
    return [
        Source(seed, link(file, folder), _run_in_archive(file) if archive.on_disk(file) != file else "")
        for seed, (file, _) in sorted(c.runs.items())
    ]


def _run_in_archive(file: Path) -> str:
    """The name of a run as a link in Markdown takes it for its title, between quotation marks."""
    return visible(file.parent.name, 100).replace('"', "'")


def link(file: Path, folder: Path) -> str:
    """To the file of a result, or to the archive that it is in, from a page in `folder`."""
    path = os.path.relpath(archive.on_disk(file), folder)
    return quote(os.fsencode(path).replace(os.fsencode(os.sep), b"/"))
