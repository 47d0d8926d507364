"""python -m qbench report PATH…: compare finished runs, on a page with tables and figures.

The paths are result.json files, or folders that contain them, of any mix of runs and sweeps. Runs on the same model, text
and windows are compared with the 16-bit runs among them, before and after the fine-tune. The differences are paired over
the same tokens and seeds. The answer and a table go to standard output. The files report.html, report.md, results.parquet
and results.csv go into the folder `report` in the first path, or into that of --out.
"""

import os
import sys
from contextlib import suppress

from qbench.errors import InputError
from qbench.report.comparison import findings, main_table, page
from qbench.report.wording import count, escape_markdown
from qbench.system import messages
from qbench.system.messages import sanitize

from .arguments import parse
from .console import stderr

HEADS = ["format", "bits/weight", "SQNR, dB", "perplexity", "Δ nll", "KL", "tuned perplexity", "tuned Δ nll"]
MOST_SKIPPED = 20  #: messages about skipped files


def main() -> int:
    """Returns 0 if the report was written, 1 if it could not be, 2 if there is nothing to report."""
    messages.replace_unencodable()
    try:
        arguments = parse("qbench.cli.report", sys.argv[1:])
        with stderr.status("reading results"):
            collection = page.collect(*arguments.paths)
    except InputError as error:
        stderr.print(f"qbench: {error}")
        return 2
    reasons = list(collection.unreadable.values())
    for reason in reasons[:MOST_SKIPPED]:
        stderr.print(f"qbench: skipped: {reason}")
    if len(reasons) > MOST_SKIPPED:
        stderr.print(f"qbench: skipped {len(reasons) - MOST_SKIPPED} more")
    if not collection.settings:
        stderr.print(f"qbench: no finished run under {sanitize(', '.join(map(str, arguments.paths)))}")
        return 2
    first = arguments.paths[0]
    out = arguments.out or (first if first.is_dir() else first.parent) / "report"
    try:
        with stderr.status("drawing the report"):
            written = page.write(collection, out)
    except OSError as error:
        stderr.print(f"qbench: {sanitize(str(out))} cannot be written: {error.strerror or error}")
        return 1
    with suppress(BrokenPipeError):  # the reader of a pipe, such as `head`, may stop early
        print_report(collection)
        sys.stdout.flush()
    if collection.unfinished:
        stderr.print(f"qbench: {count(len(collection.unfinished), 'run')} not finished; the page says why")
    stderr.print(
        f"\nThe page is {sanitize(os.path.relpath(written))}. Beside it are report.md, results.parquet and results.csv."
    )
    return 0


def print_report(collection: page.Collection) -> None:
    """Print the findings and the main columns of the table as Markdown."""
    for setting in collection.settings:
        print(f"## {escape_markdown(setting.title)}\n\n{escape_markdown(findings.describe_setup(setting))}\n")
        print("\n".join(f"- {escape_markdown(text)}" for text in findings.describe_findings(setting)), end="\n\n")
        print("\n".join(main_table.build_table(setting, HEADS).to_markdown()), end="\n\n")
    print(findings.reading_note(collection.settings))
