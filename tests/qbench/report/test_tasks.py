"""Scores on tasks, in the report of a run and in a comparison."""

import io
import math
import re

import numpy as np
import pytest
from rich.console import Console

from qbench.report.comparison import extra_tables, page, tasks
from qbench.report.comparison.grouping import group_runs
from qbench.report.run import answer, tables, terminal
from qbench.results import provenance, store
from tests.qbench.sample_results import by_file, finished, only


def scored(values, base, log=False, better=True, **more) -> dict:
    """A score with the value of each document, compared with the baseline's documents."""
    values, delta = np.asarray(values, float), np.asarray(values, float) - base
    value = math.exp(values.mean()) if log else values.mean()
    against = {
        "delta": delta.mean(),
        "stderr": delta.std() / len(delta) ** 0.5,
        "p": 0.5 if abs(delta).sum() < 2 else 0.001,
    }
    documents = {"value": float(value), "stderr": 0.1, "n": len(values), "log": log, "documents": values.tolist()}
    return documents | {"higher_is_better": better, "against_baseline": against} | more


HARD = np.random.default_rng(0).normal(3, 1, 100)  # documents differ far more than formats do
RIGHT = np.random.default_rng(1).random(100) < 0.7


def with_tasks(name, seed=0, worse=0.0, wrong=0, tuned=None) -> dict:
    """A finished run. worse: added to the nll of words. wrong: the number of additional documents it gets wrong."""
    result = finished(name, seed, tuned=tuned, eval={"tokens": 512, "tasks": ["docs", "group"]})
    right = RIGHT.astype(float)
    right[np.flatnonzero(RIGHT)[:wrong]] = 0
    noise = np.random.default_rng(seed + len(name)).normal(0, 0.01, 100) * (worse > 0)
    stage = {
        "docs": {
            "word_perplexity": scored(HARD + worse + noise, HARD, True, False),
            "bits_per_byte": scored(HARD, HARD),
        },
        "group": {"acc": scored(right, RIGHT)},
        "leaf": {"acc": scored(right, RIGHT, group="group")},
    }
    base = {
        "docs": {"word_perplexity": scored(HARD, HARD, True, False), "bits_per_byte": scored(HARD, HARD)},
        "group": {"acc": scored(RIGHT, RIGHT)},
        "leaf": {"acc": scored(RIGHT, RIGHT, group="group")},
    }
    for score in (score for metrics in base.values() for score in metrics.values()):
        del score["against_baseline"]
    stages = {"baseline": base, "quantized": stage} | ({"tuned": stage} if tuned else {})
    result["metrics"]["tasks"] = stages
    return result


def test_formats_are_compared_on_the_same_documents():
    runs = [with_tasks("none"), with_tasks("nf4", 0, 0.05), with_tasks("nf4", 1, 0.05), with_tasks("int4", 0, 0.5, 20)]
    setting = only(runs)
    scores = {score.task: score for score in tasks.compare_tasks(setting)}
    assert set(scores) == {"docs", "group"} and scores["docs"].metric == "word_perplexity"
    by_format = {c.format: d for c, d in scores["docs"].differences.items()}
    assert by_format["nf4"].delta == pytest.approx(0.05, abs=0.003) and by_format["nf4"].distinguishable
    assert by_format["nf4"].stderr < 0.01 < np.std(HARD) / 10, "paired"
    accuracy = {c.format: d for c, d in scores["group"].differences.items()}
    assert not accuracy["nf4"].distinguishable and accuracy["int4"].delta == pytest.approx(-0.2)
    (sentence,) = tasks.describe_tasks(setting)
    assert sentence.startswith(
        "Before any fine-tune, 1 of 4 task scores are not distinguishable from 16 bit. 3 are worse: "
    )
    assert "int4, block 64 on docs" in sentence and "better" not in sentence
    table = tasks.tasks_table(setting)
    assert [column.head for column in table.columns] == ["format", "docs word_perplexity", "group acc"]
    rows = {row.cells[0].text: [cell.text for cell in row.cells[1:]] for row in table.rows}
    assert re.fullmatch(r"\d\d\.\d\d \+5\.\d\d±0\.\d\d%", rows["nf4, block 64"][0])
    assert rows["nf4, block 64"][1].endswith(" ≈ +0.0000") and re.search(
        r" −0\.2000±0\.04\d\d$", rows["int4, block 64"][1]
    )
    assert rows["16 bit"][1] == f"{RIGHT.mean():.4f}"


def test_after_a_fine_tune_the_reference_is_the_fine_tune_of_16_bit():
    runs = [with_tasks("none", tuned=(2.0, 2.1)), with_tasks("nf4", 0, 0.05, tuned=(2.0, 2.1))]
    setting = only(runs)
    texts = tasks.describe_tasks(setting)
    assert len(texts) == 2 and texts[1].startswith(
        "After LoRA, 1 of 2 task scores are not distinguishable from LoRA on 16 bit"
    )
    alone = only([with_tasks("nf4", 0, 0.05, tuned=(2.0, 2.1))])
    (text,) = tasks.describe_tasks(alone)
    assert text.startswith("Before any fine-tune, 1 of 2"), "a run's own baseline, which nobody tuned"


def test_the_page_has_a_table_of_tasks_only_where_there_are_some(tmp_path):
    for name, run in (("a", with_tasks("none")), ("b", with_tasks("nf4", 0, 0.05)), ("c", finished("int8"))):
        store.write(tmp_path / name, run)
    collection = page.collect(tmp_path)
    assert len(collection.settings) == 2
    page.write(collection, tmp_path / "report")
    html, twin = ((tmp_path / "report" / name).read_text() for name in (page.HTML, page.MARKDOWN))
    for text in (html, twin):
        assert text.count("Tasks</h3>" if text is html else "### Tasks") == 1
        assert "docs word_perplexity" in text and "task scores are not distinguishable" in text
    assert re.search(
        r"\n\n\| format \| docs word_perplexity \| group acc \| result.json of seed \|\n(\|---){4}\|\n\| ", twin
    )


def test_a_run_shows_its_tasks_in_eighty_columns():
    result = with_tasks("nf4", 0, 0.05, 20)
    table = tables.tasks_table(result)
    assert table.heads == ["task", "baseline", "quantized"]
    assert [texts[0] for texts in table.texts] == ["docs word_perplexity", "docs bits_per_byte", "group acc"]
    assert re.fullmatch(r"[\d.]+ \+5\.\d\d±0\.\d\d%", table.texts[0][2]) and table.texts[1][2].endswith("≈ +0.0000")
    assert answer.describe_run(result)[-1] == (
        "Of 3 task scores, 2 of the quantized model are distinguishably worse and 0 better than the baseline's."
    )
    untested = finished("nf4")
    assert tables.tasks_table(untested) is None and "task scores" not in " ".join(answer.describe_run(untested))
    result["metrics"]["throughput"] |= {"quantize_weights_s": {"median": 1e6}, "dequantize_weights_s": {"median": 1e6}}
    result["metrics"]["memory"]["weights_bytes"] = 1
    output = io.StringIO()
    terminal.show(result, provenance._ROOT, Console(file=output, width=80))
    assert "group acc" in output.getvalue() and "…" not in output.getvalue()


def test_what_runs_without_tasks_say_is_as_before():
    (setting,) = group_runs(by_file([finished("none"), finished("nf4")]))
    assert tasks.tasks_table(setting).rows == tasks.compare_tasks(setting) == tasks.describe_tasks(setting) == []
    assert "Tasks" not in [table.title for table in extra_tables.build_tables(setting)]
