"""The terminal output of a sweep: which run begins, the time left, and at the end a table of all runs."""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qbench import keys
from qbench.errors import InputError
from qbench.results import store
from qbench.system.messages import sanitize

HEADS = "run", "bits/weight", "perplexity", "tuned perplexity", "status"


outcomes: list["Outcome"] = []  #: outcomes of all runs of the command line


@dataclass(frozen=True)
class Outcome:
    """The outcome of a run. code: 0 done, 1 failed, 2 bad input, 130 interrupted. why: the reason that it is not done.

    Each process that creates or unpickles an outcome adds it to `outcomes`. So an outcome from a launcher's process also
    reaches the process that started the launcher.
    """

    folder: Path
    code: int
    why: str

    def __post_init__(self) -> None:
        outcomes.append(self)

    def __reduce__(self) -> tuple:
        return Outcome, (self.folder, self.code, self.why)


@dataclass
class Progress:
    """How far a sweep is, in the process that runs its jobs one after another.

    total: runs of the sweep; None in a launcher's process, which does not know it. seconds: duration of each run so far.
    """

    total: int | None = None
    seconds: list[float] = field(default_factory=list)

    def describe(self, number: int, folder: Path) -> str:
        """The line that announces a run: `run 3 of 12, about 4 min left: nf4_block64_…`. number: from 0."""
        position = f"run {number + 1}{f' of {self.total}' if self.total else ''}"
        left = ""
        if self.total and self.seconds:
            mean = sum(self.seconds) / len(self.seconds)
            left = f", about {describe_seconds(mean * (self.total - number))} left"
        return f"{position}{left}: {sanitize(folder.name)}"


def describe_seconds(seconds: float) -> str:
    """A duration with two digits, such as `40 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def show_table(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print a row for each run. Long cells are wrapped, not cut."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in HEADS:
        table.add_column(head, justify="left" if head in ("run", "status") else "right", overflow="fold")
    results = [_read(outcome.folder) for outcome in outcomes]
    differing = differing_keys(result["config"] for result in results if result)
    for outcome, result in zip(outcomes, results, strict=True):
        table.add_row(*map(Text, _cells(outcome, result, differing)))
    console.print()
    console.print(table)


def differing_keys(configs: Iterable[dict]) -> list[str]:
    """The keys whose values differ between configs, except those of the format. `auto`, as in a failed run, is ignored."""
    leaves = [keys.leaves(config) for config in configs]
    names = dict.fromkeys(key for values in leaves for key in values)
    ours = [key for key in names if key not in ("block", "dq", "device") and not key.startswith("format")]
    return [key for key in ours if len({repr(v[key]) for v in leaves if key in v and v[key] != "auto"}) > 1]


def _read(folder: Path) -> dict | None:
    with suppress(OSError, InputError):
        return store.read(folder)
    return None


def _cells(outcome: Outcome, result: dict | None, differing: Sequence[str]) -> list[str]:
    """The row of a run. The result of a run that failed early may lack any key."""
    from qbench.report import wording

    name, bits, perplexity, tuned = sanitize(os.path.basename(outcome.folder)), "", "", ""
    status = "done" if outcome.code == 0 else "not done"
    if result:
        with suppress(KeyError, TypeError):  # a run that failed early has its configuration as typed
            values = keys.leaves(result["config"])
            settings = [f"{key}={values[key]}" for key in differing if key in values]
            name = sanitize(", ".join([wording.recipe_name(result["config"]), *settings]))
        metrics = result["metrics"]
        with suppress(KeyError, TypeError):
            bits = wording.format_number(metrics["bits"]["per_parameter"], ".3f")
        quality = metrics.get("quality", {})
        if "quantized" in quality:
            perplexity = wording.format_number(quality["quantized"]["perplexity"], ".2f")
        if "tuned" in quality:
            tuned = wording.format_number(quality["tuned"]["perplexity"], ".2f")
        if outcome.code and result["error"]:
            status = sanitize(result["error"]["type"], 30)
    return [name, bits, perplexity, tuned, status]
