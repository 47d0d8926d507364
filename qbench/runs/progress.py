"""The phases of a run: a progress bar for each, and the seconds and the peak memory that it took."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qbench.measure.memory import PeakMemory

console = Console(stderr=True, markup=False)


class Phases:
    """`with phases("quantize", "quantize to nf4", total) as advance:` draws a bar, which `advance(n, note)` moves.

    seconds, peak_bytes: of each phase by name, including one that failed. If the output is not a terminal, a phase prints
    one line when it finishes.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}
        self.peak_bytes: dict[str, dict[str, int]] = {}

    @contextmanager
    def __call__(self, name: str, title: str, total: float | None = None) -> Iterator[Callable[..., None]]:
        columns = [
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn() if total and total < 1e5 else TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
        ]
        started = time.perf_counter()
        live = console.is_terminal
        with Progress(*columns, console=console, disable=not live, transient=False) as progress:
            task = progress.add_task(f"{title:<28}", total=total, note="")

            def advance(amount: float = 1, note: str = "") -> None:
                progress.update(task, advance=amount, note=note)

            peak = PeakMemory(self.device)
            try:
                with peak:
                    yield advance
                progress.update(task, completed=total or 1, total=total or 1)
            finally:
                self.seconds[name] = time.perf_counter() - started
                self.peak_bytes[name] = peak.bytes
        if not live:
            console.print(f"{title:<28} {time.perf_counter() - started:6.1f} s")
