"""Timing, and what a timing is measured against: the ceilings of the device, in the same run."""

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

GRAPH_SECONDS = 1e-3  # a captured graph lasts at least this long, or holds MOST_LAUNCHES, so that its ends do not show
MOST_LAUNCHES = 100


def turns(device: torch.device, nbytes: int) -> int:
    """How many copies of a weight of `nbytes` bytes, taking turns, leave none of it in the last cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 32 << 20
    return min(max(2, -(-2 * cache // nbytes)), MOST_LAUNCHES)


def seconds(device: torch.device, calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Seconds a call, `repeats` samples, each over all `calls`: the same work on inputs that take turns.

    On CUDA the calls are captured in a graph, and its replays timed by events.
    """
    for call in calls:
        call()
    if device.type == "cuda":
        return _replays(device, calls, repeats)
    samples = []
    for _ in range(repeats):
        started = time.perf_counter()
        for call in calls:
            call()
        samples.append((time.perf_counter() - started) / len(calls))
    return samples


def _replays(device: torch.device, calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for call in calls:
        call()
    torch.cuda.synchronize(device)
    rounds = int(GRAPH_SECONDS / (time.perf_counter() - started)) + 1
    rounds = max(min(rounds, MOST_LAUNCHES // len(calls)), 1)

    def run() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
        replay = graph.replay
    except RuntimeError:  # a peer that waits for the device cannot be captured: its launches are then part of its time
        torch.cuda.synchronize(device)
        replay = run
    replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        replay()
        mark.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1e3 / (rounds * len(calls)) for begin, end in pairwise(marks)]


def ceilings(device: torch.device, repeats: int = 10) -> dict[str, float]:
    """Bytes a second of a large copy, read and written, and operations a second of a large bf16 product."""
    nbytes, size = (1 << 30, 8192) if device.type == "cuda" else (1 << 27, 1024)
    source = torch.randint(0, 127, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = statistics.median(seconds(device, [lambda: target.copy_(source)], repeats))
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = statistics.median(seconds(device, [lambda: a @ b], repeats))
    return {"copy_bytes_s": 2 * nbytes / copy, "matmul_flop_s": 2 * size**3 / product}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, in float64."""
    return float((found.double() - expected).norm() / expected.norm())
