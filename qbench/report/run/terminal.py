"""The end of a run in the terminal: the answer in words, then one table."""

import os
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qbench.report import wording
from qbench.report.comparison import tasks
from qbench.report.comparison.config_keys import completed
from qbench.results import schema
from qbench.system.messages import all_visible, visible


def show(result: dict, folder: Path, console: Console | None = None) -> None:
    console = console or Console()
    result, place = all_visible(result), visible(os.path.relpath(folder))
    console.print()
    if found := schema.lacking(result):
        _say(f"{place}/result.json says that the run is done but lacks what a page needs: {found}", console)
        return
    result["config"] = completed(result["config"])
    for sentence in (*wording.answer(result), *tasks.answer_of_run(result)):
        _say(sentence, console)
    table, scores = wording.table(result), tasks.of_run(result)
    _print(table, console)
    _say(f"\n{table.note} {wording.speed(result)}", console, "dim")
    if scores:
        _print(scores, console)
        _say(f"\n{scores.note}", console, "dim")
    _say(f"\nFigures in {place}/report.md, all numbers in result.json beside it.", console)


def _say(text: str, console: Console, style: str = "") -> None:
    console.print(Text(text), style=style)  # rich reads markup and emoji into a plain string


def _print(found: wording.Table, console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for i, head in enumerate(found.columns):
        table.add_column(Text(head), justify="right" if i else "left", no_wrap=bool(i))
    for row in found.rows:
        table.add_row(*map(Text, row))
    console.print()
    console.print(table)


def show_line(result: dict, before: bool, console: Console | None = None) -> None:
    """A run among others, in a line. before: whether it was done before."""
    console = console or Console(soft_wrap=True)
    config, quality = all_visible(result["config"]), result["metrics"]["quality"]
    scores = ", ".join(
        f"{name} {wording.number(quality[name]['perplexity'], '.2f')}" for name in wording.STAGES if name in quality
    )
    title = f"{wording.title(config)}, seed {config['seed']}"
    _say(f"{title}: perplexity {scores}{' (done before)' * before}", console, "dim" if before else "bold")
