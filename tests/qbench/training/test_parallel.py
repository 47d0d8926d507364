"""Two processes train on a packed model: as one with the same batch, and the packed weight travels once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def found(tiny_llama, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("parallel") / "found.json"
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
def test_two_processes_train_as_one(found, way):
    assert found[way] == pytest.approx(found["together"], abs=1e-4)
    assert found["together"][-1] < found["together"][0] - 0.1


def test_ddp_sends_the_packed_weight_once(found):
    """As it begins, from the first process; a step sends the gradients of the adapters, and the buffers of the model."""
    assert found["same_after_ddp"]
    assert found["ddp_gradient_bytes"] == found["trained_bytes"]
    assert found["ddp_other_bytes"] == found["buffer_bytes"] < 100


def test_fsdp_shards_and_gathers_the_bytes(found):
    """Half of them lie on each process; a step gathers those of a block twice, packed, not as 16-bit weights."""
    assert found["local_bytes"] == pytest.approx(found["bytes"] / 2, rel=0.01)
    assert found["fsdp_gathered_bytes"] == pytest.approx(found["bytes"] + found["block_bytes"], rel=0.01)
    assert found["block_bytes"] < found["weight_bytes"]


def test_mixed_precision_leaves_scales_as_they_are(found):
    """All else is gathered in bf16. Of a layer: codes, the double-quantized scale, and what it computes."""
    dtypes = ("uint8", "uint8", "float32", "float32", "bfloat16")
    assert found["mixed_dtypes"] == [f"torch.{dtype}" for dtype in dtypes]
    assert found["mixed"] == pytest.approx(found["together"], abs=0.05)
