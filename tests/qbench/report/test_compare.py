"""Many runs as one comparison: grouped by seed, paired, and corrected."""

import re
from pathlib import Path

import numpy as np
import pandas
import pytest

from qbench.cli.report import main
from qbench.report.comparison import findings, page
from qbench.report.comparison.grouping import group_runs
from qbench.report.comparison.selection import frontier, pairs_differing_in, select_best
from qbench.results import store
from tests.qbench.sample_results import browsed, by_file, finished, only


def test_seeds_are_one_row_and_differences_are_paired():
    generator = np.random.default_rng(0)
    text = generator.normal(3, 1, 200)  # windows differ far more than formats do
    runs = []
    for seed in range(3):
        noise = generator.normal(0, 0.01, 200)
        runs.append(finished("none", seed, text, text - 1 + 0.02 * seed))
        runs.append(finished("nf4", seed, text + 0.05 + noise, text - 1 + 0.02 * seed + noise))
        runs.append(finished("int4", seed, text + 0.5, text - 1 + 0.1 * seed))
    configurations = {c.title: c for c in only(runs).configurations}
    assert (
        next(iter(configurations)) == "16 bit"
        and len(configurations) == 3
        and all(len(c.runs) == 3 for c in configurations.values())
    )
    nf4, int4 = configurations["nf4, block 64"].differences, configurations["int4, block 64"].differences
    assert nf4["quantized"].delta == pytest.approx(0.05, abs=0.003) and nf4["quantized"].distinguishable
    assert not nf4["tuned"].distinguishable and str(nf4["tuned"]).startswith("≈ ")
    assert int4["tuned"].stderr == pytest.approx(0.08 / 3**0.5), "seeds disagree by more than windows do"
    assert configurations["16 bit"].differences == {}
    assert configurations["16 bit"].mean("quality", "tuned", "nll") == pytest.approx(text.mean() - 0.98)


def test_p_values_are_corrected_for_their_number():
    generator = np.random.default_rng(1)
    text = generator.normal(3, 1, 50)
    runs = [finished("none", 0, text, text)]
    runs += [finished(f"f{i}", 0, text + generator.normal(0, 0.1, 50), text) for i in range(200)]
    configurations = only(runs).configurations
    differences = [c.differences["quantized"] for c in configurations if c.differences]
    assert len(differences) == 200 and sum(d.distinguishable for d in differences) <= 2
    assert all(d.p == 1 for c in configurations for s, d in c.differences.items() if s == "tuned")


def test_there_is_always_a_16_bit_row():
    """Without a 16-bit run, the baseline of another run stands in. It has no scores after a fine-tune."""
    setting = only([finished("nf4", 0, [3.2, 3.3], [2.0, 2.1]), finished("nf4", 1, [3.2, 3.3], [2.1, 2.1])])
    base, nf4 = setting.configurations
    assert base.title == "16 bit, untuned" and base.nll("quantized") == 3.0 and base.nll("tuned") is None
    assert nf4.differences["quantized"].delta == pytest.approx(0.25) and "tuned" not in nf4.differences


def test_other_words_about_a_format_are_no_other_format():
    descriptions = [{"name": "nf4", "source": source} for source in ("a paper", "the paper, section 3")]
    runs = [finished("nf4", seed, format=fmt) for seed, fmt in enumerate(descriptions)]
    _, nf4 = only(runs).configurations
    assert len(nf4.runs) == 2


def test_settings_do_not_mix():
    runs = [finished("nf4"), finished("nf4", data={"path": "docs"}), finished("none", eval={"tokens": 9})]
    titles = {setting.title for setting in group_runs(by_file(runs))}
    expected = {"kjv, eval.tokens 512", "docs, eval.tokens 512", "kjv, eval.tokens 9"}
    assert titles == {f"the bundled model on {rest}" for rest in expected}


def test_the_fine_tune_is_part_of_a_configuration():
    tune = {"method": "lora", "rank": 16, "lr": 1e-3}
    runs = [finished(n, 0, [3.0, 3.1], [2.0, 2.2], tune=tune | {"rank": r}) for n in ("none", "nf4") for r in (4, 8)]
    titles = {c.title for c in only(runs).configurations}
    assert titles == {"16 bit, rank 4", "16 bit, rank 8", "nf4, block 64, rank 4", "nf4, block 64, rank 8"}


def test_on_the_frontier_is_what_nothing_beats():
    text = np.random.default_rng(2).normal(3, 1, 100)
    noise = np.random.default_rng(3).normal(0, 0.05, 100)
    scores = {"same": text + 0.1, "noisy": text + 0.1 + noise, "worse": text + 0.2, "int8": text + 0.15, "none": text}
    runs = [finished("small", 0, text + 0.3, block=128), *(finished(n, 0, nll) for n, nll in scores.items())]
    best = [c.format for c in frontier(only(runs).configurations, "quantized")]
    assert best[0] == "small" and set(best[1:-1]) == {"same", "noisy"} and best[-1] == "none"


