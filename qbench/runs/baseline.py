"""The 16-bit model's scores, and its logits token by token: measured once for all runs of a sweep that share them."""

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

FOUND = "found.json"


@dataclass
class Baseline:
    """found: what was measured beside the scores, as JSON. folder: where files that go with it lie. reused: whether
    measured by another run."""

    scores: Scores
    found: dict
    logits: BaselineLogits
    folder: Path
    reused: bool


def obtain(
    key: str, store: Path | None, scratch: Path, measure: Callable[[BaselineLogits, Path], tuple[Scores, dict]]
) -> Baseline:
    """The baseline `key` from the folder `store`, or measured, and left there for the next who asks.

    measure: gets the file for the logits, and a folder for others; without a store that is `scratch`.

    Where another process is measuring it, this one waits. Without a store the logits lie nameless in the folder `scratch`,
    and go with the process however that ends. Raises OSError where the disk is full.
    """
    if store is None:
        scratch.mkdir(parents=True, exist_ok=True)
        logits = BaselineLogits(tempfile.TemporaryFile(dir=scratch))
        return Baseline(*measure(logits, scratch), logits, scratch, reused=False)
    place = store / key
    store.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if reused := (place / FOUND).is_file():
            return _opened(place, reused)
        partial = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=store))
        try:
            with (partial / "logits").open("w+b") as file:
                logits = BaselineLogits(file)
                scores, found = measure(logits, partial)
            np.save(partial / "nll.npy", scores.nll)
            json_files.write_json(partial / FOUND, {**found, "logits": logits.kind})
            shutil.rmtree(place, ignore_errors=True)
            os.replace(partial, place)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return _opened(place, reused)


def _opened(place: Path, reused: bool) -> Baseline:
    found = json_files.read_json(place / FOUND)
    dtype, shape = found.pop("logits")
    logits = BaselineLogits((place / "logits").open("rb"), getattr(torch, dtype), shape)
    return Baseline(Scores(np.load(place / "nll.npy")), found, logits, place, reused)


def clear(store: Path) -> None:
    """Remove a store, unless a process is measuring for it."""
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
