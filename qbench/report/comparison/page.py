"""The report of a comparison: one page that opens offline, its Markdown twin, and every number as Parquet and CSV."""

import base64
import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import numpy as np
from markupsafe import Markup

from qbench.report.wording import count, escaped
from qbench.report.wording import title as titled
from qbench.results import dataframe
from qbench.system.messages import all_visible, visible

from . import charts, extra_tables, findings, table
from .configurations import Setting, compare, lacking

if TYPE_CHECKING:
    import pandas

PAGE, TWIN = "report.html", "report.md"
_LISTS = (list, tuple, np.ndarray)
ROWS = 400  #: rows of a table before the page keeps to the frontier and the best


@dataclass
class Found:
    """What lies at the paths. results: all, by file, as `collect` has them. settings: the finished ones compared. failed:
    the others. shown: all, with every text in them `visible`, as the settings and those that failed have it too.
    """

    results: dict[Path, dict]
    shown: dict[Path, dict]
    settings: list[Setting]
    failed: dict[Path, dict]
    unreadable: dict[Path, str]


def find(*paths: Path) -> Found:
    """Everything under the paths that is a result, whatever state it is in."""
    results, unreadable = dataframe.collect(*paths)
    for file, result in list(results.items()):
        if result["status"] == "done" and (found := lacking(result)):
            unreadable[file] = f"{visible(str(file))} says it is done but lacks what a comparison needs: {found}"
            del results[file]
    shown = {file: all_visible(result) for file, result in results.items()}
    failed = {file: result for file, result in shown.items() if result["status"] != "done"}
    return Found(results, shown, compare(shown), failed, unreadable)


def write(found: Found, folder: Path) -> Path:
    """Write the page and all that goes with it into `folder`; returns the page. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = _numbers(found.results)
    with (folder / "results.parquet").open("wb") as file:  # by a name, pyarrow opens only those that are UTF-8
        numbers.to_parquet(file, index=False)
    numbers.to_csv(folder / "results.csv", index=False)
    content = _content(found, folder)
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    for name, finalize in ((PAGE, None), (TWIN, _in_markdown)):
        environment = jinja2.Environment(loader=loader, autoescape=True, finalize=finalize, keep_trailing_newline=True)
        (folder / name).write_text(environment.get_template(f"page{Path(name).suffix}").render(content), "utf-8")
    return folder / PAGE


def _in_markdown(value: object) -> Markup:
    return value if isinstance(value, Markup) else Markup(escaped(str(value)))


def _numbers(results: dict[Path, dict]) -> "pandas.DataFrame":
    """What has one value a run, as Parquet takes it: one type a column."""
    frame = dataframe.as_frame(results)
    frame = frame[[name for name in frame if not frame[name].map(lambda cell: isinstance(cell, _LISTS)).any()]]
    texts = {name for name in frame if frame[name].dtype.kind == "O"}
    return frame.assign(**{name: frame[name].map(_text) for name in texts})


def _text(cell: object) -> str | None:
    return None if cell is None or cell != cell else str(cell)


def _content(found: Found, folder: Path) -> dict:
    """What the templates show."""
    finished = len(found.results) - len(found.failed)
    names = {c.format for s in found.settings for c in s.configurations if not c.is_16_bit}
    parts = [count(finished, "finished run")] + ([count(len(names), "format")] if names else [])
    parts += [f"{len(found.failed)} not finished"] if found.failed else []
    parts += [f"{count(len(found.unreadable), 'file')} skipped"] if found.unreadable else []
    return {
        "title": "Weight quantization formats compared",
        "counted": ", ".join(parts) + ".",
        "settings": [_setting(s, i, folder) for i, s in enumerate(found.settings)],
        "note": findings.note(found.settings),
        "failures": [_failure(file, result, folder) for file, result in found.failed.items()],
        "unreadable": list(found.unreadable.values()),
        "environments": _environments(found),
    }


def _setting(setting: Setting, number: int, folder: Path) -> dict:
    answer = list(findings.answer(setting))
    if len(setting.configurations) > ROWS:
        answer.append(f"The table has the best {ROWS} of {len(setting.configurations):,}; results.csv has all.")
    with charts.drawn(setting) as made:
        pictures = [_picture(chart, number, folder) for chart in made]
    return {
        "title": setting.title,
        "compared": findings.compared(setting),
        "answer": answer,
        "table": _table(table.shown(setting), folder),
        "tables": [_table(found, folder) for found in extra_tables.all_of(setting)],
        "charts": pictures,
    }


def _table(found: table.Table, folder: Path) -> dict:
    rows = [
        {"cells": r.cells, "base": r.configuration.is_16_bit, "sources": table.sources(r.configuration, folder)}
        for i, r in enumerate(found.rows)
        if i < ROWS or r.configuration.is_16_bit
    ]
    return {"title": found.title, "about": found.about, "columns": found.columns, "rows": rows}


def _picture(chart: charts.Chart, number: int, folder: Path) -> dict:
    """A figure as an SVG file for the twin, and in the page itself."""
    buffer = io.BytesIO()
    chart.figure.savefig(buffer, format="svg", metadata={"Date": None})
    file = Path("figures") / f"{chart.name}{f'-{number + 1}' if number else ''}.svg"
    (folder / file.parent).mkdir(exist_ok=True)
    (folder / file).write_bytes(buffer.getvalue())
    data = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"caption": chart.caption, "file": file.as_posix(), "data": data}


def _failure(file: Path, result: dict, folder: Path) -> dict:
    why = result["error"] or {"type": "unfinished", "message": "the process ended before the run did"}
    try:
        name = f"{titled(result['config'])}, seed {result['config']['seed']}"
    except (KeyError, TypeError):  # what was asked for was no configuration
        name = visible(file.parent.name)
    message = " ".join(str(why["message"]).split())
    return {
        "title": name,
        "status": result["status"],
        "why": f"{why['type']}: {message}",
        "path": table.link(file, folder),
    }


def _environments(found: Found) -> list[str]:
    """Each machine and set of versions that runs were made with, the most used first."""
    lines: Counter[str] = Counter()
    for result in found.shown.values():
        environment = result["environment"]
        if environment:
            versions = ", ".join(f"{name} {number}" for name, number in environment["versions"].items() if number)
            commit = f"; commit {environment['commit'][:12]}" if environment.get("commit") else ""
            lines[f"{environment['device']}, {count(environment['threads'], 'thread')}; {versions}{commit}"] += 1
    return [f"{count(number, 'run')}: {line}" for line, number in lines.most_common()]
