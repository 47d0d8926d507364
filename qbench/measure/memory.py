"""The peak memory of a phase of a run."""

import re
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]


class PeakMemory:
    """Measures the peak memory between entering and leaving, into `bytes`.

    On CUDA {"allocated", "reserved"}, of the device, from PyTorch's allocator. On a CPU {"rss"}, the peak of the process's
    resident set. Linux can reset that peak; on other systems it is the peak since the process began.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: dict[str, int] = {}

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _CLEAR_REFS.exists():
            with suppress(OSError):  # a container may forbid it: then the peak of the whole process is an upper bound
                _CLEAR_REFS.write_text("5", "utf-8")
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.bytes = {
                "allocated": torch.cuda.max_memory_allocated(self.device),
                "reserved": torch.cuda.max_memory_reserved(self.device),
            }
        else:
            self.bytes = {"rss": _peak_rss()}


_CLEAR_REFS = Path("/proc/self/clear_refs")


def _peak_rss() -> int:
    status = Path("/proc/self/status")
    if status.exists() and (match := re.search(r"VmHWM:\s+(\d+) kB", status.read_text("utf-8"))):
        return int(match[1]) * 1024
    if resource is None:
        memory = psutil.Process().memory_info()
        return getattr(memory, "peak_wset", memory.rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
