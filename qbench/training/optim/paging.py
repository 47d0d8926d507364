"""Pages of optimizer states: as many as the budget allows on the device, the others in pinned host memory.

QLoRA (arXiv 2305.14314, section 3) keeps optimizer states in NVIDIA's unified memory, where a page moves when a kernel
misses it. Here the order of use is known, so a page is copied before it is needed.

**Which pages stay.** A step uses every page once. Unified memory evicts the least recently used page, which is the worst
policy here: with one slot too few, each page leaves just before its turn, and all P pages move at every step. For a fixed
order, no policy needs fewer moves than P(P − C)/(P − 1) with C slots (Belady). But the updates of two pages are
independent, so we choose the order: **a step begins with the pages that are on the device.** After its use, each slot goes
to a page that is not on the device. The last C pages of a step are the first of the next. So the moves in, and the moves
out, are

    moves per step = max(P − C, 0)

No order needs fewer: all P pages must be on the device during a step, and it begins with C of them.

**How they move.** The slot of the j-th page goes to the (j + C)-th page. Its write-back and the next read overlap with the
C − 1 updates in between. With one slot nothing overlaps. With two or more, one page goes out, one comes in, and one is
updated at the same time.

**Where they are.** Host memory is allocated only for evicted pages. A page that was never used has no memory at all; it
is filled with zeros when it gets a slot.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .states import GRAIN, Moments
from .streams import Event, Synchronous

#: a copy of a page takes 40 µs over PCIe 5, which hides the 10 µs of the launch, and a page is a small part of a budget
PAGE = "2MiB"


@dataclass
class PagingStats:
    """Memory of an optimizer's states, and the pages moved since it was made; sums over all devices.

    page_bytes: size of a page; the last may hold less. peak_bytes: the most that was on the device. resident: pages on the
    device now. in: host to device; out: device to host.
    """

    page_bytes: int = 0
    peak_bytes: int = 0
    pages: int = 0
    resident: int = 0
    pages_in: int = 0
    pages_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


class PageSlice(NamedTuple):
    """Elements start … stop − 1 of a tensor, whose states begin at byte `offset` of a page."""

    page: int
    offset: int
    start: int
    stop: int


@dataclass
class Slot:
    """Device memory for one page. ready: the event after which it may be used, whichever stream used it last."""

    memory: Tensor
    ready: Event


class Pager:
    """The pages of one device. budget: bytes on the device, None for no limit. stats: updated as pages move."""

    def __init__(self, streams: Synchronous, page: int, budget: int | None, stats: PagingStats):
        self.streams, self.page, self.stats = streams, page, stats
        stats.page_bytes = max(stats.page_bytes, page)
        self.slots = None if budget is None else budget // page
        self.used: list[int] = []  # bytes of each page that hold states
        self._on_device: dict[int, Slot] = {}
        self._on_host: dict[int, tuple[Tensor, Event]] = {}

    def allocate(self, tensors: Iterable[tuple[Moments, int]]) -> list[list[PageSlice]]:
        """Put the zero states of tensors, each of n elements, one after another into new pages."""
        slices_of_each, before = [], len(self.used)
        for moments, n in tensors:
            slices, start = [], 0
            while start < n:
                room = self.page - self.used[-1] if len(self.used) > before else 0
                size = _count_fitting(moments, n - start, room)
                if not size:
                    self.used.append(0)
                    continue
                slices.append(PageSlice(len(self.used) - 1, self.used[-1], start, start + size))
                self.used[-1] += moments.nbytes(size)
                start += size
            slices_of_each.append(slices)
        self.stats.pages += len(self.used) - before
        return slices_of_each

    def visit(self, pages: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield each of `pages` once, in the order with the fewest moves: its number and device memory, uint8 [page].

        The caller may read and write the memory on the current stream until it asks for the next page.
        """
        wanted = dict.fromkeys(pages)
        resident = deque(page for page in wanted if page in self._on_device)
        waiting = deque(page for page in wanted if page not in self._on_device)
        idle = [page for page in self._on_device if page not in wanted]
        while waiting and (slot := self._spare_slot(waiting[0], idle)):
            resident.append(self._move_in(waiting.popleft(), slot))
        while resident:
            page = resident.popleft()
            slot = self._on_device[page]
            self.streams.wait(slot.ready)
            yield page, slot.memory
            slot.ready = self.streams.record()
            if waiting:
                resident.append(self._move_in(waiting.popleft(), self._move_out(page)))

    def read(self, page: int, start: int, stop: int) -> Tensor:
        """Bytes start … stop − 1 of a page, on the CPU and read-only; the page does not move."""
        if page in self._on_device:
            self.streams.wait(self._on_device[page].ready)
            return self._on_device[page].memory[start:stop].cpu()
        return self._host_memory(page)[start:stop]

    def write(self, page: int, start: int, values: Tensor) -> None:
        """Write uint8 `values` from the CPU, from byte `start` on, into a page that is not on the device."""
        self._host_memory(page)[start : start + len(values)] = values

    def _host_memory(self, page: int) -> Tensor:
        if page not in self._on_host:
            self._on_host[page] = self.streams.host_memory(self.used[page]).zero_(), self.streams.record()
        memory, written = self._on_host[page]
        self.streams.synchronize(written)
        return memory

    def _spare_slot(self, page: int, idle: list[int]) -> Slot | None:
        """A slot that no page needs in this step: a new one if the budget allows it, else that of an idle page."""
        if self.slots is None or len(self._on_device) < self.slots:
            nbytes = self.used[page] if self.slots is None else self.page
            self.stats.peak_bytes += nbytes
            # kernels on the current stream may still use the memory for its previous owner
            return Slot(self.streams.device_memory(nbytes), self.streams.record())
        return self._move_out(idle.pop()) if idle else None

    def _move_in(self, page: int, slot: Slot) -> int:
        """Start to copy `page` into `slot`, after the latest use of both; returns the page."""
        n = self.used[page]
        memory, written = self._on_host.pop(page, (None, None))

        def fill() -> None:
            slot.memory[:n].zero_() if memory is None else slot.memory[:n].copy_(memory, non_blocking=True)

        slot.ready = self.streams.run("in", fill, slot.ready, written)
        self._on_device[page] = slot
        self.stats.resident += 1
        if memory is not None:
            self.stats.pages_in += 1
            self.stats.bytes_in += n
        return page

    def _move_out(self, page: int) -> Slot:
        """Start to copy `page` to host memory; returns its slot, which is ready after the copy."""
        memory = self.streams.host_memory(self.used[page])
        n, slot = self.used[page], self._on_device.pop(page)
        slot.ready = self.streams.run("out", lambda: memory.copy_(slot.memory[:n], non_blocking=True), slot.ready)
        self._on_host[page] = memory, slot.ready
        self.stats.resident -= 1
        self.stats.pages_out += 1
        self.stats.bytes_out += n
        return slot


def _count_fitting(moments: Moments, n: int, room: int) -> int:
    """How many of `n` elements have states that fit in `room` bytes: all, or a multiple of GRAIN."""
    if moments.nbytes(n) <= room:
        return n
    grains = bisect_right(range(n // GRAIN + 1), room, key=lambda count: moments.nbytes(GRAIN * count)) - 1
    return GRAIN * grains
