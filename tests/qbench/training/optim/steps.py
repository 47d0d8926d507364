"""Optimizer steps on random gradients, and comparison to the last bit."""

from functools import partial

import torch

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
    """`steps` steps on random gradients of very different sizes; with `skip`, each parameter skips every third."""
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
