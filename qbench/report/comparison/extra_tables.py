"""The tables beside the main one, each where runs have such data: methods, where LoRA began, what became of it, tasks."""

from qbench.report.wording import start, title

from . import low_rank, methods, tasks
from .configurations import Setting
from .low_rank import Afterwards, Start
from .methods import Claim, Series
from .table import Cell, Column, Row, Table, difference, filled, numeral, tuned

FORMAT = Column("format", "the whole recipe: levels, block, double quantization")
TUNED = Column("tuned perplexity", "after the fine-tune; ± is half the 95% interval over seeds", "less")
METHODS = [
    Column("method", "of fine-tuning"),
    Column("format", "that it is on"),
    Column("learning rate", "the best of those tried, on the seeds that all have; † is the last on its side"),
    TUNED,
    Column("Δ nll to 16 bit", "against the same method on 16 bit at its own best learning rate, nats a token", "less"),
    Column("Δ nll to full", "against full fine-tuning of 16 bit at its own best learning rate, nats a token", "less"),
    Column("fine-tune", "tokens/s", "more"),
]
STARTS = [
    FORMAT,
    Column("start", "B = 0, or what LoftQ or PiSSA made of A, B and Q together"),
    Column("SQNR of Q, dB", "of the format's own Q, without a start", "more"),
    Column("of Q + B·A, dB", "of what the fine-tune began with", "more"),
    Column("perplexity", "before the first step", "less"),
    Column("Δ nll", "before the first step against B = 0 on the same format, nats a token", "less"),
    TUNED,
    Column("tuned Δ nll", "after the last step against B = 0 on the same format and seeds, nats a token", "less"),
]
AFTERWARDS = [
    FORMAT,
    Column("adapters", "kept apart, packed, merged into 16 bits, or merged and in the format again"),
    Column("bits/parameter", "of the whole model, adapters included, by the parameters that it had without", "less"),
    Column("model, MB", "all that the model holds", "less"),
    Column("perplexity", "after the fine-tune", "less"),
    Column("Δ nll", "against the adapters kept apart, same tokens and seeds, nats a token", "less"),
]


def all_of(setting: Setting) -> list[Table]:
    """Those that the setting has rows for."""
    starts = [Row(s.configuration, _start(s)) for s in low_rank.starts(setting)]
    after = [Row(a.configuration, _after(a)) for a in low_rank.afterwards(setting)]
    made = (
        Table(
            "Methods of fine-tuning", METHODS, _methods(setting),
            "Where several learning rates were tried, each has its best on these same windows, on the seeds that all its"
            " rates have: that favours a method with many rates. † is the last rate that was tried on its side.",
        ),
        Table(
            "Where LoRA begins", STARTS, starts,
            "Each at its best learning rate, where several were tried. Before the first step B = 0 leaves the quantized"
            " model as it is. The p values of a column are one family.",
        ),
        Table(
            "What becomes of the adapters", AFTERWARDS, after,
            "Merged into 16 bits nothing is lost but rounding, and nothing is saved; in the format again, the adapters'"
            " work passes through it once more.",
        ),
        tasks.table(setting),
    )  # fmt: skip
    return [filled(table) for table in made if table.rows]


def _methods(setting: Setting) -> list[Row]:
    if not methods.differ(setting):
        return []
    claims = methods.claims(setting)
    against = [{claim.ours: claim for claim in claims[family]} for family in ("same", "full")]
    return [Row(s.best, _method(s, *(found.get(s) for found in against))) for s in methods.series(setting)]


def _method(s: Series, same: Claim | None, full: Claim | None) -> list[Cell]:
    c = s.best
    several = f" of {len(s.rates)}{' †' * bool(s.edge)}" if len(s.rates) > 1 else ""
    return [
        Cell(s.name),
        Cell(title(c.config)),
        Cell(f"{s.rate:g}{several}", s.rate),
        tuned(c),
        difference(same.difference if same else None),
        difference(full.difference if full else None),
        numeral(c.mean("throughput", "tune_tokens_s", "median"), ",.0f"),
    ]


def _start(s: Start) -> list[Cell]:
    alone, begun = s.sqnr_db
    return [
        Cell(s.configuration.title),
        Cell(start(s.init)),
        numeral(alone, ".2f"),
        numeral(begun, ".2f"),
        numeral(s.perplexity, ".2f"),
        difference(s.before),
        tuned(s.configuration),
        difference(s.after),
    ]


def _after(a: Afterwards) -> list[Cell]:
    return [
        Cell(a.configuration.title),
        Cell("kept apart" if a.apart else a.name),
        numeral(a.bits, ".3f"),
        numeral(a.held, ",.1f", scale=1e-6),
        numeral(a.perplexity, ".2f"),
        difference(a.against),
    ]
