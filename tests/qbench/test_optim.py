"""AdamW in pages and in 8 bits: PyTorch's bits under any budget, the fewest moves there are, and the paper's 8 bits."""

from collections import deque
from functools import partial
from io import BytesIO

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formats.scales import dynamic_map
from qbench import optim
from qbench.errors import InputError, byte_count
from qbench.ops import cuda
from qbench.optim import PagedAdamW, adamw, lanes, states
from qbench.optim.paging import Pager, Paging
from qbench.settings import TuneSettings

PAGE = 4096
FIVE_BUDGETS = [PAGE, 2 * PAGE, 5 * PAGE + 17, 12 * PAGE, None]
SHAPES = [(40, 129), (7,), (0, 3), (33, 64), (), (2500,), (257, 5)]
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
NUMBERS = {"lr": 3e-3, "weight_decay": 0.1}
torch_adamw = partial(torch.optim.AdamW, foreach=False)


def parameters(shapes, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]


def train(optimizer, steps, seed=1, skip=False):
    """`steps` steps on random gradients of very different sizes; with `skip`, each parameter sits out every third."""
    generator = torch.Generator().manual_seed(seed)
    all_parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        for i, p in enumerate(all_parameters):
            grad = torch.randn(p.shape, generator=generator) * 10 ** torch.randn(p.shape, generator=generator)
            p.grad = None if skip and (step + i) % 3 == 0 else grad.to(p.device, p.dtype)
        optimizer.step()
    return all_parameters


def bits(t):
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.itemsize]
    return t.detach().cpu().nan_to_num(nan=7.0, posinf=float("inf"), neginf=-float("inf")).reshape(-1).view(integer)


def same(left, right):
    """Whether tensors are equal to the last bit, the sign of a zero included; a NaN is a NaN."""
    return all(torch.equal(bits(a), bits(b)) and a.shape == b.shape for a, b in zip(left, right, strict=True))


def same_states(left, right):
    """Whether two state_dicts hold the same steps and moments, to the bit."""
    left, right = left["state"], right["state"]
    names = ("step", "exp_avg", "exp_avg_sq")
    return left.keys() == right.keys() and all(same([left[i][name]], [right[i][name]]) for i in left for name in names)


# ---- the same bits ----


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("budget", FIVE_BUDGETS)
def test_200_steps_under_five_budgets_are_torchs_to_the_last_bit(budget, device):
    ours = PagedAdamW(parameters(SHAPES, device=device), **NUMBERS, budget=budget, page=PAGE)
    peers = [torch_adamw(parameters(SHAPES, device=device), **NUMBERS)]
    if device == "cpu":  # where the default is the same loop
        peers.append(torch.optim.AdamW(parameters(SHAPES, device=device), **NUMBERS))
    trained = train(ours, 200, skip=True)
    for peer in peers:
        assert same(trained, train(peer, 200, skip=True))
        assert same_states(ours.state_dict(), peer.state_dict())
    assert ours.paging.pages > 12
    if budget:
        assert ours.paging.peak_bytes == budget // PAGE * PAGE and ours.paging.pages_in > 0


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=5),
    page=st.integers(4096, 20000),
    over=st.integers(0, 60000) | st.none(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    betas=st.sampled_from([(0.9, 0.999), (0.0, 0.95), (0.3, 0.5)]),
    decay=st.sampled_from([0.0, 0.03]),
    skip=st.booleans(),
)
def test_any_shapes_pages_and_budgets(shapes, page, over, dtype, betas, decay, skip):
    numbers = {"lr": 1e-2, "betas": betas, "weight_decay": decay}
    ours = PagedAdamW(parameters(shapes, dtype), **numbers, page=page, budget=None if over is None else page + over)
    peer = torch_adamw(parameters(shapes, dtype), **numbers)
    assert same(train(ours, 5, skip=skip), train(peer, 5, skip=skip))
    assert same_states(ours.state_dict(), peer.state_dict())
    assert over is None or ours.paging.peak_bytes <= page + over


@settings(max_examples=15, deadline=None)
@given(n=st.integers(4000, 30000), page=st.integers(4096, 30000), over=st.integers(0, 60000), seed=st.integers(0, 99))
def test_8_bit_states_do_not_know_of_pages(n, page, over, seed):
    shapes = [(n,), (64, 64), (5,)]
    whole = PagedAdamW(parameters(shapes), bits=8)
    paged = PagedAdamW(parameters(shapes), bits=8, page=page, budget=page + over)
    assert same(train(whole, 4, seed), train(paged, 4, seed))
    assert whole.paging.pages == 1 and whole.paging.pages_in == whole.paging.pages_out == 0


