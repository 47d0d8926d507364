"""lm-eval's tasks in a run: the scores of its command line, paired with the baseline, without a network."""

import json
import math
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.api.metrics import mean, weighted_perplexity
from scipy.stats import ttest_rel
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

import formats
from qbench.checkpoint import location
from qbench.errors import InputError
from qbench.measure import task_files, tasks
from qbench.measure.task_scores import BLOCKS, pseudo_values
from qbench.model.selection import linear_layers
from qbench.results import store
from qbench.runs.experiment import run
from qbench.settings import DataSettings, EvalSettings, ModelSettings, Settings, TuneSettings
from qbench.training import adapters, data

ROOT = Path(__file__).parents[3]
BUNDLED_TASKS = ["qbench_docs", "qbench_continuation", "qbench_grammar"]
CASES = """task: cases
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/cases.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{a}}}} and"
doc_to_target: "{{{{b}}}}"
generation_kwargs: {{max_gen_toks: 2, until: ["\\n"]}}
filter_list:
  - name: first
    filter: [{{function: take_first}}]
metric_list: [{{metric: exact_match}}]
"""
CHOICES = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {folder}/{name}.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{a}}}}"
doc_to_choice: ["{{{{b}}}}", "other"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""
GROUP = """group: both
task: [one, two]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


@pytest.fixture
def local(tmp_path) -> Path:
    """A folder of tasks whose data are JSON files beside them."""
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, count in (("cases", 3), ("one", 5), ("two", 7)):
        rows = [{"a": f"The {name} {i}", "b": "table " * (1 + i % 2)} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text((CASES if name == "cases" else CHOICES).format(folder=folder, name=name))
    (folder / "both.yaml").write_text(GROUP)
    return folder


def loaded(folder: Path, dtype=torch.float32) -> tuple:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.thorough
def test_the_scores_are_those_of_lm_evals_own_command_line(tmp_path):
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "8"]
    command += [
        "--model_args",
        f"pretrained={location.BUNDLED},dtype=float32",
        "--include_path",
        task_files.BUNDLED_TASKS,
    ]
    command += [
        "--tasks",
        ",".join(BUNDLED_TASKS),
        "--limit",
        "4",
        "--log_samples",
        "--output_path",
        tmp_path / "theirs",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.rglob("results_*.json")
    theirs = json.loads(file.read_text())
    ours = tasks.evaluate(*loaded(location.BUNDLED), BUNDLED_TASKS, limit=4)
    assert list(ours.results["results"]) == BUNDLED_TASKS
    for task in BUNDLED_TASKS:
        assert ours.results["results"][task] == theirs["results"][task], "to the last digit"
        (file,) = tmp_path.rglob(f"samples_{task}_*.jsonl")
        samples = [json.loads(line) for line in file.read_text().splitlines()]
        for our, their in zip(ours.samples[task], samples, strict=True):
            assert our["doc_hash"] == their["doc_hash"] and our["prompt_hash"] == their["prompt_hash"]
            assert all(json.loads(json.dumps(our[m])) == their[m] for m in our["metrics"])


TINY = {"data": DataSettings(seq=32), "device": "cpu"}


def settings(model: Path, steps: int | None = 2, name: str = "nf4", **evaluated) -> Settings:
    tune = None if steps is None else TuneSettings(steps=steps, batch=2, rank=2, dropout=0.1)
    evaluation = EvalSettings(tokens=100, **evaluated)
    model_settings = ModelSettings(str(model), "float32")
    return Settings(formats.get(name, block=64), model_settings, tune=tune, eval=evaluation, **TINY)


def test_a_run_keeps_lm_evals_results_and_pairs_them_by_document(tiny_llama, tmp_path):
    asked = settings(tiny_llama, tasks=BUNDLED_TASKS, limit=12)
    result = run(asked, tmp_path / "with")
    stages = result["metrics"]["tasks"]
    assert list(stages) == ["baseline", "quantized", "tuned"] and list(stages["tuned"]) == BUNDLED_TASKS
    kept, samples = {}, {}
    for stage in stages:
        kept[stage] = json.loads((tmp_path / "with" / "lm_eval" / f"{stage}.json").read_text())["results"]
        for task in BUNDLED_TASKS:
            lines = (tmp_path / "with" / "lm_eval" / f"{stage}_{task}.jsonl").read_text().split("\n")[:-1]
            samples[stage, task] = [json.loads(line) for line in lines]
    for stage, by_task in stages.items():
        for task, scores in by_task.items():
            for metric, score in scores.items():
                assert score["value"] == kept[stage][task][f"{metric},none"] and score["n"] == 12
                ours, base = (np.array([row[metric] for row in samples[s, task]], float) for s in (stage, "baseline"))
                if metric != "acc":
                    per = {"word_perplexity": base[:, 1].mean(), "bits_per_byte": base[:, 1].mean() * math.log(2)}[
                        metric
                    ]
                    ours, base = -ours[:, 0] / per, -base[:, 0] / per
                whole = math.log(score["value"]) if score["log"] else score["value"]
                assert np.mean(score["documents"]) == pytest.approx(whole) == pytest.approx(ours.mean())
                if stage == "baseline":
                    assert "against_baseline" not in score
                    continue
                against = score["against_baseline"]
                assert against["delta"] == pytest.approx((ours - base).mean(), abs=1e-12)
                if metric == "acc" and np.ptp(ours - base):
                    assert against["p"] == pytest.approx(ttest_rel(ours, base).pvalue)
                    assert against["stderr"] == pytest.approx(np.std(ours - base, ddof=1) / 12**0.5)
                elif metric != "acc":  # documents differ in length, which adds to the error of a ratio
                    assert against["stderr"] == pytest.approx(np.std(ours - base, ddof=1) / 12**0.5, rel=0.5)
                    assert 0 < against["p"] < 1
    assert (
        stages["baseline"]["qbench_grammar"]["acc"]["stderr"] == kept["baseline"]["qbench_grammar"]["acc_stderr,none"]
    )
    page = (tmp_path / "with" / "report.md").read_text()
    assert "## Tasks" in page and "| qbench_docs word_perplexity |" in page and "task scores" in page
    left = {file.name for file in (tmp_path / "with").iterdir() if not file.name.endswith(".png")}
    assert left == {".lock", "adapter", "lm_eval", "report.md", "result.json"}
    plain = run(settings(tiny_llama), tmp_path / "without")
    assert plain["metrics"]["quality"] == result["metrics"]["quality"], (
        "lm-eval seeds all generators: not those of the run"
    )
    assert plain["config"]["eval"] == {"tokens": 100} and plain["run"]["id"] != result["run"]["id"]


def test_the_baselines_scores_are_measured_once_a_sweep(tiny_llama, tmp_path):
    asked = settings(tiny_llama, None, "none", tasks="qbench_grammar", limit=4)
    first = run(asked, tmp_path / "a", tmp_path / "baselines")
    second = run(replace(asked, format=formats.get("int8", block=64)), tmp_path / "b", tmp_path / "baselines")
    other = run(replace(asked, eval=EvalSettings(100, "qbench_grammar", 3)), tmp_path / "c", tmp_path / "baselines")
    assert [r["run"]["baseline"]["reused"] for r in (first, second, other)] == [False, True, False]
    assert "tasks_baseline" in first["run"]["seconds"] and "tasks_baseline" not in second["run"]["seconds"]
    assert first["metrics"]["tasks"]["baseline"] == second["metrics"]["tasks"]["baseline"]
    for file in ("baseline.json", "baseline_qbench_grammar.jsonl"):
        assert (tmp_path / "a/lm_eval" / file).read_bytes() == (tmp_path / "b/lm_eval" / file).read_bytes()
    same = first["metrics"]["tasks"]["quantized"]["qbench_grammar"]["acc"]["against_baseline"]
    assert same == {"delta": 0, "stderr": 0, "p": 1}, "16 bit is scored on the same documents again"


def test_a_folder_and_a_group_of_tasks(local, tiny_llama):
    model, tokenizer = loaded(tiny_llama)
    done: list[float] = []
    loaded_tasks = tasks.load([str(local)])
    metrics = tasks.evaluate(model, tokenizer, loaded_tasks, advance=done.append).metrics(loaded_tasks)
    assert set(metrics) == {"cases", "one", "two"} and "exact_match,first" in metrics["cases"]
    assert loaded_tasks.count_documents() == 15 and sum(done) == pytest.approx(15) and len(done) > 3
    group = tasks.Tasks()
    tasks._add_loaded(group, tasks.TaskManager(include_path=local, include_defaults=False).load(["both"]), "both")
    scores = tasks.evaluate(model, tokenizer, group)
    metrics = scores.metrics(group, scores)
    assert set(metrics) == {"one", "two", "both"}
    assert metrics["one"]["acc"]["group"] == "both" and "group" not in metrics["both"]["acc"]
    both = metrics["both"]["acc"]
    assert both["n"] == 12 and both["against_baseline"] == {"delta": 0, "stderr": 0, "p": 1}
    assert both["documents"] == metrics["one"]["acc"]["documents"] + metrics["two"]["acc"]["documents"]


def test_what_a_task_reads_is_part_of_what_a_run_is(local, tmp_path, monkeypatch):
    before = task_files.digest([str(local / "one.yaml")])
    assert before == task_files.digest([str(local / "one.yaml")]) != task_files.digest(["qbench_docs"])
    (local / "one.jsonl").write_text("")
    assert task_files.digest([str(local / "one.yaml")]) != before
    elsewhere = tmp_path / "elsewhere.csv"
    elsewhere.write_text("a,b\n")
    (local / "one.yaml").write_text(f"task: one\ndataset_kwargs: {{data_files: [{elsewhere}]}}\n")
    before = task_files.digest([str(local / "one.yaml")])
    elsewhere.write_text("a,c\n")
    assert task_files.digest([str(local / "one.yaml")]) != before


@pytest.mark.parametrize("method", ["prefix", "p_tuning"])
def test_virtual_tokens_take_positions(method, tiny_llama):
    """With learned positions, a document of the model's maximal length leaves no room for virtual tokens."""
    config = dict(vocab_size=4096, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(GPT2Config(**config)).eval()
    tune = TuneSettings(method=method, virtual_tokens=8)
    tuned = adapters.add(model, list(linear_layers(model)), tune, 0, None)
    scores = tasks.evaluate(tuned, AutoTokenizer.from_pretrained(tiny_llama), ["qbench_docs"], limit=2)
    assert math.isfinite(scores.results["results"]["qbench_docs"]["bits_per_byte,none"])
    assert scores.results["max_length"] == 56


BEGIN = "<s>"


def beginning(add: bool) -> tuple:
    """A model whose tokenizer has a beginning-of-text token, which it adds itself or not."""
    tokenizer = AutoTokenizer.from_pretrained(location.BUNDLED)
    tokenizer.add_special_tokens({"bos_token": BEGIN, "pad_token": "<pad>"})
    begin = tokenizer.bos_token_id
    single = f"{BEGIN} $A" if add else "$A"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=[(BEGIN, begin)])
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=4100, n_embd=32, n_layer=1, n_head=2, n_positions=64, bos_token_id=begin)
    return AutoModelForCausalLM.from_config(config).eval(), tokenizer


