"""The tables after the main one: methods, initializations of LoRA, merged adapters, tasks."""

from qbench.report.table import Cell, Column, Row, Table
from qbench.report.wording import init_name, recipe_name

from . import adapters, methods, tasks
from .adapters import Init, MergedAdapters
from .configurations import Setting
from .main_table import build_row, difference_cell, number_cell, tuned_perplexity_cell
from .methods import Claim, Series

FORMAT = Column("format", "format, block and double quantization")
TUNED = Column("tuned perplexity", "after the fine-tune; ± is half the 95% interval over seeds", "less")
METHODS = [
    Column("method", "of fine-tuning"),
    Column("format", "of the fine-tuned model"),
    Column("learning rate", "the best of those tried, on the seeds that all have; † marks the lowest or highest tried"),
    TUNED,
    Column("Δ nll to 16 bit", "from the same method on 16 bit at its own best learning rate, nats per token", "less"),
    Column("Δ nll to full", "from full fine-tuning of 16 bit at its own best learning rate, nats per token", "less"),
    Column("fine-tune", "tokens/s", "more"),
]
INITS = [
    FORMAT,
    Column("start", "B = 0, or LoftQ or PiSSA, which compute A, B and Q together"),
    Column("SQNR of Q, dB", "of the format's own Q, as without LoftQ or PiSSA", "more"),
    Column("of Q + B·A, dB", "before the first step", "more"),
    Column("perplexity", "before the first step", "less"),
    Column("Δ nll", "before the first step, from B = 0 on the same format, nats per token", "less"),
    TUNED,
    Column("tuned Δ nll", "after the last step, from B = 0 on the same format and seeds, nats per token", "less"),
]
MERGED = [
    FORMAT,
    Column("adapters", "separate, packed, merged into 16 bit, or merged and quantized again"),
    Column("bits/parameter", "of the whole model with its adapters, per parameter without them", "less"),
    Column("model, MB", "the whole model", "less"),
    Column("perplexity", "after the fine-tune", "less"),
    Column("Δ nll", "from separate adapters on the same tokens and seeds, nats per token", "less"),
]


def build_tables(setting: Setting) -> list[Table]:
    """The tables that the setting has rows for."""
    inits = [build_row(init.configuration, _init_cells(init)) for init in adapters.compare_inits(setting)]
    merged = [build_row(m.configuration, _merged_cells(m)) for m in adapters.compare_merged(setting)]
    tables = (
        Table(
            METHODS, _method_rows(setting), "Methods of fine-tuning",
            "Where several learning rates were tried, each method has its best. It is chosen on the same windows, so a"
            " method with many rates has an advantage. † marks the lowest or highest rate tried: a better one may lie"
            " beyond.",
        ),
        Table(
            INITS, inits, "Initialization of LoRA",
            "Each is at its best learning rate. With B = 0 the quantized model is unchanged before the first step. The p"
            " values are corrected for the number of tests in a column.",
        ),
        Table(
            MERGED, merged, "Merged and packed adapters",
            "Merging into 16 bit costs only rounding, but saves no memory. Quantizing the merged weights again adds a"
            " second quantization error.",
        ),
        tasks.tasks_table(setting),
    )  # fmt: skip
    return [table.without_empty_columns() for table in tables if table.rows]


def _method_rows(setting: Setting) -> list[Row]:
    if not methods.has_several_fine_tunes(setting):
        return []
    claims = methods.qlora_claims(setting)
    same, full = ({claim.ours: claim for claim in claims[family]} for family in ("same", "full"))
    return [build_row(s.best, _method_cells(s, same.get(s), full.get(s))) for s in methods.find_series(setting)]


def _method_cells(s: Series, same: Claim | None, full: Claim | None) -> list[Cell]:
    """same, full: the comparison with the same method, and with full fine-tuning, in 16 bit."""
    c = s.best
    tried = f" of {len(s.rates)}{' †' * bool(s.edge)}" if len(s.rates) > 1 else ""
    return [
        Cell(s.name),
        Cell(recipe_name(c.config)),
        Cell(f"{s.rate:g}{tried}", s.rate),
        tuned_perplexity_cell(c),
        difference_cell(same.difference if same else None),
        difference_cell(full.difference if full else None),
        number_cell(c.mean("throughput", "tune_tokens_s", "median"), ",.0f"),
    ]


def _init_cells(init: Init) -> list[Cell]:
    alone, initial = init.sqnr_db
    return [
        Cell(init.configuration.title),
        Cell(init_name(init.name)),
        number_cell(alone, ".2f"),
        number_cell(initial, ".2f"),
        number_cell(init.perplexity, ".2f"),
        difference_cell(init.before),
        tuned_perplexity_cell(init.configuration),
        difference_cell(init.after),
    ]


def _merged_cells(m: MergedAdapters) -> list[Cell]:
    return [
        Cell(m.configuration.title),
        Cell("separate" if m.is_separate else m.name),
        number_cell(m.bits, ".3f"),
        number_cell(m.model_bytes, ",.1f", scale=1e-6),
        number_cell(m.perplexity, ".2f"),
        difference_cell(m.against),
    ]
