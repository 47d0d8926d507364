"""A checkpoint becomes a packed one, whatever interrupts that, and what cannot become one is named."""

import errno
import os
import re
import sys

import pytest
import torch
import transformers

import qbench
from qbench.checkpoint import loading
from qbench.checkpoint.safetensors_io import INDEX, shard_name
from qbench.cli.quantize import main
from qbench.cli.run import main as run_main
from qbench.errors import InputError
from qbench.system import files
from tests.qbench.sample_checkpoints import (
    changed,
    edit_config,
    edit_index,
    edit_tensors,
    make_sharded,
    quantize,
    read_files,
    truncated,
)

UP = "model.layers.0.mlp.up_proj.weight"
BAD_SOURCES = {
    "a missing file": (lambda f: (f / shard_name(2, 5)).unlink(), r"model-00002-of-00005.safetensors is missing"),
    "a file cut short": (truncated(shard_name(2, 5), 10_000), r"00002-of-00005.safetensors is not a whole safetensors"),
    "a header cut short": (truncated(shard_name(2, 5), 5), r"model-00002-of-00005.safetensors is not a whole safetensors"),
    "an index cut short": (truncated(INDEX, 50), r"index.json is not valid JSON"),
    "an empty index": (lambda f: (f / INDEX).write_text("{}"), r"index.json has no weight_map"),
    "an index that leaves": (lambda f: edit_index(f, lambda i: i.update(a="../x")), r"names '../x'; files of the same"),
    "an index of more": (lambda f: edit_index(f, lambda i: i.update(a=shard_name(1, 5))), r"00001-of-00005.* lacks a,"),
    "NaN in a weight": (changed(UP, lambda w: w.view(-1).index_fill(0, torch.tensor(5), torch.nan).view_as(w)),
                        rf"{UP}: holds 1 NaN"),
    "Inf in what is copied": (changed("model.norm.weight", lambda w: w / 0), r"model.norm.weight holds NaN or Inf"),
    "another shape": (changed(UP, lambda w: w[1:]), rf"{UP} is .*\[95, 64\](, not|; accepted: bfloat16) \[96, 64\]"),
    "integers": (changed(UP, lambda w: w.int()), rf"{UP} is int32; accepted: floating point"),
    "no such weight": (changed(UP, None), rf"missing {UP}$|{UP} is missing"),
    "a tensor too many": (lambda f: edit_tensors(f, lambda s: s.update(a=torch.ones(1))),
                          r"left over a$|: a has no place in"),
    "twice, in a file": (lambda f: edit_tensors(f, lambda s: s.update({UP[6:]: s[UP].clone()})), r"there a second time"),
    "twice, in two": (lambda f: edit_tensors(f, lambda s: s.update({UP: s["model.norm.weight"].clone()}), "model.norm"),
                      rf"{UP} is both in .*; accepted: one of them"),
    "quantized": (lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}), r"quantized already, by gptq"),
    "no model": (lambda f: edit_config(f, model_type="what"), r"could not be loaded"),
    "no config": (lambda f: (f / "config.json").unlink(), r"holds no config.json"),
    "no weights": (lambda f: [file.unlink() for file in f.glob("*safetensors*")], r"holds no weights; accepted: model.s"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_what_cannot_be_quantized_is_named_in_a_line(copied, tmp_path, case):
    spoil, message = BAD_SOURCES[case]
    spoil(copied)
    with pytest.raises(InputError, match=message) as raised:
        quantize(copied, tmp_path / "out")
    assert "\n" not in str(raised.value)


def test_tensors_that_the_model_makes_of_others_stay_as_they_are(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    make_sharded(config, tmp_path / "mixtral")
    quantize(tmp_path / "mixtral", tmp_path / "out")
    packed = loading.load(str(tmp_path / "out"), torch.bfloat16, torch.device("cpu")).model
    whole = loading.load(str(tmp_path / "mixtral"), torch.bfloat16, torch.device("cpu")).model
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(packed.get_parameter(experts), whole.get_parameter(experts))
    with pytest.warns(UserWarning, match="Only"):
        expected = qbench.pack(whole, "nf4", block=32, dq=True).state_dict()
    assert all(
        torch.equal(tensor, expected[name]) for name, tensor in packed.state_dict().items() if tensor is not None
    )


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Run the command in an empty folder; returns exit code and standard error."""

    def run(*arguments, main=main):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["qbench", *map(str, arguments)])
        return main(), capfd.readouterr().err

    return run


def test_the_command(command, sharded_llama, tmp_path):
    arguments = ["+format=nf4", "block=32", "dq=true", f"model.path={sharded_llama}", "out=packed"]
    code, stderr = command(*arguments)
    first, *_, last = stderr.splitlines()
    assert code == 0 and len(stderr.splitlines()) == 6, "a line for each file, where there is no terminal"
    assert first.startswith("model-00001-of-00005.safetensors") and last.startswith(
        "packed: 14 layers in nf4(block=32, "
    )
    assert [file.name for file in tmp_path.iterdir()] == ["packed"]
    quantize(sharded_llama, tmp_path / "same")
    assert read_files(tmp_path / "packed") == read_files(tmp_path / "same")
    code, stderr = command(*arguments)
    assert code == 0 and stderr.count("as it was") == 5
    code, stderr = command("+format=nf4", "model.path=packed", main=run_main)
    assert code == 2 and stderr == (
        "qbench: model.path: 'packed' is packed already, as nf4(block=32, dq=True); accepted: a 16-bit checkpoint. "
        "qbench.checkpoint.load brings it into Python, and qbench.measure.quality.evaluate scores it there\n"
    )
    code, again = command("+format=nf4", "model.path=packed", "out=again")
    assert code == 2 and again == stderr


BAD_COMMANDS = {
    "no format": ([], r"format: none is given; accepted: .*\+format=nf4"),
    "unknown format": (["+format=nf5"], r"nf5.*accepted: fp4.*nf4.*quantile, custom"),
    "block zero": (["+format=nf4", "block=0"], r"block: 0 is not accepted; an integer of at least 1"),
    "no such option": (["+format=nf4", "format.variant=e2m1"], r"'variant' is no option of nf4; accepted: block, dq"),
    "no such variant": (["+format=fp4", "format.variant=e9m9"], r"unknown variant 'e9m9' of fp4; there are: bnb, e2m1"),
    "no out": (["+format=nf4"], r"out: none is given; accepted: a new or empty folder"),
    "unknown key": (["+format=nf4", "blok=3"], r"blok is unknown; did you mean block\?"),
    "no model": (["+format=nf4", "model.path=./nowhere", "out=o"], r"'./nowhere' does not exist"),
    "hub id": (["+format=nf4", "model.path=owner/name", "out=o"], r"is a hub id; accepted: a folder"),
    "sweep": (["-m", "+format=nf4,fp4", "out=o"], r"--multirun is not accepted"),
}


@pytest.mark.parametrize("case", BAD_COMMANDS)
def test_bad_input_is_one_line_and_code_2(command, tmp_path, case):
    arguments, message = BAD_COMMANDS[case]
    code, stderr = command(*arguments)
    assert code == 2 and re.search(message, stderr) and stderr.count("\n") == 1, stderr
    assert not list(tmp_path.iterdir())


def test_other_ends_have_their_codes(command, sharded_llama, tmp_path, monkeypatch):
    arguments = ["+format=nf4", "block=32", "dq=true", f"model.path={sharded_llama}", "out=out"]
    (tmp_path / "out").mkdir()
    with files.locked(tmp_path / "out"):
        code, stderr = command(*arguments)
    assert code == 1 and stderr == "qbench: out is in use by another process\n"
    for problem, code, words in (
        (
            OSError(errno.ENOSPC, "No space left on device"),
            1,
            r"No space left on device: '.*quantize.json'; what is done",
        ),
        (KeyboardInterrupt(), 130, "interrupted; what is done is kept; the same command goes on from there"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", lambda *_, problem=problem: (_ for _ in ()).throw(problem))
            ended, stderr = command(*arguments)
        assert ended == code and re.search(words, stderr) and stderr.count("\n") == 1, stderr