def of_lm_eval(model, tokenizer, folders: list, **options) -> dict:
    lm = tasks.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, softmax_dtype="float32", **options)
    loaded_tasks = tasks.load(list(map(str, folders)))
    return tasks.evaluator.simple_evaluate(
        lm,
        tasks=loaded_tasks.top,
        task_manager=tasks.TaskManager(include_defaults=False),
        limit=4,
        bootstrap_iters=1000,
    )["results"]


@pytest.mark.parametrize("add", [True, False])
def test_scores_with_a_tokenizer_that_begins_texts(add, local):
    """Scores are lm-eval's. For rolling likelihoods it adds a beginning-of-text token itself, so it needs to be told."""
    model, tokenizer = beginning(add)
    choices, rolling = [local / "one.yaml"], ["qbench_docs"]
    ours = [tasks.evaluate(model, tokenizer, list(map(str, t)), limit=4).results["results"] for t in (choices, rolling)]
    assert ours == [
        of_lm_eval(model, tokenizer, choices),
        of_lm_eval(model, tokenizer, rolling, **{"add_bos_token": False} if add else {}),
    ]


@pytest.mark.parametrize("add", [True, False])
def test_no_text_of_a_task_begins_twice(add, local, monkeypatch):
    """Whether or not a text, or the one beside it in the batch, brings its own beginning-of-text token."""
    for name in ("cases", "one"):
        texts = [f"{BEGIN * (i % 2)}The {name} {i}" for i in range(4)]
        rows = [{"a": text, "b": "table"} for text in [f"The longest of the {name}, the first of its batch", *texts]]
        (local / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (local / "two.jsonl").write_text(
        "".join(json.dumps({"a": f"{BEGIN * (i % 2)}A text {i}"}) + "\n" for i in range(4))
    )
    rolling = CHOICES.format(folder=local, name="two").replace("multiple_choice", "loglikelihood_rolling")
    rolling = re.sub(r"doc_to_choice: .*", 'doc_to_target: "{{a}}"', rolling).replace("doc_to_target: 0\n", "")
    (local / "two.yaml").write_text(
        rolling.replace('doc_to_text: "{{a}}"', 'doc_to_text: ""').replace("acc", "bits_per_byte")
    )
    model, tokenizer = beginning(add)
    seen = []
    forward = model.forward

    def check_inputs(input_ids, *args, **options):
        seen.extend(input_ids.tolist())
        return forward(input_ids, *args, **options)

    monkeypatch.setattr(model, "forward", check_inputs)
    scores = tasks.evaluate(model, tokenizer, [str(local / f"{name}.yaml") for name in ("cases", "one", "two")])
    assert set(scores.results["results"]) == {"cases", "one", "two"}
    begin = tokenizer.bos_token_id
    rows = [[token for token in row if token != tokenizer.pad_token_id] for row in seen]
    begun = [row[0] == begin for row in rows if len(row) > 1]
    assert all(begun) if add else any(begun)
    assert not [row for row in seen if (begin, begin) in pairwise(row)]


def test_a_tokenizer_that_does_not_fit_the_model(local):
    model, tokenizer = beginning(add=True)
    model.resize_token_embeddings(4096)
    with pytest.raises(InputError, match="makes token 4096 of a task's text, but the model knows 4096 tokens"):
        tasks.evaluate(model, tokenizer, [str(local / "one.yaml")])
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"eval\.tasks: the model's tokenizer has no token that begins or ends a text"):
        tasks.evaluate(model, tokenizer, [str(local / "one.yaml")])