def test_what_is_featured_begins_with_16_bit_even_where_that_was_never_fine_tuned():
    runs = [finished(f"f{i}", 0, [3.1 + i / 100, 3.2], [2 + i / 100, 2.1]) for i in range(5)]
    best = select_best(only(runs), 3).configurations
    assert [c.format for c in best] == ["none", "f0", "f1"]
    assert len(select_best(only([*runs, finished("none", 0, [3.0, 3.1], [1.9, 2.0])]), 3).configurations) == 3


def test_pairs_differ_in_one_thing():
    runs = [finished(n, 0, block=b, dq=dq) for n in ("nf4", "int4") for b in (32, 64, 128) for dq in (False, True)]
    setting = only([*runs, finished("none")])
    blocks = [(a.title, b.title) for a, b in pairs_differing_in(setting, "block", "quantized")]
    assert ("nf4, block 128", "nf4, block 64") in blocks and len(blocks) == 8
    double = [(a.title, b.title) for a, b in pairs_differing_in(setting, "dq", "quantized")]
    assert ("int4 + dq, block 32", "int4, block 32") in double and len(double) == 6


def test_the_words_are_as_sure_as_the_tests():
    text = np.random.default_rng(4).normal(3, 1, 200)
    noise = np.random.default_rng(5).normal(0, 0.1, 200)
    runs = [
        finished("none", 0, text),
        finished("nf4", 0, text + noise - noise.mean() + 1e-4),
        finished("int4", 0, text + 0.1),
    ]
    text = " ".join(findings.describe_findings(only(runs)))
    assert "1 of 2 quantized configurations are not distinguishable from 16 bit: nf4, block 64." in text
    assert "The worst is int4, block 64, with +10.52% ± 0.00%" in text


@pytest.fixture
def sweep(tmp_path) -> Path:
    text = np.random.default_rng(6).normal(3, 1, 30)
    folder = tmp_path / "a sweep"
    generator = np.random.default_rng(7)
    for seed in (0, 1):
        for name in ("none", "nf4", "int8"):
            for block in (32, 64):
                for dq in (False, True):
                    windows = text + generator.normal(0.02, 0.01, 30) * (name != "none")
                    run = finished(name, seed, windows, windows - 1, block=block, dq=dq)
                    store.write(folder / f"{name}{block}{dq}{seed}", run)
    failed = store.new_result(finished("int4")["config"]) | {"status": "oom"}
    store.write(folder / "failed", failed | {"error": {"type": "MemoryError", "message": "no <more>", "traceback": ""}})
    store.write(folder / "odd", store.new_result({}) | {"status": "done"})
    (folder / "cut").mkdir()
    (folder / "cut" / store.FILE).write_text('{"schema": 1')
    store.write(folder / "new", finished("nf4") | {"schema": 2})
    return folder


def test_the_report_of_a_sweep(sweep, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["qbench.report", str(sweep)])
    assert main() == 0
    output = capsys.readouterr()
    assert "| nf4 + dq, block 64 (2 seeds) |" in output.out and "| 16 bit (2 seeds) | 16.000 |" in output.out
    for name, why in (("cut", "not valid JSON"), ("new", "schema 2; 1 is accepted"), ("odd", "is incomplete")):
        assert re.search(rf"skipped: .*{name}/result.json.*{why}", output.err)
    out = sweep / "report"
    html, twin = (out / "report.html").read_text(), (out / "report.md").read_text()
    for text in (html, twin):
        assert "on the frontier" in text and "nf4 + dq, block 64" in text and "3 skipped" in text
        assert "MemoryError: no" in text and "a%20sweep" not in text
        for link in re.findall(r'(?:href="|\]\()([^")#]+)', text):
            assert (out / link.replace("%20", " ")).exists(), link
    assert "no &lt;more&gt;" in html
    assert not re.search(r'(?:src|href)="(?!data:|#|\.\./|results\.)', html) and "http" not in re.sub(
        'data:[^"]+', "", html
    )
    assert {file.stem for file in (out / "figures").iterdir()} == {"pareto", "slopes", "blocks"}
    assert html.count("<figure>") == 7, "double quantization, pairs, layers and throughput too"
    parquet, csv = (
        pandas.read_parquet(out / "results.parquet"),
        pandas.read_csv(out / "results.csv", float_precision="round_trip"),
    )
    assert len(parquet) == len(csv) == 25 and set(parquet["config.format.name"]) == {"none", "nf4", "int8", "int4"}
    assert csv["metrics.quality.quantized.nll"].equals(parquet["metrics.quality.quantized.nll"])
    before = html
    assert main() == 0 and (out / "report.html").read_text() == before, "the same results make the same page"


def test_the_page_sorts_and_asks_for_nothing(sweep, monkeypatch):
    """The page works offline, and a click on a table head sorts by it."""
    done = browsed(page.write(page.collect(sweep), sweep / "report"))
    assert done == {"wrong": "", "asked": "0", "wide": "0"}


def test_a_report_that_cannot_be_written_is_one_line(sweep, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("sys.argv", ["qbench.report", str(sweep), "--out", str(tmp_path / "file")])
    assert main() == 1 and f"{tmp_path}/file cannot be written" in capsys.readouterr().err
