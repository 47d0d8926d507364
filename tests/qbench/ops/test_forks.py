"""A forked child computes the same as its parent, whatever threads that used, and no number of threads changes."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")

COMMON = """
import os, signal, sys
import torch
import formats
from qbench.model.quant_linear import QuantLinear

signal.alarm(500)
generator = torch.Generator().manual_seed(0)
large, small = (torch.randn(n, 1024, generator=generator) for n in (600, 8))

def work():
    results = []
    for w in (small, large, large.bfloat16()):
        for name, dq in (("nf4", True), ("int8", False), ("q4_1", False), ("quantile", False)):
            q = formats.get(name, dq=dq).quantize(w * 0.5)
            layer = QuantLinear(q)
            x = torch.ones(2, 1024, dtype=w.dtype, requires_grad=True)
            y = layer(x)
            y.sum().backward()
            results += [q.codes, *q.scale, q.dequantize(), q.dequantize(torch.float32), y.detach(), x.grad]
    return results

def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))
"""
ALONE = """
torch.set_num_threads(1)
work()
assert torch.get_num_threads() == 1
torch.set_num_threads(2)
torch.save(work(), sys.argv[1])
assert torch.get_num_threads() == 2
"""
FORKS = """
class Quantized(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return same(work(), expected) and torch.get_num_threads() == 1

def child(depth):
    pid = os.fork()
    if not pid:
        right = same(work(), expected)
        if depth > 1:
            child(depth - 1)
        os._exit(not right)
    assert os.waitpid(pid, 0)[1] == 0

def loader():
    assert all(map(bool, torch.utils.data.DataLoader(Quantized(), num_workers=2, multiprocessing_context="fork")))

expected = torch.load(sys.argv[1])
f = formats.get("nf4")
child(depth=2)
for use in (lambda: f.quantize(small), lambda: (large + 1).sum(), loader, lambda: f.quantize(large), work, loader):
    use()
    child(depth=1)
child(depth=2)
assert same(work(), expected)
"""


def run(script: str, *arguments: str) -> None:
    threads = os.environ | {"OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", COMMON + script, *arguments]
    done = subprocess.run(command, env=threads, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.thorough
def test_children_compute_what_a_process_alone_does(tmp_path):
    run(ALONE, str(tmp_path / "expected.pt"))
    run(FORKS, str(tmp_path / "expected.pt"))
