"""Two processes train a packed model as one process does with the same batch, and send the packed weight once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def measured(tiny_llama, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("parallel") / "measured.json"
    command = [sys.executable, "-m", "tests.qbench.training.two_processes"]
    processes = [
        subprocess.Popen([*command, str(rank), str(tiny_llama), str(out)], cwd=ROOT, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=600)[1].decode() for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(errors)
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp", "pytorch", "accelerate"])
def test_two_processes_train_as_one(measured, way):
    assert measured[way] == pytest.approx(measured["together"], abs=1e-4)
    assert measured["together"][-1] < measured["together"][0] - 0.1


def test_ddp_sends_the_packed_weight_once(measured):
    """The first process sends it at the start. A step sends only the adapters' gradients and the model's buffers."""
    assert measured["same_after_ddp"]
    assert measured["ddp_gradient_bytes"] == measured["trained_bytes"]
    assert measured["ddp_other_bytes"] == measured["buffer_bytes"] < 100


def test_fsdp_shards_and_gathers_the_bytes(measured):
    """Each process has half of them. A step gathers those of a block twice, as packed bytes, not as 16-bit weights."""
    assert measured["local_bytes"] == pytest.approx(measured["bytes"] / 2, rel=0.01)
    assert measured["fsdp_gathered_bytes"] == pytest.approx(measured["bytes"] + measured["block_bytes"], rel=0.01)
    assert measured["block_bytes"] < measured["weight_bytes"]


def test_mixed_precision_leaves_scales_as_they_are(measured):
    """Everything else is gathered in bf16. `dtypes`: codes, the double-quantized scale, and the output of a layer."""
    dtypes = ("uint8", "uint8", "float32", "float32", "bfloat16")
    assert measured["mixed_dtypes"] == [f"torch.{dtype}" for dtype in dtypes]
    assert measured["mixed"] == pytest.approx(measured["together"], abs=0.05)