@given(st.lists(st.tuples(st.floats(-200, -1), st.integers(1, 60)), min_size=3, max_size=40))
def test_pseudo_values_of_a_perplexity(items):
    """Their mean is the logarithm of the perplexity, and their error is nearly that of the delta method."""
    values = pseudo_values(lambda subset: math.log(weighted_perplexity(subset)), items)
    loss, words = -np.array([a for a, _ in items]), np.array([b for _, b in items], float)
    ratio = loss.sum() / words.sum()
    assert values.mean() == pytest.approx(ratio)
    influence = (loss - ratio * words) / words.mean()
    if len(items) > 20 and words.min() > 10:
        assert np.std(values) == pytest.approx(np.std(influence), rel=0.5, abs=1e-9)


def test_pseudo_values_of_a_mean_are_its_items_and_many_are_in_blocks():
    items = list(np.random.default_rng(0).normal(size=1000))
    assert pseudo_values(mean, items).tolist() == items
    blocks = pseudo_values(lambda subset: float(np.mean(subset)), items)
    assert len(blocks) == BLOCKS and blocks.mean() == pytest.approx(np.mean(items))
    assert np.std(blocks) / BLOCKS**0.5 == pytest.approx(np.std(items) / 1000**0.5, rel=0.15)


BAD = {
    "a word": ("3", r"eval\.tasks: 3 is not accepted; a task or a list of tasks"),
    "no strings": ("[1,2]", r"eval\.tasks: \[1, 2\] is not accepted; a task or a list of tasks"),
    "no path": (
        "[./nowhere]",
        r"'\./nowhere' is no YAML file, nor a folder.*accepted: qbench_continuation, qbench_docs",
    ),
    "no YAML": ("[./text.yaml]", r"'\./text\.yaml' could not be loaded \(\w+: .*accepted: qbench_continuation"),
    "twice": (
        "[qbench_docs,qbench_docs]",
        r"'qbench_docs' has qbench_docs once more; accepted: tasks of different names",
    ),
    "data": ("[mine/one.yaml]", r"'mine/one\.yaml' could not be loaded \(FileNotFoundError: .*one\.jsonl"),
    "code": ("[mine/two.yaml]", r"'two' runs what the model writes"),
    "unreadable": ("[empty]", r"'empty' holds no task that lm-eval can read"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_before_a_model_is_loaded(case, local, tmp_path, monkeypatch):
    entries, expected = BAD[case]
    (local / "one.jsonl").unlink()
    (local / "two.yaml").write_text((local / "two.yaml").read_text() + "unsafe_code: true\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "it.yaml").write_text("nothing: at all\n")
    (tmp_path / "text.yaml").write_text("a: [")
    monkeypatch.chdir(tmp_path)
    from omegaconf import OmegaConf

    asked = OmegaConf.to_object(OmegaConf.create(f"tasks: {entries}"))["tasks"]
    with pytest.raises(InputError, match=expected) as raised:
        tasks.load(EvalSettings(tasks=asked).tasks)
    assert "\n" not in str(raised.value)


def test_limits_and_batches_are_positive():
    for key in ("limit", "batch"):
        with pytest.raises(InputError, match=rf"eval\.{key}: 0 is not accepted; .*an integer of at least 1"):
            EvalSettings(**{key: 0})


def test_a_task_that_nobody_knows(tmp_path, tiny_llama):
    """It is neither bundled nor one of lm-eval's tasks, whose list needs no network."""
    asked = settings(tiny_llama, tasks=["no_such_task"])
    with pytest.raises(
        InputError, match=r"'no_such_task' is no task; accepted: qbench_continuation, .* any lm-eval task"
    ):
        run(asked, tmp_path)
    assert not (tmp_path / store.FILE).exists(), "no run had begun"


NO_SOCKETS = """import socket
def refuse(*_, **__):
    open({record!r}, "a").write("asked\\n")
    raise OSError("there is no network")
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, refuse)
socket.getaddrinfo = refuse
"""


def test_a_run_asks_for_no_network_and_writes_nothing_else(tiny_llama, local, tmp_path):
    """In a process with an empty home, where opening a socket is recorded."""
    places = {name: tmp_path / name for name in ("site", "home", "temporary", "work")}
    for folder in places.values():
        folder.mkdir()
    record = tmp_path / "sockets"
    (places["site"] / "sitecustomize.py").write_text(NO_SOCKETS.format(record=str(record)))
    path = os.pathsep.join(map(str, (places["site"], ROOT)))
    environment = os.environ | {"PYTHONPATH": path, "HOME": str(places["home"]), "TMPDIR": str(places["temporary"])}
    environment |= {"HF_DATASETS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "MPLCONFIGDIR": str(tmp_path)}
    for name in ("HF_HOME", "HF_HUB_OFFLINE", "XDG_CACHE_HOME", "HF_DATASETS_CACHE"):
        environment.pop(name, None)
    line = [sys.executable, "-m", "qbench", "+format=nf4", f"model.path={tiny_llama}", "tune=none", "eval.tokens=64"]
    line += [
        "data.seq=32",
        "eval.limit=2",
        f"eval.tasks=[{','.join([*BUNDLED_TASKS, str(local)])}]",
        "hydra.run.dir=out",
    ]
    done = subprocess.run(line, cwd=places["work"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not record.exists()
    by_task = store.read(places["work"] / "out")["metrics"]["tasks"]["quantized"]
    assert list(by_task) == [*BUNDLED_TASKS, "cases", "one", "two"]
    assert [entry.name for entry in places["work"].iterdir()] == ["out"] and not list(places["temporary"].iterdir())
    left = {file.relative_to(places["home"]).parts[:2] for file in places["home"].rglob("*") if file.is_file()}
    assert left <= {(".cache", "numba"), (".triton", "cache")}, left
    lines = done.stderr.splitlines()
    assert all(re.fullmatch(r".* +\d+\.\d s", line) for line in lines if line), "lm-eval says nothing"
    assert "tasks of the quantized model" in done.stderr and "task scores" in done.stdout


def test_the_documents_are_made_again_byte_for_byte(tmp_path, monkeypatch):
    folder = ROOT / "experiments" / "tasks"
    monkeypatch.syspath_prepend(str(folder))
    runpy.run_path(str(folder / "make.py"))["main"](tmp_path)
    files = sorted(tmp_path.iterdir())
    assert [file.stem for file in files] == task_files.bundled_names()
    for file in files:
        assert (
            file.read_bytes() == (task_files.BUNDLED_TASKS / file.name).read_bytes() and file.stat().st_size < 200_000
        )


def test_no_run_is_trained_on_the_documents():
    trained = " ".join(" ".join(data.read("docs").train).split()) + " ".join(data.read("kjv").train)
    rows = {name: (task_files.BUNDLED_TASKS / f"{name}.jsonl").read_text().splitlines() for name in BUNDLED_TASKS[:2]}
    parts = [part for row in rows["qbench_docs"] for part in json.loads(row)["text"].split("\n\n") if len(part) > 80]
    parts += [json.loads(row)["context"] for row in rows["qbench_continuation"]]
    assert len(parts) > 150 and not [part for part in parts if " ".join(part.split()) in trained]


def test_the_sentences_differ_in_one_word():
    rows = [json.loads(line) for line in (task_files.BUNDLED_TASKS / "qbench_grammar.jsonl").read_text().splitlines()]
    for row in rows:
        good, bad = row["good"].split(), row["bad"].split()
        assert len(good) == len(bad) and sum(a != b for a, b in zip(good, bad, strict=True)) == 1
    assert len({row["good"] for row in rows}) == len(rows) == 200
