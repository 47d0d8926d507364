"""The end of a run in the terminal: the answer in words, then one table."""

import os
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import tasks, words


def show(result: dict, folder: Path, console: Console | None = None) -> None:
    console = console or Console(highlight=False)
    console.print()
    for sentence in (*words.answer(result), *tasks.answer_of_run(result)):
        console.print(sentence)
    found, scores = words.table(result), tasks.of_run(result)
    _print(found, console)
    console.print(f"\n{found.note} {words.speed(result)}", style="dim")
    if scores:
        _print(scores, console)
        console.print(f"\n{scores.note}", style="dim")
    console.print(f"\nFigures in {os.path.relpath(folder)}/report.md, all numbers in result.json beside it.")


def _print(found: words.Table, console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for i, head in enumerate(found.columns):
        table.add_column(head, justify="right" if i else "left", no_wrap=bool(i))
    for row in found.rows:
        table.add_row(*row)
    console.print()
    console.print(table)


def show_line(result: dict, before: bool, console: Console | None = None) -> None:
    """A run among others, in a line. before: whether it was done before."""
    console = console or Console(highlight=False, soft_wrap=True)
    quality = result["metrics"]["quality"]
    scores = ", ".join(f"{name} {quality[name]['perplexity']:.2f}" for name in quality)
    title = f"{words.title(result['config'])}, seed {result['config']['seed']}"
    console.print(f"{title}: perplexity {scores}{' (done before)' * before}", style="dim" if before else "bold")
