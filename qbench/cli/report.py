"""python -m qbench.report PATH…: a comparison of finished runs, as a page, its Markdown twin, and tables.

The paths are result.json files or folders above them, any mix of runs and sweeps. Runs on the same model, text and windows
are compared with the 16-bit runs among them, before and after the fine-tune, paired over windows of the same tokens and
over seeds. The answer and a table go to standard output; report.html, report.md, results.parquet and results.csv into the
folder `report` in the first path, or that of --out.
"""

import os
import sys
from contextlib import suppress

from qbench.errors import InputError
from qbench.report import wording
from qbench.report.comparison import findings, page, table
from qbench.report.wording import escaped
from qbench.system import messages
from qbench.system.messages import visible

from .arguments import parse
from .console import stderr

TERMINAL = ["format", "bits/weight", "SQNR, dB", "perplexity", "Δ nll", "KL", "tuned perplexity", "tuned Δ nll"]


def main() -> int:
    """0: written; 2: there is nothing to write of."""
    messages.printable()
    try:
        arguments = parse("qbench.cli.report", sys.argv[1:])
        with stderr.status("reading results"):
            found = page.find(*arguments.paths)
    except InputError as error:
        stderr.print(f"qbench: {error}")
        return 2
    for reason in list(found.unreadable.values())[:20]:
        stderr.print(f"qbench: skipped: {reason}")
    if len(found.unreadable) > 20:
        stderr.print(f"qbench: skipped {len(found.unreadable) - 20} more")
    if not found.settings:
        stderr.print(f"qbench: no finished run under {visible(', '.join(map(str, arguments.paths)))}")
        return 2
    first = arguments.paths[0]
    out = arguments.out or (first if first.is_dir() else first.parent) / "report"
    try:
        with stderr.status("drawing the report"):
            written = page.write(found, out)
    except OSError as error:
        stderr.print(f"qbench: {visible(str(out))} cannot be written: {error.strerror or error}")
        return 1
    with suppress(BrokenPipeError):  # whoever reads the output may have enough of it
        show(found)
        sys.stdout.flush()
    if found.failed:
        stderr.print(f"qbench: not finished: {wording.count(len(found.failed), 'run')}; the page says why")
    stderr.print(
        f"\n{visible(os.path.relpath(written))} is the page; report.md, results.parquet and results.csv are beside it"
    )
    return 0


def show(results: page.Found) -> None:
    """Print the answers, and the most telling columns as Markdown."""
    for setting in results.settings:
        print(f"## {escaped(setting.title)}\n\n{escaped(findings.compared(setting))}\n")
        print("\n".join(f"- {escaped(sentence)}" for sentence in findings.answer(setting)), end="\n\n")
        found = table.shown(setting, TERMINAL)
        print("| " + " | ".join(column.head for column in found.columns) + " |")
        print("|---" * len(found.columns) + "|")
        for row in found.rows:
            print("| " + " | ".join(escaped(cell.text) for cell in row.cells) + " |")
        print()
    print(findings.note(results.settings))
