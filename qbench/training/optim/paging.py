"""Pages of optimizer states, of which a budget's worth is on the device and the rest in pinned host memory.

QLoRA (arXiv 2305.14314, section 3) keeps optimizer states in NVIDIA's unified memory, where a page comes when a kernel
misses it. Here the memory is plain, the order of use is known, and a page is sent for before it is needed.

**Which pages stay.** A step uses every page once. Least recently used, the policy of unified memory, is the worst there
is: with one slot too few, each page leaves just before its turn, and all P of them come in, each step. For a fixed order
the best that any policy can do is P(P − C)/(P − 1) (Belady's, C slots). But the updates of pages know nothing of each
other, so the order is ours: **a step begins with the pages that are on the device**, and hands each slot, once used, to a
page that is not. The last C of a step are the first of the next, and there come in, and go out, each

    moves per step = max(P − C, 0)

of which none can be spared: all P have to be on the device during a step, and it begins with C of them.

**How they move.** The slot of the page used j-th is for the page used (j + C)-th: its write-back and the read-in that
follows have the time of the C − 1 updates between. With one slot nothing overlaps; from two on, a page goes out, one
comes in and one is updated at the same time. A page lives in one place: host memory is held for pages that are out, and
none is where all of them fit; one that was never used is not even there, it is zeros once it has a slot.
"""

from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from .states import GRAIN, States
from .streams import Event, Inline

PAGE = "2MiB"  #: a copy of 40 µs over PCIe 5, which hides the 10 µs of starting it, and a small part of any budget


@dataclass
class Paging:
    """What the states of an optimizer take, and what moved since it was made; pages and bytes, of all devices.

    page_bytes: of a page, the last may be filled less. peak_bytes: most that was ever on the device. resident: pages
    that are there. in: host to device, out: device to host.
    """

    page_bytes: int = 0
    peak_bytes: int = 0
    pages: int = 0
    resident: int = 0
    pages_in: int = 0
    pages_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


class Piece(NamedTuple):
    """Elements start … stop − 1 of a tensor, and where their states lie: in which page, from which byte on."""

    page: int
    offset: int
    start: int
    stop: int


@dataclass
class Slot:
    """Memory for one page. settled: tells that the latest use of it, whichever lane's, is over."""

    memory: Tensor
    settled: Event


class Pager:
    """The pages of one device. budget: bytes on the device, None for any number. counts: is kept up to date."""

    def __init__(self, lanes: Inline, page: int, budget: int | None, counts: Paging):
        self.lanes, self.page, self.counts = lanes, page, counts
        counts.page_bytes = max(counts.page_bytes, page)
        self.slots = None if budget is None else budget // page
        self.used: list[int] = []  # bytes of each page that hold states
        self._here: dict[int, Slot] = {}
        self._away: dict[int, tuple[Tensor, Event]] = {}

    def place(self, tensors: Iterable[tuple[States, int]]) -> list[list[Piece]]:
        """Give tensors, of so many elements each, a place in new pages, one after another; zeros are in it."""
        placed, before = [], len(self.used)
        for states, n in tensors:
            pieces, start = [], 0
            while start < n:
                room = self.page - self.used[-1] if len(self.used) > before else 0
                size = _fitting(states, n - start, room)
                if not size:
                    self.used.append(0)
                    continue
                pieces.append(Piece(len(self.used) - 1, self.used[-1], start, start + size))
                self.used[-1] += states.nbytes(size)
                start += size
            placed.append(pieces)
        self.counts.pages += len(self.used) - before
        return placed

    def visit(self, pages: Iterable[int]) -> Iterator[tuple[int, Tensor]]:
        """Each of `pages` once, in the order that moves fewest: its number, and its memory on the device, uint8 [page].

        The memory is the caller's, to read and to write on the current stream, until the next one is asked for.
        """
        wanted = dict.fromkeys(pages)
        ready = deque(page for page in wanted if page in self._here)
        coming = deque(page for page in wanted if page not in self._here)
        idle = [page for page in self._here if page not in wanted]
        while coming and (slot := self._spare(coming[0], idle)):
            ready.append(self._enter(coming.popleft(), slot))
        while ready:
            page = ready.popleft()
            slot = self._here[page]
            self.lanes.wait(slot.settled)
            yield page, slot.memory
            slot.settled = self.lanes.now()
            if coming:
                ready.append(self._enter(coming.popleft(), self._leave(page)))

    def read(self, page: int, start: int, stop: int) -> Tensor:
        """Bytes start … stop − 1 of a page, on the CPU, not to be written to; the page stays where it is."""
        if page in self._here:
            self.lanes.wait(self._here[page].settled)
            return self._here[page].memory[start:stop].cpu()
        return self._host(page)[start:stop]

    def write(self, page: int, start: int, values: Tensor) -> None:
        """Put uint8 `values`, on the CPU, into a page that is not on the device, from byte `start` on."""
        self._host(page)[start : start + len(values)] = values

    def _host(self, page: int) -> Tensor:
        if page not in self._away:
            self._away[page] = self.lanes.host_memory(self.used[page]).zero_(), self.lanes.now()
        memory, left = self._away[page]
        self.lanes.finish(left)
        return memory

    def _spare(self, page: int, idle: list[int]) -> Slot | None:
        """A slot for `page` that no page needs in this step: a new one within the budget, or that of an idle page."""
        if self.slots is None or len(self._here) < self.slots:
            nbytes = self.used[page] if self.slots is None else self.page
            self.counts.peak_bytes += nbytes
            # what owned the memory before may still have kernels waiting for the caller's stream
            return Slot(self.lanes.device_memory(nbytes), self.lanes.now())
        return self._leave(idle.pop()) if idle else None

    def _enter(self, page: int, slot: Slot) -> int:
        n = self.used[page]
        memory, left = self._away.pop(page, (None, None))

        def fill() -> None:
            slot.memory[:n].zero_() if memory is None else slot.memory[:n].copy_(memory, non_blocking=True)

        slot.settled = self.lanes.beside("in", fill, slot.settled, left)
        self._here[page] = slot
        self.counts.resident += 1
        if memory is not None:
            self.counts.pages_in += 1
            self.counts.bytes_in += n
        return page

    def _leave(self, page: int) -> Slot:
        memory = self.lanes.host_memory(self.used[page])
        n, slot = self.used[page], self._here.pop(page)
        slot.settled = self.lanes.beside("out", lambda: memory.copy_(slot.memory[:n], non_blocking=True), slot.settled)
        self._away[page] = memory, slot.settled
        self.counts.resident -= 1
        self.counts.pages_out += 1
        self.counts.bytes_out += n
        return slot


def _fitting(states: States, n: int, room: int) -> int:
    """How many of `n` elements have room for their states in so many bytes: all, or a multiple of GRAIN."""
    if states.nbytes(n) <= room:
        return n
    return GRAIN * (bisect_right(range(n // GRAIN + 1), room, key=lambda grains: states.nbytes(GRAIN * grains)) - 1)
