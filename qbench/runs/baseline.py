"""The measurements of a 16-bit model, shared by the runs of a sweep: its scores, and its logits for each token."""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from qbench.measure.quality import BaselineLogits, Scores
from qbench.results import json_files

COSTS = "costs.json"  #: in the folder of a baseline, with nll.npy, logits, and the files of `measure`


@dataclass
class Baseline:
    """The measurements of a 16-bit model.

    costs: its speed and memory peaks, as JSON. folder: holds further files, such as the scores of tasks.
    reused: whether another run measured it.
    """

    scores: Scores
    costs: dict
    logits: BaselineLogits
    folder: Path
    reused: bool


def obtain(
    key: str, store: Path | None, scratch: Path, measure: Callable[[BaselineLogits, Path], tuple[Scores, dict]]
) -> Baseline:
    """Read the baseline `key` from the folder `store`, or measure it and save it there for the next run.

    measure: receives the file for the logits and a folder for other files. Returns scores and costs.

    Waits while another process measures the same baseline. Without a store, other files go into `scratch`, and the logits
    are written to an unlinked temporary file there, which disappears with the process. Raises OSError if the disk is full.
    """
    if store is None:
        scratch.mkdir(parents=True, exist_ok=True)
        logits = BaselineLogits(tempfile.TemporaryFile(dir=scratch))
        return Baseline(*measure(logits, scratch), logits, scratch, reused=False)
    place = store / key
    store.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if reused := (place / COSTS).is_file():
            return _read(place, reused)
        partial = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=store))
        try:
            with (partial / "logits").open("w+b") as file:
                logits = BaselineLogits(file)
                scores, costs = measure(logits, partial)
            np.save(partial / "nll.npy", scores.nll)
            json_files.write_json(partial / COSTS, {**costs, "logits": logits.kind})
            shutil.rmtree(place, ignore_errors=True)
            os.replace(partial, place)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return _read(place, reused)


def _read(place: Path, reused: bool) -> Baseline:
    costs = json_files.read_json(place / COSTS)
    dtype, shape = costs.pop("logits")
    logits = BaselineLogits((place / "logits").open("rb"), getattr(torch, dtype), shape)
    return Baseline(Scores(np.load(place / "nll.npy")), costs, logits, place, reused)


def clear(store: Path) -> None:
    """Remove the folder of shared baselines, unless a process is measuring one."""
    locks = [FileLock(file) for file in store.glob("*.lock")]
    try:
        for lock in locks:
            lock.acquire(blocking=False)
        shutil.rmtree(store, ignore_errors=True)
    except Timeout:
        pass
    finally:
        for lock in locks:
            lock.release()
