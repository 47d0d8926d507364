"""Times calls, and measures the ceilings of the device to compare the times with."""

import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

GRAPH_SECONDS = 1e-3  # a captured graph runs this long, or holds MOST_LAUNCHES, so that its start and end do not count
MOST_LAUNCHES = 100


def copies_beyond_cache(device: torch.device, nbytes: int) -> int:
    """The number of copies of a weight that, used in turn, push each other out of the last cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 32 << 20
    return min(max(2, -(-2 * cache // nbytes)), MOST_LAUNCHES)


def time_calls(device: torch.device, calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Seconds a call: `repeats` samples, each the mean over `calls`, which do the same work on different copies.

    On CUDA the calls are captured in a graph, and events time its replays.
    """
    for call in calls:
        call()
    if device.type == "cuda":
        return _time_replays(device, calls, repeats)
    samples = []
    for _ in range(repeats):
        started = time.perf_counter()
        for call in calls:
            call()
        samples.append((time.perf_counter() - started) / len(calls))
    return samples


def _time_replays(device: torch.device, calls: Sequence[Callable[[], object]], repeats: int) -> list[float]:
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
    except RuntimeError:  # a call that synchronizes cannot be captured in a graph, so its launch time is included
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
    """Bytes a second of a large copy (reads and writes), and operations a second of a large bf16 product."""
    nbytes, size = (1 << 30, 8192) if device.type == "cuda" else (1 << 27, 1024)
    source = torch.randint(0, 127, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = statistics.median(time_calls(device, [lambda: target.copy_(source)], repeats))
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = statistics.median(time_calls(device, [lambda: a @ b], repeats))
    return {"copy_bytes_s": 2 * nbytes / copy, "matmul_flop_s": 2 * size**3 / product}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖, in float64."""
    return float((actual.double() - expected).norm() / expected.norm())
