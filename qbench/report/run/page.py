"""report.md: one run on one page."""

import json
from pathlib import Path

from qbench.report.run import answer, figures, tables
from qbench.report.wording import escape_markdown, format_number, recipe_name
from qbench.system.messages import sanitize_all


def write(folder: Path, result: dict) -> Path:
    """Write report.md and its figures into `folder` from a finished result; returns the path of report.md."""
    result = sanitize_all(result)
    images = figures.draw(result, folder)
    config, scores, tasks = result["config"], tables.scores_table(result), tables.tasks_table(result)
    lines = [
        f"# {escape_markdown(recipe_name(config))} on {escape_markdown(config['model']['path'] or 'the bundled model')}",
        "",
        *map(escape_markdown, answer.describe_run(result)),
        "",
        *scores.to_markdown(),
        "",
        f"{scores.note} {escape_markdown(answer.describe_speed(result))}",
        "",
        *(("## Tasks", "", *tasks.to_markdown(), "", tasks.note, "") if tasks else ()),
        *(line for file, caption in images for line in (f"![{caption}]({file})", "", caption, "")),
        *_error_section(result["metrics"]["error"]),
        *_memory_section(result["metrics"]["memory"]),
        *_environment_section(result),
    ]
    page = folder / "report.md"
    page.write_text("\n".join(lines), "utf-8")
    return page


def _error_section(error: dict) -> list[str]:
    numbers = [format_number(error[key], ".4g") for key in ("mse", "relative", "max_abs", "output_relative")]
    return [
        "## Error",
        "",
        "| SQNR, dB | mse | relative | largest | output, relative |",
        "|---|---|---|---|---|",
        f"| {error['sqnr_db'] and round(error['sqnr_db'], 3)} | {' | '.join(numbers)} |",
        "",
    ]


def _memory_section(memory: dict) -> list[str]:
    peaks = [
        f"| {phase} | {', '.join(f'{kind} {nbytes / 1e6:,.0f}' for kind, nbytes in peak.items())} |"
        for phase, peak in memory["peak_bytes"].items()
    ]
    return [
        "## Memory",
        "",
        f"The quantized weights take {memory['weights_bytes']:,} bytes, the whole model {memory['model_bytes']:,}; before"
        f" quantization it took {memory['baseline_bytes']:,}. Peak of each phase:",
        "",
        "| phase | peak, MB |",
        "|---|---|",
        *peaks,
        "",
    ]


def _environment_section(result: dict) -> list[str]:
    environment, run = result["environment"], result["run"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items() if version)
    return [
        "## How it was run",
        "",
        escape_markdown(f"{environment['device']}, {environment['threads']} threads; ")
        + escape_markdown(versions)
        + f"; run {run['id']}, {run['started']}, {sum(run['seconds'].values()):.1f} s.",
        "",
        "```json",
        json.dumps(result["config"], indent=1),
        "```",
        "",
    ]
