"""The sentences about a run say what its numbers say."""

import io

import pytest
from rich.console import Console

from qbench.cli.report import main
from qbench.report.run import answer, terminal


def result(delta, stderr, p, name="nf4"):
    against = {
        "delta_nll": delta, "stderr": stderr, "p": p, "kl_mean": 0.01, "kl_p99": 0.1, "top1_agreement": 0.93,
    }  # fmt: skip
    rate = {"median": 100.0, "samples": [100.0]}
    scores = {"nll": 3.0, "perplexity": 20.0855, "stderr": 0.02, "tokens": 512, "windows": [3.0, 3.0]}
    return {
        "environment": None,
        "config": {
            "format": {"name": name}, "block": 64, "dq": True, "seed": 0, "device": "cpu", "model": {"path": None},
            "data": {"path": "kjv"}, "eval": {"tokens": 512}, "tune": {"method": "none"},
        },
        "metrics": {
            "bits": {"per_parameter": 4.127, "baseline": 16.0, "compression": 3.877, "model": 5.0},
            "error": {"sqnr_db": 20.7, "output_relative": 0.1, "layers": []},
            "quality": {"baseline": scores, "quantized": {**scores, "against_baseline": against}},
            "memory": {"baseline_bytes": 16e6, "model_bytes": 5e6},
            "throughput": {
                key: rate for key in ("prefill_tokens_s", "decode_tokens_s", "quantize_weights_s", "dequantize_weights_s")
            } | {"baseline": {"prefill_tokens_s": rate, "decode_tokens_s": rate}},
        },
    }  # fmt: skip


@pytest.mark.parametrize(
    ("delta", "stderr", "p", "expected"),
    [
        (0.02, 0.005, 0.001, "is 20.09, 2.02% ± 0.51% above the baseline's 20.09."),
        (-0.7, 0.01, 1e-9, "is 20.09, 50.34% ± 0.50% below the baseline's 20.09."),
        (0.002, 0.005, 0.7, "is 20.09, not distinguishable from the baseline's 20.09 (+0.20% ± 0.50%)."),
        (-0.002, None, None, "is 20.09, not distinguishable from the baseline's 20.09 (−0.20%)."),
    ],
)
def test_the_answer_is_as_sure_as_the_test(delta, stderr, p, expected):
    assert expected in " ".join(answer.describe_run(result(delta, stderr, p)))


def test_the_baseline_is_compared_with_nothing():
    assert answer.describe_run(result(0.0, 0.0, 1.0, name="none")) == [
        "This is the 16-bit baseline that formats are compared with. Its perplexity is 20.09."
    ]


def test_a_start_on_16_bit_has_no_error_to_tell():
    run = result(0.0, 0.0, 1.0, name="none")
    run["config"]["tune"] = {"method": "lora", "init": "pissa", "rank": 8, "steps": 4, "virtual_tokens": 16}
    quality = run["metrics"]["quality"]
    quality |= {"initial": quality["quantized"], "tuned": quality["quantized"]}
    run["metrics"]["init"] = {"quantized": {"sqnr_db": None}, "initial": {"sqnr_db": 56.44}}
    sentence = answer.describe_run(run)[-1]
    assert sentence.startswith("With PiSSA, the fine-tune begins at a perplexity of 20.09.")
    assert sentence.endswith("Signal to quantization noise: 56.44 dB with A and B, no error without.")


def test_the_terminal_fits_80_columns(tmp_path):
    out = io.StringIO()
    terminal.show(result(-0.0123, 0.0045, 0.01), tmp_path, Console(file=out, width=80))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert "quantized 20.09±0.40 −0.0123±0.0045 0.0100 93.0%  4.127  5.0     100    100" in text


def test_nothing_to_report(tmp_path, monkeypatch, capsys):
    for path in (tmp_path, tmp_path / "nowhere"):
        monkeypatch.setattr("sys.argv", ["qbench.report", str(path)])
        assert main() == 2 and str(path) in capsys.readouterr().err
