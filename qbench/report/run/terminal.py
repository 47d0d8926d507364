"""The end of a run in the terminal: the answer in sentences, then its tables."""

import os
from pathlib import Path

from rich import table as rich_table
from rich.console import Console
from rich.text import Text

from qbench.report.defaults import fill_defaults
from qbench.report.run import answer, tables
from qbench.report.table import Table
from qbench.report.wording import STAGES, format_number, recipe_name
from qbench.results import schema
from qbench.system.messages import sanitize, sanitize_all


def show(result: dict, folder: Path, console: Console | None = None) -> None:
    """Print a finished run. folder: where its result.json is."""
    console = console or Console()
    result, place = sanitize_all(result), sanitize(os.path.relpath(folder))
    console.print()
    if problem := schema.why_incomparable(result):
        _print_text(f"{place}/result.json says that the run is done, but it is incomplete: {problem}", console)
        return
    result["config"] = fill_defaults(result["config"])
    for sentence in answer.describe_run(result):
        _print_text(sentence, console)
    scores, tasks = tables.scores_table(result), tables.tasks_table(result)
    _print_table(scores, console)
    _print_text(f"\n{scores.note} {answer.describe_speed(result)}", console, "dim")
    if tasks:
        _print_table(tasks, console)
        _print_text(f"\n{tasks.note}", console, "dim")
    _print_text(f"\nFigures are in {place}/report.md, all numbers in {place}/result.json.", console)


def show_line(result: dict, before: bool, console: Console | None = None) -> None:
    """Print a run of a sweep in one line. before: whether an earlier command had finished it."""
    console = console or Console(soft_wrap=True)
    config, quality = sanitize_all(result["config"]), result["metrics"]["quality"]
    scores = ", ".join(
        f"{stage} {format_number(quality[stage]['perplexity'], '.2f')}" for stage in STAGES if stage in quality
    )
    line = f"{recipe_name(config)}, seed {config['seed']}: perplexity {scores}{' (done before)' * before}"
    _print_text(line, console, "dim" if before else "bold")


def _print_text(text: str, console: Console, style: str = "") -> None:
    console.print(Text(text), style=style)  # a plain string would be parsed for markup and emoji


def _print_table(table: Table, console: Console) -> None:
    printed = rich_table.Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for i, head in enumerate(table.heads):
        printed.add_column(Text(head), justify="right" if i else "left", no_wrap=bool(i))
    for texts in table.texts:
        printed.add_row(*map(Text, texts))
    console.print()
    console.print(printed)
