"""The 8-bit states: the maps of bitsandbytes, steps against float64, and no coordinate that runs away."""

import pytest
import torch

from formats.scales import dynamic_map
from qbench.ops import cuda
from qbench.training.optim import PagedAdamW, states
from tests.qbench.training.optim.steps import DEVICES, NUMBERS, PAGE, parameters, same, train


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
            distance = (torch.nn.functional.pad(stored, (0, -n % 256)).view(-1, 256) - blocks).abs() / absmax
            assert (distance <= errors.amin(2) + 1e-6).view(-1)[:n].all(), "not the nearest level"
        m, v = state["exp_avg"].double(), state["exp_avg_sq"].double()


def test_against_bitsandbytes():
    """Its CPU code rounds to a grid before it picks a level, so levels near a midpoint or near zero differ."""
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
            saved, state = ours.state_dict()["state"][0], theirs.state[qs[0]]
            for i, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
                assert torch.equal(saved[f"{name}_absmax"], state[f"absmax{i}"])
                scale = state[f"absmax{i}"].repeat_interleave(256)[:5000]
                normal = state[f"qmap{i}"][state[f"state{i}"].int()]
                assert (normal * scale == saved[name]).float().mean() > 0.96
                assert (normal - saved[name] / scale).abs().max() < 0.0145, "more than one level apart"
        for p, q, x in zip(ps, qs, start, strict=True):
            assert (p - q).norm() <= 0.01 * (q - x).norm()
    torch.testing.assert_close(ps[1], qs[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("quiet", [1e-3, 1e-4, 1e-5])
def test_a_quiet_coordinate_among_loud_ones_does_not_run_away(quiet):
    """If its second moment were stored as zero, it would move thousands of lr in one step."""
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
