"""PagedAdamW gives the bits of PyTorch's AdamW under any budget, loads its states, and checks its settings."""

from functools import partial
from io import BytesIO

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qbench.errors import InputError, byte_count
from qbench.settings import TuneSettings
from qbench.training import optim
from qbench.training.optim import PagedAdamW, adamw
from tests.qbench.training.optim.steps import (
    DEVICES,
    FIVE_BUDGETS,
    NUMBERS,
    PAGE,
    SHAPES,
    parameters,
    same,
    same_states,
    torch_adamw,
    train,
)


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
def test_8_bit_states_do_not_depend_on_pages(n, page, over, seed):
    shapes = [(n,), (64, 64), (5,)]
    whole = PagedAdamW(parameters(shapes), bits=8)
    paged = PagedAdamW(parameters(shapes), bits=8, page=page, budget=page + over)
    assert same(train(whole, 4, seed), train(paged, 4, seed))
    assert whole.paging.pages == 1 and whole.paging.pages_in == whole.paging.pages_out == 0


def test_elementwise_kernels_round_alike_in_any_slice():
    """Paging relies on this: PyTorch gives an element the same bits, whatever slice it is in."""
    generator = torch.Generator().manual_seed(0)
    p, grad, m, v = (torch.randn(5000, generator=generator) for _ in range(4))
    group = {"lr": 1.37e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.013}
    tensors = [p, grad, m, v.abs()]
    pieces = [[t.clone() for t in tensors] for _ in range(2)]
    adamw.update(*pieces[0], 3.0, group)
    for start in range(0, 5000, 256):
        adamw.update(*(t[start : start + 256] for t in pieces[1]), 3.0, group)
    assert same(*pieces)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_dict_comes_back_as_it_was(bits, dtype):
    shapes = [*SHAPES, (90, 70)]
    first = PagedAdamW(parameters(shapes, dtype), **NUMBERS, bits=bits, page=PAGE, budget=3 * PAGE)
    train(first, 7, skip=True)
    saved = first.state_dict()
    second = PagedAdamW(parameters(shapes, dtype), lr=1, bits=bits, page=5000, budget=None)
    for p, q in zip(second.param_groups[0]["params"], first.param_groups[0]["params"], strict=True):
        p.data.copy_(q)
    second.load_state_dict(torch.load(_saved(saved), weights_only=True))
    assert second.param_groups[0]["lr"] == NUMBERS["lr"]
    assert same_states(second.state_dict(), saved) and same_states(first.state_dict(), saved)
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


def test_unsupported_inputs_are_refused():
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
        ({"optimizer_budget": "a lot"}, r"tune\.optimizer_budget: 'a lot' is not accepted; null or bytes"),
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
def test_every_optimizer_is_built_and_has_a_footprint(name):
    paged = "paged" in name
    optimizer = optim.build(name, parameters([(100, 100)]), 0.1, 0.01, budget=8192 if paged else None, page=PAGE)
    train(optimizer, 2)
    whole = (0 if name == "sgd" else 2) * 10000 * (1 if "8bit" in name else 4)
    peak = optim.footprint(optimizer)["peak_bytes"]
    assert peak == 8192 if paged else whole <= peak <= 1.02 * whole
