"""Paging makes the fewest moves, and no order of the streams mixes pages up."""

from collections import deque
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbench.training.optim import PagedAdamW, states, streams
from qbench.training.optim.paging import Pager, PagingStats
from tests.qbench.training.optim.steps import NUMBERS, PAGE, parameters, same, train


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 8, 9])
def test_the_moves_are_the_fewest(slots):
    pages, steps = 8, 5
    weights = [torch.nn.Parameter(torch.zeros(pages * PAGE // 8))]
    ours = PagedAdamW(weights, page=PAGE, budget=slots * PAGE)
    for step in range(1, steps + 1):
        train(ours, 1)
        stats, missing = ours.paging, max(pages - slots, 0)
        assert (stats.pages_in, stats.pages_out) == ((step - 1) * missing, step * missing)
        assert (stats.bytes_in, stats.bytes_out) == (stats.pages_in * PAGE, stats.pages_out * PAGE)
        assert (stats.pages, stats.resident, stats.page_bytes) == (pages, min(slots, pages), PAGE)
        assert stats.peak_bytes == min(slots, pages) * PAGE


def test_a_page_that_is_not_needed_makes_room():
    weights = parameters([(PAGE // 8,)] * 3)
    ours = PagedAdamW(weights, page=PAGE, budget=2 * PAGE)
    train(ours, 1)
    for step in range(4):
        for i, p in enumerate(weights):
            p.grad = torch.ones_like(p) if i < 2 else None
        before = ours.paging.pages_in
        ours.step()
        assert ours.paging.pages_in - before == (step == 0), "two pages in two slots stay"


class Simulated(streams.Synchronous):
    """Streams that run their work at random times: each in order, and none before the events it waits for."""

    def __init__(self, chance):
        super().__init__(torch.device("cpu"))
        self.chance = chance
        self.queues = {"in": deque(), "out": deque(), "compute": deque()}
        self.pace = {name: chance.choice([0.02, 0.3, 1.0]) for name in self.queues}

    def record(self):
        return self.run("compute", lambda: None)

    def wait(self, event):
        self.queues["compute"].append(lambda: event["done"])

    def run(self, stream, work, *after):
        event = {"done": False}
        self.queues[stream].extend(lambda waited=waited: waited["done"] for waited in after if waited is not None)
        self.queues[stream].append(lambda: (work(), event.update(done=True)))
        return event

    def synchronize(self, event):
        while not event["done"]:
            self.advance()

    def advance(self):
        for name, queue in self.queues.items():
            while queue and self.chance.random() < self.pace[name] and queue[0]():
                queue.popleft()

    def device_memory(self, nbytes):
        return super().device_memory(nbytes).fill_(self.chance.randrange(256))


def triple_and_add(x, by):
    x.mul_(3).add_(by)


@settings(max_examples=100, deadline=None)
@given(chance=st.randoms(use_true_random=False), pages=st.integers(1, 7), slots=st.integers(1, 8))
def test_no_order_of_the_streams_mixes_pages_up(chance, pages, slots):
    simulated = Simulated(chance)
    pager = Pager(simulated, PAGE, slots * PAGE, PagingStats())
    pager.allocate([(states.Moments(torch.float64), 256)] * pages)
    expected = [0] * pages
    for _ in range(6):
        wanted = [page for page in range(pages) if chance.random() < 0.8]
        for page, memory in pager.visit(wanted):
            expected[page] = 3 * expected[page] + page + 1
            simulated.run("compute", partial(triple_and_add, memory.view(torch.float64), page + 1))
            for _ in range(chance.randrange(4)):
                simulated.advance()
    simulated.synchronize(simulated.record())
    for page in range(pages):
        assert pager.read(page, 0, PAGE).view(torch.float64).tolist() == [expected[page]] * (PAGE // 8)


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_gpu
@pytest.mark.parametrize("bits", [8, 32])
def test_late_work_and_late_copies_do_not_change_bits(bits):
    """Kernels that are delayed in the stream still find the right pages."""
    shapes = [(300, 1000), (70, 70)]
    trained = []
    for budget in (None, "64KiB", "192KiB"):
        ours = PagedAdamW(parameters(shapes, device="cuda"), **NUMBERS, bits=bits, page="64KiB", budget=budget)
        ps = ours.param_groups[0]["params"]
        for step in range(20):
            generator = torch.Generator("cuda").manual_seed(step)
            torch.cuda._sleep(10**6 * (step % 3))
            for p in ps:
                p.grad = torch.randn(p.shape, generator=generator, device="cuda")
            ours.step()
            junk = [torch.full((2**14,), 7.0, device="cuda") for _ in range(8)]  # reuses memory that was freed
            del junk
        trained.append([p.detach().clone() for p in ps])
    assert same(trained[0], trained[1]) and same(trained[0], trained[2])


@on_gpu
def test_a_step_does_not_wait_for_the_device_and_copies_run_beside_kernels():
    ours = PagedAdamW(parameters([(2000, 1000)], device="cuda"), page="1MiB", budget="4MiB")
    train(ours, 2)
    for _ in range(2):  # pinning memory waits for the device; the second late step reuses the memory of the first
        torch.cuda._sleep(10**8)
        ours.step()
        torch.cuda.synchronize()
    (memory, _) = next(iter(next(iter(ours._pagers.values()))._on_host.values()))
    assert memory.is_pinned()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.cuda._sleep(10**8)
        ours.step()
        assert not torch.cuda.current_stream().query(), "the step waited for the device"
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    copies = {way: [e.time_range for e in events if way in e.name] for way in ("HtoD", "DtoH")}
    assert all(len(ranges) >= 8 for ranges in copies.values())
    both = [(i, o) for i in copies["HtoD"] for o in copies["DtoH"] if i.start < o.end and o.start < i.end]
    assert both, "pages go one way at a time"
