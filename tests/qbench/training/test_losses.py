"""The custom autograd functions of training agree with autograd on the plain expressions."""

import pytest
import torch
from torch.nn import functional as F

from qbench.training import losses
from qbench.training.lora_layer import add_low_rank
from qbench.training.losses import next_token_loss


@pytest.mark.parametrize("logits_at_once", [1, 200, 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_next_token_loss(monkeypatch, dtype, logits_at_once):
    monkeypatch.setitem(losses.CHUNK, "cpu", logits_at_once)
    torch.manual_seed(0)
    logits = (4 * torch.randn(3, 7, 50)).to(dtype).requires_grad_()
    tokens = torch.randint(50, (3, 7))
    (next_token_loss(logits, tokens) / 2).backward()
    gradient, logits.grad = logits.grad, None
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), tokens[:, 1:].flatten())
    (expected / 2).backward()
    assert next_token_loss(logits, tokens).item() == pytest.approx(expected.item(), rel=1e-6)
    tolerance = 1e-6 if dtype == torch.float32 else 5e-3
    assert (gradient - logits.grad).norm() < tolerance * logits.grad.norm() and not gradient[:, -1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_low_rank(dtype):
    torch.manual_seed(0)
    y, x = (torch.randn(2, 5, size).to(dtype).requires_grad_() for size in (24, 40))
    a, b = (torch.randn(size).requires_grad_() for size in ((4, 40), (24, 4)))
    g = torch.randn(2, 5, 24).to(dtype)
    inputs = y, x, a, b
    y_out = add_low_rank(*inputs, 0.5)
    expected = y.double() + 0.5 * x.double() @ a.double().t() @ b.double().t()
    tolerance = 1e-6 if dtype == torch.float32 else 5e-3
    assert y_out.dtype == dtype and (y_out - expected).norm() < tolerance * expected.norm()
    pairs = zip(torch.autograd.grad(y_out, inputs, g), torch.autograd.grad(expected, inputs, g.double()), strict=True)
    for tensor, (got, wanted) in zip(inputs, pairs, strict=True):
        assert got.dtype == tensor.dtype and (got - wanted).norm() < tolerance * wanted.norm()


def test_add_low_rank_keeps_x_as_it_is():
    x = torch.randn(6, 40, dtype=torch.bfloat16)
    y, a, b = torch.randn(6, 24, dtype=torch.bfloat16), torch.randn(4, 40, requires_grad=True), torch.randn(24, 4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        add_low_rank(y, x, a, b, 1.0)
    own = {t.data_ptr() for t in (x, a, b)}
    assert all(t.data_ptr() in own or t.numel() == 6 * 4 for t in kept)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_add_low_rank_under_autocast(dtype, autocast):
    """It has the dtypes of nn.Linear, with the backward outside of autocast; gradients have the dtypes of the inputs."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, 40).to(dtype).requires_grad_()
    w, a, b = (torch.randn(size).requires_grad_() for size in ((24, 40), (4, 40), (24, 4)))
    with torch.autocast("cpu", autocast):
        y = F.linear(x, w)
        y_out = add_low_rank(y, x, a, b, 0.5)
        loss = y_out.float().square().mean()
    assert y_out.dtype == y.dtype == autocast
    expected = (x @ w.t().to(dtype)).double() + 0.5 * x.double() @ a.double().t() @ b.double().t()
    assert (y_out - expected).norm() < 0.02 * expected.norm()
    inputs = x, w, a, b
    pairs = zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected.square().mean(), inputs), strict=True)
    for tensor, (got, wanted) in zip(inputs, pairs, strict=True):
        assert got.dtype == tensor.dtype and (got.double() - wanted.double()).norm() < 0.03 * wanted.double().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_next_token_loss_under_autocast(dtype):
    torch.manual_seed(0)
    logits, tokens = torch.randn(3, 7, 50).to(dtype).requires_grad_(), torch.randint(50, (3, 7))
    outside = next_token_loss(logits, tokens)
    (expected,) = torch.autograd.grad(outside, logits)
    with torch.autocast("cpu", torch.bfloat16):
        inside = next_token_loss(logits, tokens)
    (gradient,) = torch.autograd.grad(inside, logits)
    assert torch.equal(inside, outside) and torch.equal(gradient, expected) and gradient.dtype == dtype


def test_derivatives_of_any_order():
    torch.manual_seed(0)
    shapes = (2, 3, 5), (2, 3, 7), (4, 7), (5, 4)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *t: add_low_rank(*t, 0.5), inputs)
    assert torch.autograd.gradgradcheck(lambda *t: add_low_rank(*t, 0.5).square(), inputs)


def test_second_derivatives_of_the_loss():
    torch.manual_seed(0)
    logits, tokens = torch.randn(3, 7, 50, requires_grad=True), torch.randint(50, (3, 7))
    exact = logits.detach().double().requires_grad_()
    gradients = []
    for values, loss in (
        (logits, next_token_loss(logits, tokens)),
        (exact, F.cross_entropy(exact[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())),
    ):
        (first,) = torch.autograd.grad(loss.square(), values, create_graph=True)
        gradients.append(torch.autograd.grad(first.square().sum(), values)[0])
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


def test_the_result_may_be_changed_in_place():
    """Falcon adds its MLP to its attention in place."""
    torch.manual_seed(0)
    y, x, a, b = (torch.randn(size, requires_grad=True) for size in ((2, 5, 24), (2, 5, 40), (4, 40), (24, 4)))
    y_out = add_low_rank(y, x, a, b, 0.5)
    expected = torch.autograd.grad((2 * y_out + 1).square().sum(), (y, x, a, b), retain_graph=True)
    y_out *= 2
    y_out += 1
    for got, wanted in zip(torch.autograd.grad(y_out.square().sum(), (y, x, a, b)), expected, strict=True):
        assert torch.allclose(got, wanted, rtol=1e-4)
