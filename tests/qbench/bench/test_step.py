"""The benchmark of a training step: both sides learn the same, each in its own process."""

import pytest
import torch

from qbench.bench import step

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.mark.thorough
def test_both_sides_train_the_same():
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is in the test extra")
    reports = []
    result = step.measure(torch.device("cpu"), 4, reports.append, TINY)
    ours, theirs = result["ours"], result["theirs"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-3) and ours["loss"][-1] < ours["loss"][0]
    assert len(reports) == 10 and all(len(side["seconds"]) == 4 and side["tokens_s"] > 0 for side in (ours, theirs))
    assert (
        result["ratio"] == ours["tokens_s"] / theirs["tokens_s"] and min(ours["peak_bytes"], theirs["peak_bytes"]) > 0
    )
