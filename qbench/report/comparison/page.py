"""Writes the report of a comparison: an HTML page that works offline, the same in Markdown, and all numbers as tables."""

import base64
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import numpy as np
from markupsafe import Markup

from qbench.report.table import Table
from qbench.report.wording import count, escape_markdown, recipe_name
from qbench.results import dataframe
from qbench.system.messages import sanitize, sanitize_all

from . import charts, extra_tables, findings, main_table
from .configurations import Setting
from .grouping import find_problem, group_runs
from .links import link_to, list_sources

if TYPE_CHECKING:
    import pandas

HTML, MARKDOWN = "report.html", "report.md"
MOST_ROWS = 400  #: rows of a table on the page; results.csv has all
#: figures that answer a question on their own; the others are in the HTML page alone
IN_MARKDOWN = {"pareto", "slopes", "blocks", "ranks", "learning_rates", "methods", "initialisation"}
_LISTS = (list, tuple, np.ndarray)


@dataclass
class Collection:
    """The results under some paths.

    results: all of them, by file. printable: the same, with control characters escaped in every text. settings: the
    finished ones, compared. unfinished: the others. unreadable: why a file is not a result, by file.
    """

    results: dict[Path, dict]
    printable: dict[Path, dict]
    settings: list[Setting]
    unfinished: dict[Path, dict]
    unreadable: dict[Path, str]


def collect(*paths: Path) -> Collection:
    """Read and compare all results at or under the paths. Raises InputError for a path that does not exist."""
    results, unreadable = dataframe.read_results(*paths)
    for file, result in list(results.items()):
        if result["status"] == "done" and (problem := find_problem(result)):
            unreadable[file] = f"{sanitize(str(file))} says that the run is done, but it is incomplete: {problem}"
            del results[file]
    printable = {file: sanitize_all(result) for file, result in results.items()}
    unfinished = {file: result for file, result in printable.items() if result["status"] != "done"}
    return Collection(results, printable, group_runs(printable), unfinished, unreadable)


def write(collection: Collection, folder: Path) -> Path:
    """Write the page and its figures and tables into `folder`; returns the path of the page. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = _scalar_columns(collection.results)
    with (folder / "results.parquet").open("wb") as file:  # pyarrow itself opens only names in UTF-8
        numbers.to_parquet(file, index=False)
    numbers.to_csv(folder / "results.csv", index=False)
    content = _page_content(collection, folder)
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    for name, finalize in ((HTML, None), (MARKDOWN, _escape_in_markdown)):
        environment = jinja2.Environment(loader=loader, autoescape=True, finalize=finalize, keep_trailing_newline=True)
        (folder / name).write_text(environment.get_template(f"page{Path(name).suffix}").render(content), "utf-8")
    return folder / HTML


def _escape_in_markdown(value: object) -> Markup:
    return value if isinstance(value, Markup) else Markup(escape_markdown(str(value)))


def _scalar_columns(results: dict[Path, dict]) -> "pandas.DataFrame":
    """A row for each run, without the columns that hold lists. Columns of mixed types become texts, as Parquet needs."""
    frame = dataframe.to_dataframe(results)
    frame = frame[[name for name in frame if not frame[name].map(lambda cell: isinstance(cell, _LISTS)).any()]]
    mixed = {name for name in frame if frame[name].dtype.kind == "O"}
    return frame.assign(**{name: frame[name].map(_to_text) for name in mixed})


def _to_text(cell: object) -> str | None:
    return None if cell is None or cell != cell else str(cell)  # NaN differs from itself


def _page_content(collection: Collection, folder: Path) -> dict:
    """The variables of the templates."""
    finished = len(collection.results) - len(collection.unfinished)
    formats = {c.format for s in collection.settings for c in s.configurations if not c.is_16_bit}
    counts = [count(finished, "finished run")]
    if formats:
        counts.append(count(len(formats), "format"))
    if collection.unfinished:
        counts.append(f"{len(collection.unfinished)} not finished")
    if collection.unreadable:
        counts.append(f"{count(len(collection.unreadable), 'file')} skipped")
    return {
        "title": "Weight quantization formats compared",
        "counted": ", ".join(counts) + ".",
        "settings": [_setting_content(s, i, folder) for i, s in enumerate(collection.settings)],
        "note": findings.reading_note(collection.settings),
        "failures": [_failure_content(file, result, folder) for file, result in collection.unfinished.items()],
        "unreadable": list(collection.unreadable.values()),
        "environments": _describe_environments(collection),
    }


def _setting_content(setting: Setting, index: int, folder: Path) -> dict:
    answer = list(findings.describe_findings(setting))
    if len(setting.configurations) > MOST_ROWS:
        answer.append(f"The table has the best {MOST_ROWS} of {len(setting.configurations):,}; results.csv has all.")
    with charts.draw_charts(setting) as drawn:
        pictures = [_save_picture(chart, index, folder) for chart in drawn]
    return {
        "title": setting.title,
        "compared": findings.describe_setup(setting),
        "answer": answer,
        "table": _table_content(main_table.build_table(setting), folder),
        "tables": [_table_content(table, folder) for table in extra_tables.build_tables(setting)],
        "charts": pictures,
    }


def _table_content(table: Table, folder: Path) -> dict:
    rows = [
        {
            "cells": row.cells,
            "base": row.is_16_bit,
            "sources": list_sources(row.files, folder),
        }
        for i, row in enumerate(table.rows)
        if i < MOST_ROWS or row.is_16_bit
    ]
    return {"title": table.title, "note": table.note, "columns": table.columns, "rows": rows}


def _save_picture(chart: charts.Chart, index: int, folder: Path) -> dict:
    """Embed a figure for the HTML page, and save those of IN_MARKDOWN as SVG files. index: of the setting."""
    buffer = io.BytesIO()
    chart.figure.savefig(buffer, format="svg", metadata={"Date": None})
    file = Path("figures") / f"{chart.name}{f'-{index + 1}' if index else ''}.svg"
    saved = chart.name in IN_MARKDOWN
    if saved:
        (folder / file.parent).mkdir(exist_ok=True)
        (folder / file).write_bytes(buffer.getvalue())
    data = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"caption": chart.caption, "file": file.as_posix() if saved else None, "data": data}


def _failure_content(file: Path, result: dict, folder: Path) -> dict:
    error = result["error"] or {"type": "unfinished", "message": "the process ended before the run did"}
    try:
        title = f"{recipe_name(result['config'])}, seed {result['config']['seed']}"
    except (KeyError, TypeError):  # a run that failed early has an unchecked config
        title = sanitize(file.parent.name)
    message = " ".join(str(error["message"]).split())
    return {
        "title": title,
        "status": result["status"],
        "why": f"{error['type']}: {message}",
        "path": link_to(file, folder),
    }


def _describe_environments(collection: Collection) -> list[str]:
    """Each machine and set of versions that runs were made with; the most frequent comes first."""
    lines: Counter[str] = Counter()
    for result in collection.printable.values():
        environment = result["environment"]
        if environment:
            versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
            commit = f"; commit {environment['commit'][:12]}" if environment.get("commit") else ""
            lines[f"{environment['device']}, {count(environment['threads'], 'thread')}; {versions}{commit}"] += 1
    return [f"{count(number, 'run')}: {line}" for line, number in lines.most_common()]