def test_elementwise_kernels_round_alike_in_any_slice():
    """What the pages rest on: one piece or many, PyTorch's operations give an element the same bits."""
    generator = torch.Generator().manual_seed(0)
    p, grad, m, v = (torch.randn(5000, generator=generator) for _ in range(4))
    group = {"lr": 1.37e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.013}
    tensors = [p, grad, m, v.abs()]
    pieces = [[t.clone() for t in tensors] for _ in range(2)]
    adamw.update(*pieces[0], 3.0, group)
    for start in range(0, 5000, 256):
        adamw.update(*(t[start : start + 256] for t in pieces[1]), 3.0, group)
    assert same(*pieces)


# ---- which pages move ----


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 8, 9])
def test_the_moves_are_the_fewest(slots):
    pages, steps = 8, 5
    weights = [torch.nn.Parameter(torch.zeros(pages * PAGE // 8))]
    ours = PagedAdamW(weights, page=PAGE, budget=slots * PAGE)
    for step in range(1, steps + 1):
        train(ours, 1)
        found, missing = ours.paging, max(pages - slots, 0)
        assert (found.pages_in, found.pages_out) == ((step - 1) * missing, step * missing)
        assert (found.bytes_in, found.bytes_out) == (found.pages_in * PAGE, found.pages_out * PAGE)
        assert (found.pages, found.resident, found.page_bytes) == (pages, min(slots, pages), PAGE)
        assert found.peak_bytes == min(slots, pages) * PAGE


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


class Simulated(lanes.Inline):
    """Lanes that do their work when chance has it, as streams may: each in order, none before what it waits for."""

    def __init__(self, chance):
        super().__init__(torch.device("cpu"))
        self.chance = chance
        self.queues = {"in": deque(), "out": deque(), "compute": deque()}
        self.pace = {name: chance.choice([0.02, 0.3, 1.0]) for name in self.queues}

    def now(self):
        return self.beside("compute", lambda: None)

    def wait(self, event):
        self.queues["compute"].append(lambda: event["done"])

    def beside(self, lane, work, *after):
        event = {"done": False}
        self.queues[lane].extend(lambda waited=waited: waited["done"] for waited in after if waited is not None)
        self.queues[lane].append(lambda: (work(), event.update(done=True)))
        return event

    def finish(self, event):
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
    pager = Pager(simulated, PAGE, slots * PAGE, Paging())
    pager.place([(states.Plain(torch.float64), 256)] * pages)
    expected = [0] * pages
    for _ in range(6):
        wanted = [page for page in range(pages) if chance.random() < 0.8]
        for page, memory in pager.visit(wanted):
            expected[page] = 3 * expected[page] + page + 1
            simulated.beside("compute", partial(triple_and_add, memory.view(torch.float64), page + 1))
            for _ in range(chance.randrange(4)):
                simulated.advance()
    simulated.finish(simulated.now())
    for page in range(pages):
        assert pager.read(page, 0, PAGE).view(torch.float64).tolist() == [expected[page]] * (PAGE // 8)


# ---- 8 bits ----


def test_the_dynamic_maps_are_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for signed in (True, False):
        assert torch.equal(dynamic_map(signed=signed), functional.create_dynamic_map(signed=signed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_8_bit_steps_against_float64(dtype, device):
    n, (beta1, beta2), eps = 4096 + 700, (0.9, 0.999), 1e-8
    ours = PagedAdamW(parameters([(n,)], dtype, device), **NUMBERS, bits=8, page=4500, budget=4500)
    signed, unsigned = dynamic_map().double(), dynamic_map(signed=False).double()
    m = v = torch.zeros(n, dtype=torch.float64)
    for step in range(1, 9):
        before = ours.param_groups[0]["params"][0].detach().double().cpu()
        (p,) = train(ours, 1, seed=step)
        grad = p.grad.double().cpu()
        m, v = beta1 * m + (1 - beta1) * grad, beta2 * v + (1 - beta2) * grad**2
        root = (v / (1 - beta2**step)).sqrt() + eps
        expected = before * (1 - NUMBERS["lr"] * 0.1) - NUMBERS["lr"] * m / (1 - beta1**step) / root
        torch.testing.assert_close(p.detach().double().cpu(), expected, rtol=torch.finfo(dtype).eps, atol=1e-7)
        state = ours.state_dict()["state"][0]
        for name, exact, levels in (("exp_avg", m, signed), ("exp_avg_sq", v, unsigned)):
            blocks = torch.nn.functional.pad(exact, (0, -n % 256)).view(-1, 256)
            absmax, stored = state[f"{name}_absmax"].double()[:, None], state[name].double()
            torch.testing.assert_close(absmax, blocks.abs().amax(1, keepdim=True), rtol=1e-6, atol=0)
            errors = (blocks[..., None] / absmax[..., None] - (levels if name == "exp_avg" else levels[1:])).abs()
            found = (torch.nn.functional.pad(stored, (0, -n % 256)).view(-1, 256) - blocks).abs() / absmax
            assert (found <= errors.amin(2) + 1e-6).view(-1)[:n].all(), "not the nearest level"
        m, v = state["exp_avg"].double(), state["exp_avg_sq"].double()


def test_against_bitsandbytes():
    """Its CPU rounds to a grid before it looks for a level: near the middle of two, and near zero, levels differ."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    shapes = [(5000,), (100,)]  # the second stays fp32
    ours = PagedAdamW(parameters(shapes), **NUMBERS, bits=8, page=4500, budget=9000)
    theirs = bitsandbytes.optim.AdamW8bit(parameters(shapes), **NUMBERS)
    grads, start = torch.Generator().manual_seed(5), parameters(shapes)
    for step in range(1, 51):
        for i, shape in enumerate(shapes):
            grad = torch.randn(shape, generator=grads)
            for optimizer in (ours, theirs):
                optimizer.param_groups[0]["params"][i].grad = grad.clone()
        ours.step(), theirs.step()
        ps, qs = ours.param_groups[0]["params"], theirs.param_groups[0]["params"]
        if step == 1:
            assert same(ps[:1], qs[:1])
            told, state = ours.state_dict()["state"][0], theirs.state[qs[0]]
            for i, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
                assert torch.equal(told[f"{name}_absmax"], state[f"absmax{i}"])
                scale = state[f"absmax{i}"].repeat_interleave(256)[:5000]
                normal = state[f"qmap{i}"][state[f"state{i}"].int()]
                assert (normal * scale == told[name]).float().mean() > 0.96
                assert (normal - told[name] / scale).abs().max() < 0.0145, "more than one level apart"
        for p, q, x in zip(ps, qs, start, strict=True):
            assert (p - q).norm() <= 0.01 * (q - x).norm()
    torch.testing.assert_close(ps[1], qs[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("quiet", [1e-3, 1e-4, 1e-5])
def test_a_quiet_coordinate_among_loud_ones_does_not_run_away(quiet):
    """With a zero for its second moment it would move thousands of lr in one step."""
    p = torch.nn.Parameter(torch.zeros(4096))
    ours = PagedAdamW([p], lr=1.0, weight_decay=0, bits=8)
    generator, loud = torch.Generator().manual_seed(0), torch.arange(4096) % 256 == 0
    for step in range(100):
        before = p.detach().clone()
        p.grad = (1 + 0.3 * torch.randn(4096, generator=generator)) * torch.where(loud, 1, quiet)
        if step % 10 == 9:
            p.grad[~loud] = 0
        ours.step()
        assert (p.detach() - before).abs().max() < 4


def test_8_bit_learns_as_32_does():
    losses = {}
    for bits in (32, 8):
        a, b = torch.randn(128, 64, generator=torch.Generator().manual_seed(0)), parameters([(128, 64)])[0]
        ours = PagedAdamW([b], lr=0.05, weight_decay=0, bits=bits, page=PAGE, budget=2 * PAGE)
        for _ in range(80):
            loss = (b - a).square().mean()
            ours.zero_grad()
            loss.backward()
            ours.step()
        losses[bits] = loss.item()
    assert losses[8] < 2e-3 and losses[8] < 1.5 * losses[32] + 1e-4
    assert (ours.paging.pages - 1) * 0.9 * PAGE < 16.25 / 8 * b.numel() <= ours.paging.pages * PAGE


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here, and the test against float64 covers it")
def test_the_gpu_kernels_make_the_same_codes():
    m = torch.randn(700, generator=torch.Generator().manual_seed(0))
    for signed, values in ((True, m), (False, m.square() * 10 ** (4 * m))):
        book = states.codebook(torch.device("cpu"), signed)
        given = values, book.boundaries, book.order, 8, states.BLOCK, None, None
        assert same(cuda.quantize(*given), torch.ops.qbench.quantize(*given))
        codes, scale = cuda.quantize(*given)
        stored = codes, book.levels, [scale], [], 8, states.BLOCK, [700], torch.float32
        assert torch.equal(cuda.dequantize(*stored), torch.ops.qbench.dequantize(*stored))


# ---- a proper torch.optim.Optimizer ----


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_dict_comes_back_as_it_was(bits, dtype):
    shapes = [*SHAPES, (90, 70)]
    first = PagedAdamW(parameters(shapes, dtype), **NUMBERS, bits=bits, page=PAGE, budget=3 * PAGE)
    train(first, 7, skip=True)
    told = first.state_dict()
    second = PagedAdamW(parameters(shapes, dtype), lr=1, bits=bits, page=5000, budget=None)
    for p, q in zip(second.param_groups[0]["params"], first.param_groups[0]["params"], strict=True):
        p.data.copy_(q)
    second.load_state_dict(torch.load(_saved(told), weights_only=True))
    assert second.param_groups[0]["lr"] == NUMBERS["lr"]
    assert same_states(second.state_dict(), told) and same_states(first.state_dict(), told)
    assert same(train(first, 5, seed=9), train(second, 5, seed=9))


def _saved(state_dict):
    file = BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return file


def test_torchs_states_are_ours_and_ours_torchs():
    optimizers = [torch_adamw(parameters(SHAPES), **NUMBERS)]
    train(optimizers[0], 5)
    for make in (partial(PagedAdamW, page=PAGE, budget=PAGE), torch_adamw):
        optimizers.append(make(parameters(SHAPES)))
        for p, q in zip(*(o.param_groups[0]["params"] for o in optimizers[-2:]), strict=True):
            q.data.copy_(p)
        optimizers[-1].load_state_dict(optimizers[-2].state_dict())
    trained = [train(optimizer, 5, seed=3) for optimizer in optimizers]
    assert same(trained[0], trained[1]) and same(trained[0], trained[2])
    for make in (partial(PagedAdamW, bits=8), torch_adamw):  # through 8 bits, and back
        optimizers.append(make(parameters(SHAPES)))
        optimizers[-1].load_state_dict(optimizers[-2].state_dict())
    exact, rounded = optimizers[0].state_dict()["state"], optimizers[-1].state_dict()["state"]
    for i in exact:
        bound = exact[i]["exp_avg"].abs().max() * 0.02 if exact[i]["exp_avg"].numel() else 0
        assert ((exact[i]["exp_avg"] - rounded[i]["exp_avg"]).abs() <= bound).all()


def test_groups_schedules_layouts_and_late_parameters():
    trained = []
    for make in (torch_adamw, partial(PagedAdamW, page=PAGE, budget=2 * PAGE)):
        generator = torch.Generator().manual_seed(0)
        cubes = [torch.randn(60, 50, 6, generator=generator) for _ in range(4)]
        odd = [cubes[0].transpose(0, 2), cubes[1][:, ::2, 1], cubes[2][0, :, 0].bfloat16(), cubes[3][1].t().double()]
        groups = [torch.nn.Parameter(t) for t in odd]
        assert not groups[1].is_contiguous() and not groups[0].is_contiguous()
        optimizer = make([{"params": groups[:2], "weight_decay": 0.0}, {"params": groups[2:], "betas": (0.8, 0.9)}])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
        for step in range(10):
            if step == 4:
                groups.append(torch.nn.Parameter(torch.ones(700)))
                optimizer.add_param_group({"params": groups[-1:], "lr": 0.5})
            for p in groups:
                p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            loss = optimizer.step(lambda: 7)
            schedule.step()
        assert loss == 7
        trained.append((groups, optimizer.state_dict()))
    assert same(trained[0][0], trained[1][0]) and same_states(trained[0][1], trained[1][1])


def test_what_is_not_done_is_said():
    ours = PagedAdamW(parameters([(4, 4)]))
    for grad in (torch.eye(4).to_sparse(), None):
        if grad is None:
            ours.add_param_group({"params": torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))})
            ours.param_groups[1]["params"][0].grad = torch.ones(2, dtype=torch.complex64)
        else:
            ours.param_groups[0]["params"][0].grad = grad
        with pytest.raises(ValueError, match="complex"):
            ours.step()
        ours.zero_grad()
    state_dict = torch.optim.AdamW(parameters([(4, 4)]), amsgrad=True).state_dict()
    with pytest.raises(ValueError, match="amsgrad"):
        PagedAdamW(parameters([(4, 4)])).load_state_dict(state_dict)
    for wrong in ({"lr": -1}, {"betas": (1.0, 0.9)}, {"eps": -1.0}, {"bits": 4}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PagedAdamW(parameters([(4, 4)]), **wrong)


# ---- settings ----


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [(5000, 5000), ("5000", 5000), ("64MB", 64_000_000), ("1.5GiB", 3 * 2**29), ("8 kib", 8192), ("1e3", None)]
    + [(value, None) for value in ("", "MB", "-1MB", "4 parsecs", "1iB", True, None, 0, "0.0001kB")],
)
def test_byte_counts(value, nbytes):
    if nbytes:
        assert byte_count("x", value) == nbytes
    else:
        with pytest.raises(InputError, match=r"x: .*is not accepted; bytes are, such as .*64MB"):
            byte_count("x", value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"optimizer_budget": "1MiB"}, r"tune\.optimizer_budget: '1MiB' .*null or at least one page.*2MiB"),
        ({"optimizer_budget": "a lot"}, r"tune\.optimizer_budget: 'a lot' is not accepted; bytes are"),
        ({"optimizer_page": 4095}, r"tune\.optimizer_page: 4095 .*4096 or more"),
        (
            {"optimizer": "adamw", "optimizer_budget": "64MB"},
            r"tune\.optimizer_budget: '64MB' .*adamw; null is, or .*paged",
        ),
        ({"optimizer": "lion"}, r"tune\.optimizer: 'lion' .*paged_adamw_8bit"),
    ],
)
def test_bad_settings_are_one_line(wrong, message):
    with pytest.raises(InputError, match=message) as caught:
        TuneSettings(**{"optimizer": "paged_adamw", **wrong})
    assert "\n" not in str(caught.value)


def test_a_budget_below_a_page_is_refused_in_a_notebook_too():
    with pytest.raises(InputError, match=r"tune\.optimizer_budget: 4096 .*at least one page"):
        PagedAdamW(parameters([(9,)]), page=5000, budget=4096)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_every_optimizer_is_built_and_tells_its_footprint(name):
    paged = "paged" in name
    optimizer = optim.build(name, parameters([(100, 100)]), 0.1, 0.01, budget=8192 if paged else None, page=PAGE)
    train(optimizer, 2)
    whole = (0 if name == "sgd" else 2) * 10000 * (1 if "8bit" in name else 4)
    told = optim.footprint(optimizer)["peak_bytes"]
    assert told == 8192 if paged else whole <= told <= 1.02 * whole


# ---- on a GPU ----

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_gpu
@pytest.mark.parametrize("bits", [8, 32])
def test_late_work_and_late_copies_do_not_change_bits(bits):
    """Kernels that wait in the stream for a while find the pages that they are meant for."""
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
            junk = [torch.full((2**14,), 7.0, device="cuda") for _ in range(8)]  # asks for memory that was let go
            del junk
        trained.append([p.detach().clone() for p in ps])
    assert same(trained[0], trained[1]) and same(trained[0], trained[2])


@on_gpu
def test_a_step_does_not_wait_for_the_device_and_copies_run_beside_kernels():
    ours = PagedAdamW(parameters([(2000, 1000)], device="cuda"), page="1MiB", budget="4MiB")
    train(ours, 2)
    for _ in range(2):  # to pin memory waits for the device: the first late step may, the next has that of the first
        torch.cuda._sleep(10**8)
        ours.step()
        torch.cuda.synchronize()
    (memory, _) = next(iter(next(iter(ours._pagers.values()))._away.values()))
    assert memory.is_pinned()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.cuda._sleep(10**8)
        ours.step()
        assert not torch.cuda.current_stream().query(), "the step waited for the device"
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    copies = {way: [e.time_range for e in events if way in e.name] for way in ("HtoD", "DtoH")}
    assert all(len(found) >= 8 for found in copies.values())
    both = [(i, o) for i in copies["HtoD"] for o in copies["DtoH"] if i.start < o.end and o.start < i.end]
    assert both, "pages go one way at a time"
