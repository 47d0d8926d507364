"""What people read says what the numbers say."""

import io
import math

import numpy as np
import pytest
from rich.console import Console

from qbench import record
from qbench.report import terminal, words
from qbench.report.__main__ import main
from qbench.report.compare import compare


def result(delta, stderr, p, name="nf4"):
    against = {
        "delta_nll": delta, "stderr": stderr, "p": p, "kl_mean": 0.01, "kl_p99": 0.1, "top1_agreement": 0.93,
    }  # fmt: skip
    rate = {"median": 100.0, "samples": [100.0]}
    scores = {"nll": 3.0, "perplexity": 20.0855, "stderr": 0.02, "tokens": 512, "windows": [3.0, 3.0]}
    return {
        "config": {"format": {"name": name}, "block": 64, "dq": True, "data": {"path": "kjv"}, "tune": {"method": "none"}},
        "metrics": {
            "bits": {"per_parameter": 4.127, "baseline": 16.0, "compression": 3.877, "model": 5.0},
            "error": {"sqnr_db": 20.7},
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
        (0.02, 0.005, 0.001, "is above the baseline's by 2.02% ± 0.51% (20.09)"),
        (-0.7, 0.01, 1e-9, "is below the baseline's by 50.34% ± 0.50% (20.09)"),
        (0.002, 0.005, 0.7, "is not distinguishable from the baseline's (+0.20% ± 0.50%) (20.09)"),
        (-0.002, None, None, "is not distinguishable from the baseline's (−0.20%) (20.09)"),
    ],
)
def test_the_answer_is_as_sure_as_the_test(delta, stderr, p, expected):
    assert expected in " ".join(words.answer(result(delta, stderr, p)))


def test_the_baseline_is_compared_with_nothing():
    assert words.answer(result(0.0, 0.0, 1.0, name="none")) == [
        "16 bit: the baseline that formats are compared with. Its perplexity is 20.09."
    ]


def test_the_terminal_fits_80_columns(tmp_path):
    out = io.StringIO()
    terminal.show(result(-0.0123, 0.0045, 0.01), tmp_path, Console(file=out, width=80))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert "quantized 20.09±0.40 −0.0123±0.0045 0.0100 93.0%  4.127  5.0     100    100" in text


def test_runs_side_by_side(tmp_path, monkeypatch, capsys):
    for i, (name, shift) in enumerate([("nf4", 0.02), ("none", 0.0)]):
        run = record.blank({}) | result(shift, 0.005, 0.01, name)
        run["config"] |= {"model": {}, "eval": {}, "seed": 0}
        run["status"] = "done"
        run["metrics"]["quality"]["quantized"]["windows"] = [3.0 + shift, 3.1 + 2 * shift]
        run["metrics"]["quality"]["quantized"]["nll"] = 3.05 + 1.5 * shift
        record.write(tmp_path / str(i), run)
    record.write(tmp_path / "failed", record.blank({}))
    monkeypatch.setattr("sys.argv", ["qbench.report", str(tmp_path)])
    assert main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[2].startswith("| 16 bit |")
    assert lines[3].startswith("| nf4 + dq, block 64 | 4.127 | 20.70 | 20.09 | ≈ +0.0300±0.0100 |")


def finished(name: str, seed: int, quantized: list[float], tuned: list[float]) -> dict:
    run = record.blank({}) | result(0.0, 0.005, 0.01, name) | {"status": "done"}
    run["config"] |= {"model": {}, "eval": {}, "seed": seed}
    quality = run["metrics"]["quality"]
    for stage, windows in (("quantized", quantized), ("tuned", tuned)):
        nll = sum(windows) / len(windows)
        quality[stage] = {**quality["quantized"], "windows": windows, "nll": nll, "perplexity": math.exp(nll)}
    return run


def test_seeds_are_one_row_and_differences_are_paired():
    generator = np.random.default_rng(0)
    text = generator.normal(3, 1, 200)  # windows differ far more than formats do
    runs = []
    for seed in range(3):
        noise = generator.normal(0, 0.01, 200)
        runs.append(finished("none", seed, list(text), list(text - 1 + 0.02 * seed)))
        runs.append(finished("nf4", seed, list(text + 0.05 + noise), list(text - 1 + 0.02 * seed + noise)))
        runs.append(finished("int4", seed, list(text + 0.5), list(text - 1 + 0.1 * seed)))
    found = {c.title: c for c in compare(runs)}
    assert next(iter(found)) == "16 bit" and len(found) == 3 and all(len(c.runs) == 3 for c in found.values())
    nf4, int4 = found["nf4 + dq, block 64"].differences, found["int4 + dq, block 64"].differences
    assert nf4["quantized"].delta == pytest.approx(0.05, abs=0.003) and nf4["quantized"].distinguishable
    assert not nf4["tuned"].distinguishable and str(nf4["tuned"]).startswith("≈ ")
    assert int4["tuned"].stderr == pytest.approx(0.08 / 3**0.5), "seeds disagree by more than windows do"
    assert found["16 bit"].differences == {}
    assert found["16 bit"].mean("quality", "tuned", "nll") == pytest.approx(text.mean() - 0.98)


def test_p_values_are_corrected_for_their_number():
    generator = np.random.default_rng(1)
    text = list(generator.normal(3, 1, 50))
    runs = [finished("none", 0, text, text)]
    runs += [finished(f"f{i}", 0, list(text + generator.normal(0, 0.1, 50)), text) for i in range(200)]
    found = [c.differences["quantized"] for c in compare(runs) if c.differences]
    assert len(found) == 200 and sum(d.distinguishable for d in found) <= 2
    assert all(d.p == 1 for c in compare(runs) for s, d in c.differences.items() if s == "tuned")


def test_without_a_16_bit_run_there_is_no_difference():
    (found,) = compare([finished("nf4", 0, [3.0, 3.1], [2.0, 2.1]), record.blank({})])
    assert found.differences == {} and found.mean("quality", "quantized", "nll") == pytest.approx(3.05)


def test_a_truncated_result_is_named(tmp_path, monkeypatch, capsys):
    whole = record.write(tmp_path, record.blank({})).read_text()
    (tmp_path / record.FILE).write_text(whole[: len(whole) // 2])
    monkeypatch.setattr("sys.argv", ["qbench.report", str(tmp_path)])
    assert main() == 2 and f"{tmp_path}/result.json is not a whole result.json" in capsys.readouterr().err


def test_nothing_to_report(tmp_path, monkeypatch, capsys):
    for path in (tmp_path, tmp_path / "nowhere"):
        monkeypatch.setattr("sys.argv", ["qbench.report", str(path)])
        assert main() == 2 and str(path) in capsys.readouterr().err
