"""The main job, from the command line to its files, and its answers to bad input."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config

import formats
from qbench.cli.run import main
from tests.conftest import make_model

SHORT = ["eval.tokens=200", "data.seq=32", "tune.steps=3", "tune.batch=2", "tune.rank=4"]


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Run the main job in an empty folder; returns exit code, standard error and the result, if it left one."""

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["qbench", *map(str, arguments), "hydra.run.dir=out"])
        code = main()
        file = tmp_path / "out" / "result.json"
        result = json.loads(file.read_text()) if file.exists() else None
        return code, capfd.readouterr().err, result

    return run


def test_any_model_runs_through(command, any_model, tmp_path):
    code, _, result = command("+format=nf4", "block=32", "dq=true", f"model.path={any_model}", *SHORT)
    assert code == 0 and result["status"] == "done" and result["error"] is None
    metrics = result["metrics"]
    assert set(metrics["quality"]) == {"baseline", "quantized", "tuned"}
    for scores in metrics["quality"].values():
        assert scores["perplexity"] == pytest.approx(math.exp(scores["nll"])) and scores["stderr"] > 0
        assert scores["tokens"] >= 200
    for name in ("quantized", "tuned"):
        against = metrics["quality"][name]["against_baseline"]
        difference = metrics["quality"][name]["nll"] - metrics["quality"]["baseline"]["nll"]
        assert against["delta_nll"] == pytest.approx(difference, abs=1e-6)
        assert against["kl_mean"] > 0 and against["kl_p99"] >= against["kl_mean"] and 0 < against["top1_agreement"] <= 1
    error = metrics["error"]
    assert 15 < error["sqnr_db"] < 25 and 0 < error["output_relative"] < 0.3
    noise = sum(layer["mse"] * math.prod(layer["shape"]) for layer in error["layers"])
    assert noise / metrics["bits"]["quantized_parameters"] == pytest.approx(error["mse"])
    model = AutoModelForCausalLM.from_pretrained(any_model)
    assert metrics["bits"]["parameters"] == sum(p.numel() for p in model.parameters())
    fmt = formats.get("nf4", block=32, dq=True)
    held = sum(fmt.count_bytes(math.prod(layer["shape"])) for layer in error["layers"])
    assert metrics["memory"]["weights_bytes"] == held
    assert metrics["bits"]["per_parameter"] == 8 * held / metrics["bits"]["quantized_parameters"]
    assert metrics["memory"]["model_bytes"] < metrics["memory"]["baseline_bytes"]
    assert {"load", "eval", "tune"} <= set(metrics["memory"]["peak_bytes"])
    rates = metrics["throughput"]
    for key in ("quantize_weights_s", "dequantize_weights_s", "prefill_tokens_s", "decode_tokens_s", "tune_tokens_s"):
        assert min(rates[key]["samples"]) <= rates[key]["median"] <= max(rates[key]["samples"])
    assert len(rates["tune_tokens_s"]["samples"]) == 3
    out = tmp_path / "out"
    page = (out / "report.md").read_text()
    for figure in ("weights.png", "errors.png", "quality.png", "loss.png"):
        assert (out / figure).stat().st_size > 5000 and figure in page
    assert {file.name for file in (out / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert {file.suffix for file in out.iterdir()} == {"", ".json", ".md", ".png"}, "nothing else is left"


@pytest.mark.thorough
def test_every_format_runs_through(tmp_path, monkeypatch, tiny_llama):
    line = ["-m", f"+format={','.join(formats.names())}", f"model.path={tiny_llama}", *SHORT, "model.dtype=float32"]
    monkeypatch.setattr(sys, "argv", ["qbench", *line, f"hydra.sweep.dir={tmp_path}"])
    assert main() == 0
    results = [json.loads(file.read_text()) for file in tmp_path.glob("*/result.json")]
    assert sorted(result["config"]["format"]["name"] for result in results) == formats.names()
    assert {result["status"] for result in results} == {"done"}


def test_the_baseline_through_the_same_path(command, tiny_llama):
    _, _, result = command("+format=none", f"model.path={tiny_llama}", "tune=none", *SHORT[:2])
    metrics = result["metrics"]
    assert metrics["bits"]["per_parameter"] == metrics["bits"]["baseline"] == 16 and metrics["bits"]["compression"] == 1
    assert metrics["error"]["sqnr_db"] is None and metrics["error"]["mse"] == 0
    assert metrics["quality"]["quantized"]["nll"] == metrics["quality"]["baseline"]["nll"]
    assert metrics["quality"]["quantized"]["against_baseline"]["kl_mean"] == 0
    assert "tuned" not in metrics["quality"]


def test_the_same_command_twice_gives_the_same_numbers(command, tiny_llama):
    arguments = ["+format=nf4", "dq=true", f"model.path={tiny_llama}", *SHORT]
    first, second = command(*arguments)[2], command(*arguments)[2]
    assert first["run"]["id"] == second["run"]["id"]
    for key in ("quality", "error", "bits", "weights"):
        assert first["metrics"][key] == second["metrics"][key], key
    assert first["metrics"]["tune"]["loss"] == second["metrics"]["tune"]["loss"]
    other = command(*arguments, "seed=1")[2]
    assert other["run"]["id"] != first["run"]["id"]
    assert other["metrics"]["quality"]["quantized"] == first["metrics"]["quality"]["quantized"]
    assert other["metrics"]["quality"]["tuned"] != first["metrics"]["quality"]["tuned"]


BAD = {
    "no format": ([], r"format: none is given; accepted: .*\+format=nf4"),
    "unknown format": (["+format=nf5"], r"nf5.*accepted: fp4.*nf4.*quantile"),
    "block zero": (["+format=nf4", "block=0"], r"block: 0 is not accepted; an integer of at least 1"),
    "block negative": (["+format=nf4", "block=-3"], r"block: -3 is not accepted; an integer of at least 1"),
    "block fraction": (["+format=nf4", "block=7.5"], r"block: 7\.5 is not accepted; an integer"),
    "dq word": (["+format=nf4", "dq=maybe"], r"dq: 'maybe' is not accepted; true or false is"),
    "typo": (["+format=nf4", "blok=32"], r"blok is unknown; did you mean block\?"),
    "seed": (["+format=nf4", "seed=x"], r"seed: 'x'.*integer"),
    "no such model": (["+format=nf4", "model.path=./nowhere"], r"\./nowhere.*does not exist; accepted: a folder"),
    "no such text": (["+format=nf4", "data.path=nowhere.txt"], r"nowhere\.txt.*accepted:.*kjv"),
    "window": (["+format=nf4", "data.seq=1"], r"data\.seq: 1.*at least 2"),
    "dtype": (["+format=nf4", "model.dtype=int3"], r"model\.dtype: 'int3'.*bfloat16"),
    "device": (["+format=nf4", "device=tpu"], r"device: 'tpu'.*accepted: auto, cpu, cuda"),
    "steps": (["+format=nf4", "tune.steps=0"], r"tune\.steps: 0.*at least 1"),
    "launcher": (["-m", "+format=nf4", "hydra/launcher=ray"], r"'ray' is unknown; .*pip install 'hydra-ray-launcher>="),
    "experiment": (["+experiments=none_such"], r"'none_such' is unknown; accepted: .*table2"),
    "optimizer": (["+format=nf4", "tune.optimizer=lion"], r"tune\.optimizer: 'lion'.*adamw"),
    "tasks": (
        ["+format=nf4", "eval.tasks=[./nowhere]"],
        r"eval\.tasks: '\./nowhere' is no .*accepted: qbench_cont.*a folder",
    ),
    "budget": (
        ["+format=nf4", "tune.optimizer=paged_adamw", "tune.optimizer_budget=1MB"],
        r"tune\.optimizer_budget: '1MB' is not accepted; null or at least one page, tune\.optimizer_page=2MiB",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(command, case):
    arguments, expected = BAD[case]
    code, stderr, _ = command(*arguments)
    assert code == 2
    lines = [line for line in stderr.splitlines() if line.startswith("qbench: ")]
    assert len(lines) == 1 and "Traceback" not in stderr
    assert re.search(expected, lines[0]), lines[0]


def test_a_window_longer_than_the_models_positions(command, tmp_path):
    folder = make_model("gpt2", tmp_path / "gpt2")
    code, stderr, _ = command("+format=nf4", f"model.path={folder}", "data.seq=129")
    assert code == 2 and "data.seq: 129 is more than the model's 128 positions" in stderr
    code, _, result = command("+format=nf4", f"model.path={folder}", "eval.tokens=300", "tune=none")
    assert code == 0 and result["config"]["data"]["seq"] == 128


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_cuda_where_there_is_none(command):
    code, stderr, result = command("+format=nf4", "device=cuda")
    assert code == 2 and "device: 'cuda' is not on this machine; accepted here: auto, cpu" in stderr
    assert result is None, "no run had begun"


def test_a_text_shorter_than_a_window(command, tmp_path, tiny_llama):
    (tmp_path / "short.txt").write_text("In the beginning.")
    code, stderr, _ = command("+format=nf4", f"data.path={tmp_path}/short.txt", f"model.path={tiny_llama}")
    assert code == 2 and "less than one window of data.seq=" in stderr


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_or_inf_in_a_weight_names_the_tensor(command, tmp_path, bad):
    folder = make_model("llama", tmp_path / "broken")
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    code, stderr, result = command("+format=nf4", f"model.path={folder}", *SHORT)
    assert code == 2 and "model.layers.1.mlp.up_proj.weight" in stderr
    assert result is None and not (tmp_path / "out").exists(), "no run had begun"


def test_a_missing_folder_beside_others_is_no_hub_id(command, tmp_path):
    (tmp_path / "models").mkdir()
    code, stderr, _ = command("+format=nf4", "model.path=models/nowhere")
    assert code == 2 and "'models/nowhere' does not exist" in stderr


def test_a_model_with_nothing_to_quantize(command, tmp_path):
    folder = make_model("gpt2", tmp_path / "empty")
    AutoModelForCausalLM.from_config(GPT2Config(vocab_size=4096, n_embd=16, n_layer=0, n_head=2)).save_pretrained(
        folder
    )
    code, stderr, _ = command("+format=nf4", f"model.path={folder}", *SHORT)
    assert code == 2 and "no linear layer to quantize" in stderr


class Exploit:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_pickle_that_runs_code_is_refused(command, tmp_path, tiny_llama):
    folder = make_model("llama", tmp_path / "pickle")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    assert command("+format=nf4", f"model.path={folder}", "tune=none", *SHORT[:2])[0] == 0, (
        "weights_only takes this one"
    )
    torch.save({**state, "extra": Exploit()}, folder / "pytorch_model.bin")
    code, stderr, _ = command("+format=nf4", f"model.path={folder}", *SHORT)
    assert code == 2 and "is no whole file of tensors" in stderr
    assert not (tmp_path / "pwned").exists()


def test_a_run_that_fails_inside_leaves_its_traceback(command, tiny_llama):
    code, stderr, result = command("+format=nf4", f"model.path={tiny_llama}", *SHORT, "tune.lr=1e30", "tune.clip=1e30")
    assert code == 1 and "FloatingPointError" in stderr
    assert result["status"] == "failed" and result["error"]["type"] == "FloatingPointError"
    assert "Traceback" in result["error"]["traceback"] and "quantized" in result["metrics"]["quality"]


def test_a_report_that_cannot_be_written_loses_no_measurement(command, tiny_llama, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("qbench.report.run.figures.draw", full)
    code, stderr, result = command("+format=nf4", f"model.path={tiny_llama}", *SHORT)
    assert code == 1 and "No space left" in stderr
    assert result["status"] == "failed" and "Traceback" in result["error"]["traceback"]
    assert "tuned" in result["metrics"]["quality"]


def test_an_interrupt_keeps_what_was_measured(command, tiny_llama, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("qbench.runs.fine_tuning.train", interrupt)
    code, stderr, result = command("+format=nf4", f"model.path={tiny_llama}", *SHORT)
    assert code == 130 and "interrupted" in stderr
    assert result["error"]["type"] == "KeyboardInterrupt" and "quantized" in result["metrics"]["quality"]


def test_the_command_as_a_process_writes_only_its_run_directory(tmp_path, tiny_llama):
    arguments = ["+format=nf4", f"model.path={tiny_llama}", *SHORT]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "qbench", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "4.500 bits per weight" in done.stdout
    assert [entry.name for entry in tmp_path.iterdir()] == ["runs"]
