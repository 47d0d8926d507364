"""What a person sees while a run goes on: a bar a phase, with its time; and the seconds each phase took."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)


class Phases:
    """`with phases("quantize", total) as advance:` draws a bar and takes the time; `seconds` has them all.

    Where the output is no terminal a finished phase is one line.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str, title: str, total: float | None = None) -> Iterator[Callable[..., None]]:
        columns = [
            TextColumn("{task.description}", table_column=None),
            BarColumn(bar_width=24),
            MofNCompleteColumn() if total and total < 1e5 else TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        ]
        started = time.perf_counter()
        live = console.is_terminal
        with Progress(*columns, console=console, disable=not live, transient=False) as progress:
            task = progress.add_task(f"{title:<28}", total=total, note="")

            def advance(amount: float = 1, note: str = "") -> None:
                progress.update(task, advance=amount, note=note)

            try:
                yield advance
                progress.update(task, completed=total or 1, total=total or 1)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
        if not live:
            console.print(f"{title:<28} {time.perf_counter() - started:6.1f} s")
