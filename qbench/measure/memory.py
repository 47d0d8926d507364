"""Peak memory of a phase."""

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
    """The peak between entering and leaving, in `bytes`.

    On CUDA {"allocated", "reserved"} of the device, from PyTorch's allocator. On a CPU {"rss"}: the resident set of the
    process, of which Linux keeps the peak and lets a process reset its own. Elsewhere the peak since the process began.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes: dict[str, int] = {}

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        elif _CLEAR.exists():
            with suppress(OSError):  # a container may forbid it: the peak is then the process's own, an upper bound
                _CLEAR.write_text("5", "utf-8")
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


_CLEAR = Path("/proc/self/clear_refs")


def _peak_rss() -> int:
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text("utf-8"))):
        return int(found[1]) * 1024
    if resource is None:
        held = psutil.Process().memory_info()
        return getattr(held, "peak_wset", held.rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
