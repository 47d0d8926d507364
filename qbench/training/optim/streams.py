"""What copies pages beside the computing: two streams of a GPU, or nobody.

A lane does its work in order. `compute` is whatever stream the caller works on; `"in"` and `"out"` are lanes of their
own, so that pages go both ways at once, as PCIe can. An event tells that a lane has come so far; work that needs a page
waits for events, never for time, and the caller's thread waits for none.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Event = Any  #: what a lane hands out and waits for: a torch.cuda.Event, or None where all is done at once


class Inline:
    """Where there is no second stream, all is done at once: the same pages move, none of them meanwhile."""

    def __init__(self, device: torch.device):
        self.device = device

    def now(self) -> Event:
        """What has been given to `compute` up to here."""

    def wait(self, event: Event) -> None:
        """Let `compute` go on once `event` has happened."""

    def beside(self, lane: str, work: Callable[[], object], *after: Event) -> Event:
        """Do `work` on a lane, "in" or "out", once the events `after` have happened; returns when it is done."""
        work()

    def finish(self, event: Event) -> None:
        """Let the caller's thread wait until `event` has happened."""

    def device_memory(self, nbytes: int) -> Tensor:
        """Uninitialised uint8 [nbytes] where the states are used."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def host_memory(self, nbytes: int) -> Tensor:
        """Uninitialised uint8 [nbytes] where pages go."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


class Streams(Inline):
    """Two streams of a CUDA device, and pinned memory, which alone is copied while the thread goes on.

    Memory handed out may be freed while a copy is under way: of the device's, `record_stream` tells the allocator who
    else uses it; of pinned memory, PyTorch's copy tells by itself.
    """

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.lanes = {"in": torch.cuda.Stream(device), "out": torch.cuda.Stream(device)}

    def now(self) -> Event:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, event: Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def beside(self, lane: str, work: Callable[[], object], *after: Event) -> Event:
        stream = self.lanes[lane]
        for event in after:
            if event is not None:
                stream.wait_event(event)
        with torch.cuda.stream(stream):
            work()
        return stream.record_event()

    def finish(self, event: Event) -> None:
        event.synchronize()

    def device_memory(self, nbytes: int) -> Tensor:
        memory = super().device_memory(nbytes)
        for stream in self.lanes.values():
            memory.record_stream(stream)
        return memory

    def host_memory(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)


def lanes_of(device: torch.device) -> Inline:
    return Streams(device) if device.type == "cuda" else Inline(device)
