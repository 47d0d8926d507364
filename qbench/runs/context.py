"""The context that all steps of a run share."""

from dataclasses import dataclass
from pathlib import Path

import torch

from qbench.model import devices
from qbench.settings import Settings

from .progress import Phases

ADAPTER, BASE = "adapter", "base"  #: subfolder of a run for its adapters, and in it one for their base model


@dataclass(frozen=True)
class RunContext:
    """The context that all steps of a run share.

    settings: what the user asked for. folder: where the run writes. device, dtype: of the 16-bit model.
    phases: times the phases, and draws their bars. result: becomes result.json. Each step adds its measurements to it, so
    a failed run keeps the earlier ones.
    """

    settings: Settings
    folder: Path
    device: torch.device
    dtype: torch.dtype
    phases: Phases
    result: dict

    @classmethod
    def start(cls, settings: Settings, folder: Path, result: dict) -> "RunContext":
        """Pick device and dtype. Seconds and memory peaks of the phases go into `result`. Raises InputError."""
        device = devices.pick_device(settings.device)
        dtype = devices.pick_dtype(settings.model.dtype, device)
        phases = Phases(device)
        result["metrics"] |= {"memory": {"peak_bytes": phases.peak_bytes}, "throughput": {}, "quality": {}}
        result["run"]["seconds"] = phases.seconds
        return cls(settings, folder, device, dtype, phases, result)

    @property
    def metrics(self) -> dict:
        """The measurements in `result`."""
        return self.result["metrics"]
