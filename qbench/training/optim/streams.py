"""Copies pages while the device computes: on two CUDA streams, or, without a GPU, at once.

A stream runs its work in order. "in" copies pages to the device, "out" copies them back, and updates run on the caller's
current stream. So copies run in both directions at once, as PCIe allows, and during the updates.

An event marks a point of a stream. A stream can wait for an event of another, and the caller's thread does not wait.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Event = Any  #: a torch.cuda.Event, or None if work is done at once


class Synchronous:
    """Copies at once, on a device without streams. The same pages move, but nothing overlaps."""

    def __init__(self, device: torch.device):
        self.device = device

    def record(self) -> Event:
        """An event after all work given to the current stream so far."""

    def wait(self, event: Event) -> None:
        """Make the current stream wait for `event`."""

    def run(self, stream: str, work: Callable[[], object], *after: Event) -> Event:
        """Run `work` on stream "in" or "out", after the events `after`; returns the event of its end."""
        work()

    def synchronize(self, event: Event) -> None:
        """Make the caller's thread wait for `event`."""

    def device_memory(self, nbytes: int) -> Tensor:
        """Uninitialised uint8 [nbytes] on the device."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def host_memory(self, nbytes: int) -> Tensor:
        """Uninitialised uint8 [nbytes] in host memory."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


class CudaStreams(Synchronous):
    """Two streams of a CUDA device. Host memory is pinned: other memory is not copied asynchronously.

    Memory may be freed while a copy uses it. `record_stream` tells the allocator which streams use device memory; for
    pinned memory PyTorch's copy does so itself.
    """

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.streams = {"in": torch.cuda.Stream(device), "out": torch.cuda.Stream(device)}

    def record(self) -> Event:
        return torch.cuda.current_stream(self.device).record_event()

    def wait(self, event: Event) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def run(self, stream: str, work: Callable[[], object], *after: Event) -> Event:
        cuda_stream = self.streams[stream]
        for event in after:
            if event is not None:
                cuda_stream.wait_event(event)
        with torch.cuda.stream(cuda_stream):
            work()
        return cuda_stream.record_event()

    def synchronize(self, event: Event) -> None:
        event.synchronize()

    def device_memory(self, nbytes: int) -> Tensor:
        memory = super().device_memory(nbytes)
        for stream in self.streams.values():
            memory.record_stream(stream)
        return memory

    def host_memory(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)


def open_streams(device: torch.device) -> Synchronous:
    return CudaStreams(device) if device.type == "cuda" else Synchronous(device)
