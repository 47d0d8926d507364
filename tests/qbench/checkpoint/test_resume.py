"""After any interruption of `qbench quantize`, the same command resumes and writes the same bytes."""

import errno
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qbench.checkpoint import safetensors_io
from qbench.errors import InputError
from qbench.system import files
from tests.qbench.sample_checkpoints import NF4, edit_tensors, quantize, read_files

CHILD = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from qbench.checkpoint.streaming import stream
from qbench.checkpoint.streaming.source import read_source
from qbench.checkpoint.recipe import Recipe
from tests.qbench.sample_checkpoints import NF4, read_files

source, folder, seed = read_source(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
steps = 0

def counted(function, at):
    def call(*arguments, **options):
        global steps
        steps += 1
        if steps == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call

def start(arguments, out, at=0):
    if pid := os.fork():
        return pid
    try:
        # what is killed leaves its writes to the system, so that nothing needs to wait for the disk
        os.fsync, os.replace = counted(lambda descriptor: None, at), counted(os.replace, at)
        stream.safetensors_io.read = counted(stream.safetensors_io.read, at)
        stream.quantize_checkpoint(source, Recipe.of(arguments, source.dtypes), folder / out)
        os._exit(0)
    finally:
        os._exit(1)

def wait(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def finish(arguments, out):
    assert wait(start(arguments, out)) == 0
    assert read_files(folder / out) == read_files(folder / arguments["name"])
    shutil.rmtree(folder / out)

none = {"name": "none", "block": 64, "dq": False}  # which spends no second on loading kernels
for arguments in (none, NF4):
    assert wait(start(arguments, arguments["name"])) == 0
for at in range(1 + seed % 2, 1000, 2):  # as a tensor is read, a file goes to the disk or to its name
    ended = wait(start(none, "out", at))
    finish(none, "out")
    if ended != -signal.SIGKILL:
        break
for i in range(3):  # and at any time, twice
    for _ in range(2):
        pid = start(NF4, "out")
        time.sleep(random.Random(seed + i).uniform(0, 0.8))
        os.kill(pid, signal.SIGKILL)
        wait(pid)
    finish(NF4, "out")
print(at, ended)
"""


@pytest.mark.thorough
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(sharded_llama, tmp_path):
    seed = int.from_bytes(os.urandom(2), "little")
    command = [sys.executable, "-c", CHILD, str(sharded_llama), str(tmp_path), str(seed)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert process.returncode == 0, (seed, process.stderr)
    steps, ended = map(int, process.stdout.split())
    assert steps > 50 and ended == 0
    quantize(sharded_llama, tmp_path / "here")
    assert read_files(tmp_path / "here") == read_files(tmp_path / "nf4")


def test_what_is_finished_is_kept_and_what_is_not_is_made_again(copied, tmp_path):
    lines = []
    quantize(copied, tmp_path / "out")
    before = read_files(tmp_path / "out")
    quantize(copied, tmp_path / "out", report=lines.append)
    assert all("as it was" in line for line in lines) and read_files(tmp_path / "out") == before
    first, second, third, *_ = sorted((tmp_path / "out").glob("*.safetensors"))
    first.write_bytes(before[first.name][:-1])
    second.write_bytes(before[third.name])
    third.unlink()
    lines.clear()
    quantize(copied, tmp_path / "out", report=lines.append)
    assert ["as it was" in line for line in lines[:4]] == [False, False, False, True]
    assert read_files(tmp_path / "out") == before


def test_what_became_of_other_weights_or_code_is_made_again(copied, tmp_path, monkeypatch):
    out, done = tmp_path / "out", []

    def interrupt(line):
        done.append(line)
        if len(done) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(copied, out, report=interrupt)
    first = sorted(copied.glob("*.safetensors"))[0]
    save_file({name: tensor * 2 for name, tensor in load_file(first).items()}, first)
    lines = []
    quantize(copied, out, report=lines.append)
    assert ["as it was" in line for line in lines[:3]] == [False, True, False]
    quantize(copied, tmp_path / "again")
    assert read_files(out) == read_files(tmp_path / "again")
    os.utime(first, (1, 1))
    with pytest.raises(
        InputError, match=r"is finished, and model-00001-of-00005.safetensors was made from other weights or code"
    ):
        quantize(copied, out)
    monkeypatch.setattr("qbench.results.provenance.code_digest", lambda: "other")
    (out / safetensors_io.INDEX).unlink()
    lines.clear()
    quantize(copied, out, report=lines.append)
    assert not any("as it was" in line for line in lines)


def test_a_folder_that_holds_something_else_is_left_alone(sharded_llama, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in [".d.1", *"abcd"]:
        (out / name).write_text(name)
    with pytest.raises(InputError, match=f"out: {out} holds .d.1, a, b and 2 more; accepted: a new or empty folder"):
        quantize(sharded_llama, out)
    assert {file.name: file.read_text() for file in out.iterdir()} == {name: name for name in [".d.1", *"abcd"]}
    with pytest.raises(InputError, match="is a file"):
        quantize(sharded_llama, out / "a")
    with pytest.raises(InputError, match="is the checkpoint itself"):
        quantize(sharded_llama, sharded_llama)
    quantize(sharded_llama, tmp_path / "nf4")
    before = read_files(tmp_path / "nf4")
    with pytest.raises(InputError, match="was begun with another format"):
        quantize(sharded_llama, tmp_path / "nf4", {**NF4, "dq": False})
    assert read_files(tmp_path / "nf4") == before
    with files.locked(tmp_path / "nf4"), pytest.raises(files.Busy, match="in use by another process"):
        quantize(sharded_llama, tmp_path / "nf4")


def test_a_full_disk_is_named_and_what_is_done_is_kept(sharded_llama, tmp_path, monkeypatch):
    quantize(sharded_llama, tmp_path / "undisturbed")
    out, fsync, calls = tmp_path / "out", os.fsync, []

    def full(descriptor):
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            calls.append(descriptor)
        if len(calls) == 6:  # quantize.json, then a file and quantize.json each
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*model-00003-of-"):
        quantize(sharded_llama, out)
    assert sorted(file.name for file in out.glob("*.safetensors")) == [safetensors_io.shard_name(i, 5) for i in (1, 2)]
    assert {file.name for file in out.iterdir() if file.suffix != ".safetensors"} == {".lock", "quantize.json"}
    quantize(sharded_llama, out)
    assert read_files(out) == read_files(tmp_path / "undisturbed")


def test_after_a_spoiled_file_it_goes_on(sharded_llama, copied, tmp_path):
    edit_tensors(copied, lambda state: state["model.norm.weight"][0].fill_(torch.nan), "model.norm")
    with pytest.raises(InputError, match=r"model.norm.weight holds NaN"):
        quantize(copied, tmp_path / "out")
    lines = []
    for file in sharded_llama.glob("*.safetensors"):
        if file.read_bytes() != (copied / file.name).read_bytes():
            shutil.copy2(file, copied)
    quantize(copied, tmp_path / "out", report=lines.append)
    assert {"as it was" in line for line in lines} == {True, False}
    quantize(copied, tmp_path / "fresh")
    assert read_files(tmp_path / "out") == read_files(tmp_path / "fresh")
