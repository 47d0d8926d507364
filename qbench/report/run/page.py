"""report.md: one run on one page."""

import json
from pathlib import Path

from qbench.report import figures, wording
from qbench.report.comparison import tasks
from qbench.report.wording import escaped
from qbench.system.messages import all_visible


def write(folder: Path, result: dict) -> Path:
    """Write report.md and its figures into `folder` from a finished result."""
    drawn = figures.draw(result := all_visible(result), folder)
    table, scores = wording.table(result), tasks.of_run(result)
    config, environment = result["config"], result["environment"]
    error, memory = result["metrics"]["error"], result["metrics"]["memory"]
    lines = [
        f"# {escaped(wording.title(config))} on {escaped(config['model']['path'] or 'the bundled model')}",
        "",
        *map(escaped, (*wording.answer(result), *tasks.answer_of_run(result))),
        "",
        *table.markdown(),
        "",
        f"{table.note} {escaped(wording.speed(result))}",
        "",
        *(("## Tasks", "", *scores.markdown(), "", scores.note, "") if scores else ()),
        *(line for name, caption in drawn for line in (f"![{caption}]({name})", "", caption, "")),
        "## Error",
        "",
        "| SQNR, dB | mse | relative | largest | output, relative |",
        "|---|---|---|---|---|",
        f"| {error['sqnr_db'] and round(error['sqnr_db'], 3)} |"
        + "".join(
            f" {wording.number(error[key], '.4g')} |" for key in ("mse", "relative", "max_abs", "output_relative")
        ),
        "",
        "## Memory",
        "",
        f"Quantized weights {memory['weights_bytes']:,} bytes; model {memory['model_bytes']:,}, before"
        f" {memory['baseline_bytes']:,}. Peak by phase:",
        "",
        "| phase | peak, MB |",
        "|---|---|",
        *(
            f"| {phase} | {', '.join(f'{kind} {count / 1e6:,.0f}' for kind, count in peak.items())} |"
            for phase, peak in memory["peak_bytes"].items()
        ),
        "",
        "## How it was run",
        "",
        escaped(f"{environment['device']}, {environment['threads']} threads; ")
        + escaped(", ".join(f"{name} {number}" for name, number in environment["versions"].items() if number))
        + f"; run {result['run']['id']}, {result['run']['started']}, "
        + f"{sum(result['run']['seconds'].values()):.1f} s.",
        "",
        "```json",
        json.dumps(config, indent=1),
        "```",
        "",
    ]
    page = folder / "report.md"
    page.write_text("\n".join(lines), "utf-8")
    return page
