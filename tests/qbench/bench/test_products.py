"""The benchmark of products runs without a GPU, and its page agrees with its numbers."""

import json
import sys

import pytest
import torch

from qbench.bench import page, products, tiles
from qbench.cli import bench as command


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    plan = products.Plan(formats=("nf4", "int8"), models=("tiny",), rows=(1, 32, 1024), repeats=2)
    reports = []
    result = products.measure(plan, torch.device("cpu"), lambda result, description: reports.append(description))
    assert len(reports) == plan.steps() and "nf4 + dq" in reports[2]
    return json.loads(json.dumps(result))


def test_every_case_is_measured_and_right(result):
    ours = [case for case in result["cases"] if case["format"] in ("nf4", "int8")]
    assert {(c["format"], c["dq"], c["op"], c["rows"]) for c in ours} == {
        (name, dq, op, rows)
        for name in ("nf4", "int8")
        for dq in (False, True)
        for op, rows in [("dequantize", 0), *((op, rows) for op in products.OPS for rows in (1, 32, 1024))]
    }
    assert all(case["error"] < 1e-2 and len(case["samples"]) == 2 and min(case["samples"]) > 0 for case in ours)


def test_bitsandbytes_computes_the_same(result):
    theirs = [case for case in result["cases"] if case["format"] == "bitsandbytes nf4" and case["error"] is not None]
    assert theirs and all(case["error"] < 1e-2 for case in theirs)


def make_result(seconds: dict) -> dict:
    """A result of one layer, with nf4 + dq at the given seconds by (op, rows), bf16 at 1."""
    place = {"model": "7B", "layer": "attention", "shape": [4, 8]}
    cases = []
    for (op, rows), time in seconds.items():
        ours = {"format": "nf4", "dq": True, "nbytes": 16, "op": op, "rows": rows, "error": 1e-3, "samples": [time]}
        cases.append(place | ours)
        cases.append(place | ours | {"format": "bf16", "dq": False, "samples": [1.0], "error": None})
    plan = {"formats": ["nf4"], "dq": [True], "rows": sorted({rows for _, rows in seconds if rows}), "repeats": 1}
    ceilings = {"copy_bytes_s": 64.0, "matmul_flop_s": 2.0 * 1024 * 32 * 4}
    environment = {"device": "a device", "versions": {"torch": "1"}}
    return {"plan": plan, "ceilings": ceilings, "environment": environment, "cases": cases}


def test_ratios_and_shares():
    result = make_result({("linear", 1): 0.5, ("linear", 1024): 2.0, ("linear_dx", 1): 0.25, ("dequantize", 0): 4.0})
    ratios, shares = page.speedups(result, "nf4", True, "bf16"), page.ceiling_fractions(result, "nf4", True)
    at = "7B", "attention"
    assert ratios[(*at, "linear", 1)] == 2 and ratios[(*at, "linear_dx", 1)] == 4
    assert shares[(*at, "linear", 1)] == 16 / 0.5 / 64  # the packed bytes
    assert shares[(*at, "linear", 1024)] == 2 * 1024 * 32 / 2.0 / result["ceilings"]["matmul_flop_s"]
    assert shares[(*at, "dequantize", 0)] == (16 + 2 * 32) / 4.0 / 64
    words = "\n".join(page.summarize(result))
    assert "forward, M ≤ 16: 2.00 times the speed of bf16 weights; 50% of the ceiling" in words
    assert "M ≥ 1024: 0.50 times" in words and "M = 32" not in words


def test_the_page_is_written(result, tmp_path):
    page.write(result, tmp_path)
    text = (tmp_path / "products.md").read_text()
    assert "int8 + dq" in text and "tiny tiny" in text and "float64" in text
    assert (tmp_path / "products.png").stat().st_size > 10_000


def test_the_command(tmp_path, monkeypatch, capsys):
    options = ["--models", "tiny", "--rows", "1", "4", "--repeats", "1", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench", "products", *options])
    assert command.main() == 0
    assert {"products.json", "products.md", "products.png"} == {file.name for file in tmp_path.iterdir()}
    assert "times the speed of bf16" in capsys.readouterr().out


@pytest.mark.parametrize(("line", "said"), [("tune", "no GPU"), ("products --device gpu", "accepted: auto, cpu")])
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bad_input_is_one_line(line, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *line.split()])
    assert command.main() == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("op", products.OPS)
@pytest.mark.parametrize("rows", tiles.ROWS)
def test_candidates_are_choices(op, rows):
    choices = list(tiles.candidates(op, rows))
    assert choices[0] == {"path": "decode"} and len(choices) > 6
    assert all(choice["path"] != "multiply_row" or op == "linear" for choice in choices)
