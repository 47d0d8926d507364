"""qbench from Python: the same numbers as from the command line, and the same answers to bad input."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import formats
import qbench
from qbench.errors import InputError
from tests.qbench.cli.test_run import command  # noqa: F401  a fixture

DOCS = Path(__file__).parents[3] / "docs"
SHORT = {
    "data": {"seq": 32},
    "eval": {"tokens": 200},
    "tune": {"steps": 3, "batch": 2, "rank": 4},
}
TOLD = ["eval.tokens=200", "data.seq=32", "tune.steps=3", "tune.batch=2", "tune.rank=4"]


def test_as_from_the_command_line(command, tiny_llama, tmp_path):  # noqa: F811
    code, _, expected = command("+format=nf4", "block=32", "dq=true", "seed=3", f"model.path={tiny_llama}", *TOLD)
    assert code == 0
    result = qbench.run("nf4", block=32, dq=True, seed=3, model=tiny_llama, out=tmp_path / "there", **SHORT)
    assert result["config"] == expected["config"] and result["run"]["id"] == expected["run"]["id"]
    for part in ("quality", "error", "bits"):
        assert result.metrics[part] == expected["metrics"][part]
    assert json.loads((result.folder / "result.json").read_text()) == result
    again = qbench.run("nf4", block=32, dq=True, seed=3, model=str(tiny_llama), out=tmp_path / "there", **SHORT)
    assert again == result, "a finished run is not done again"
    shown = result._repr_markdown_()
    assert (
        result.answer[0] in shown
        and "| tuned |" in shown
        and repr(result).startswith("<Result of nf4 + dq, block 32 in")
    )
    frame = qbench.load(tmp_path)
    assert len(frame) == 2 and set(frame["metrics.quality.tuned.nll"]) == {result.metrics["quality"]["tuned"]["nll"]}


def test_a_format_and_a_method_of_its_own(tiny_llama, tmp_path, monkeypatch):
    class Coarse(formats.Format):
        name, bits, source, levels = "coarse", 2, "a test", (-1.0, 0.0, 0.5, 1.0)

    monkeypatch.chdir(tmp_path)
    settings = {**SHORT, "tune": {**SHORT["tune"], "method": "ia3"}}
    result = qbench.run(Coarse(block=16), model=tiny_llama, **settings)
    assert result["config"]["format"]["name"] == "coarse" and result["config"]["block"] == 16
    assert result["config"]["tune"]["method"] == "ia3" and result["config"]["tune"]["lr"] == 1e-2, "as conf/tune has it"
    assert result.metrics["bits"]["per_parameter"] == pytest.approx(2 + 32 / 16, abs=0.01)
    assert result.folder.parent == Path("runs") and result.folder.name.startswith("coarse_block16_dq-False_seed0_")
    assert set(qbench.run("none", tune=None, model=tiny_llama, **{k: SHORT[k] for k in ("data", "eval")}).metrics) >= {
        "quality", "error"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"format": "nf5"}, r"format: 'nf5' is unknown; accepted: .*nf4"),
        ({"block": 0}, "block: 0 is not accepted; an integer of at least 1"),
        ({"tune": "loha"}, "tune: 'loha' is unknown; accepted: .*lora"),
        ({"tune": {"stps": 3}}, r"tune\.stps is unknown; did you mean tune\.steps\?"),
        ({"model": "no/such/folder"}, "model.path"),
        ({"data": {"seq": 1}}, "data.seq"),
        ({"device": "tpu"}, "device: 'tpu'"),
        ({"track": "comet"}, "track: 'comet'"),
    ],
)
def test_bad_input(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        qbench.run(**given)
    assert "\n" not in str(error.value)


def test_to_import_it_takes_no_time():
    """Nothing that takes seconds to import, and no CUDA."""
    slow = {"torch", "transformers", "peft", "hydra", "triton", "matplotlib"}
    script = f"import sys, qbench; print({slow} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "set()"


def test_every_key_of_a_result_is_explained(tiny_llama, tmp_path):
    settings = {**SHORT, "tune": {**SHORT["tune"], "init": "loftq", "merge": True, "adapter_format": "int8"}}
    settings["eval"] = {**SHORT["eval"], "tasks": ["qbench_docs", "qbench_grammar"], "limit": 3}
    result = qbench.run("quantile", model=tiny_llama, out=tmp_path / "out", **settings)
    page = (DOCS / "result.md").read_text()
    heads = re.findall(r"^## (.*)", page, re.M)
    explained = {*re.findall(r"`([a-z0-9_]+)`", page), *(word for head in heads for word in head.split("."))}
    free = {"seconds", "config", "versions", "peak_bytes"}  # whose keys are names of phases, settings, packages

    def keys(content: dict) -> set[str]:
        return {key for key in content} | {
            k for key, value in content.items() if isinstance(value, dict) and key not in free for k in keys(value)
        }

    tasks = result.metrics["tasks"]
    assert list(tasks) == ["baseline", "quantized", "tuned"]
    assert "| qbench_grammar acc |" in result._repr_markdown_() and "task scores" in result.answer[-1]
    scores = [score for stage in tasks.values() for task in stage.values() for score in task.values()]
    result.metrics["tasks"] = {}  # by stages, and by names of tasks and metrics
    assert set().union(keys(result), *map(keys, scores)) - explained == set()
