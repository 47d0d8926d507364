"""The result file: whole or not there."""

import errno
import json
import math
import os
import stat
import subprocess

import pytest

from qbench.errors import InputError
from qbench.results import dataframe, provenance, store
from qbench.system import files


def test_round_trip_without_nan(tmp_path):
    result = store.new_result({})
    store.write(tmp_path / "new", result | {"metrics": {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": None}}})
    assert store.read(tmp_path / "new") == result | {"metrics": {"a": None, "b": [None, 1.5], "c": {"d": None}}}
    assert store.read(tmp_path / "new" / "result.json") == store.read(tmp_path / "new")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, failing):
    store.write(tmp_path, {"status": "done"})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="space"):
        store.write(tmp_path, {"status": "new"})
    assert json.loads((tmp_path / "result.json").read_text()) == {"status": "done"}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_the_id_tells_what_decides():
    base = provenance.run_id({"block": 64}, weights="a", text="b")
    assert base == provenance.run_id({"block": 64}, text="b", weights="a")
    assert base != provenance.run_id({"block": 32}, weights="a", text="b")
    assert base != provenance.run_id({"block": 64}, weights="c", text="b")


@pytest.mark.parametrize(
    "content", ["", '{"schema": 1, "sta', "[]", '"text"', "\x00", '{"schema": 1}', '{"schema": 99}']
)
def test_what_is_no_result_is_named(tmp_path, content):
    good, bad = store.write(tmp_path / "good", store.new_result({})), tmp_path / "bad" / "result.json"
    bad.parent.mkdir()
    bad.write_text(content)
    with pytest.raises(InputError, match=str(bad)):
        store.read(bad)
    results, unreadable = dataframe.read_results(tmp_path)
    assert list(results) == [good] and str(bad) in unreadable[bad]


def test_another_schema_is_named(tmp_path):
    file = store.write(tmp_path, store.new_result({}) | {"schema": 99})
    with pytest.raises(InputError, match="schema 99; 1 is accepted"):
        store.read(file)


def test_a_finished_run_is_told_from_another(tmp_path):
    done = store.new_result({}) | {"status": "done", "run": {"id": "one", "started": store.timestamp()}}
    store.write(tmp_path, done)
    assert store.read_finished(tmp_path, "one") == done
    assert store.read_finished(tmp_path, "two") is None and store.read(tmp_path) == done
    store.write(tmp_path, done | {"status": "failed"})
    assert store.read_finished(tmp_path, "one") is None and store.read_finished(tmp_path / "nothing", "one") is None


AGAINST = dict.fromkeys(["delta_nll", "stderr", "p", "kl_mean", "kl_p99", "top1_agreement"], 0.5)
SCORES = {"nll": 1.0, "perplexity": 2.7, "stderr": 0.1, "tokens": 9, "windows": [1.0], "against_baseline": AGAINST}


@pytest.mark.parametrize(
    ("reused", "scored", "counts"),
    [(False, [], False), (True, ["baseline"], False), (False, ["baseline"], True), (True, ["baseline", "tuned"], True)],
)
def test_what_had_finished_stays_until_something_new_is_measured(tmp_path, reused, scored, counts):
    done = store.new_result({}) | {"status": "done", "run": {"id": "one", "started": store.timestamp()}}
    store.write(tmp_path, done)
    result = store.new_result({})
    result["run"] |= {"id": "two", "baseline": {"id": "b", "reused": reused}}
    result["metrics"] = {"quality": dict.fromkeys(scored, SCORES)}
    with pytest.raises(KeyError), store.record_failure(tmp_path, result):
        raise KeyError("gone")
    if counts:
        assert store.read(tmp_path)["error"]["type"] == "KeyError"
        assert store.read(tmp_path / "result-one.json") == done
    else:
        assert store.read(tmp_path) == done and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("error", [InputError("no"), KeyboardInterrupt()], ids=repr)
def test_outside_a_sweep_what_never_began_is_not_told(tmp_path, error):
    for row in (False, True):
        with pytest.raises(type(error)), store.record_failure(tmp_path, store.new_result({}), row):
            raise error
        assert (tmp_path / store.FILE).exists() == row


def test_a_result_that_cannot_be_written_hides_no_error(tmp_path):
    (tmp_path / store.FILE).mkdir()
    with pytest.raises(KeyError), store.record_failure(tmp_path, store.new_result({})):
        raise KeyError("gone")


def test_the_commit_is_this_checkouts_whatever_git_is_told(tmp_path, monkeypatch):
    """As it is in a hook of git's."""
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", tmp_path, *who, "commit", "-q", "--allow-empty", "-m", "other"], check=True)
    before = provenance._commit()
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    assert provenance._commit() == before


def test_many_results_are_one_frame(tmp_path):
    for name in ("nf4", "int8"):
        result = store.new_result({"format": {"name": name}})
        layers = [{"name": "a", "mse": 1.0}, {"name": "b", "mse": 2.0}]
        store.write(tmp_path / name, result | {"metrics": {"windows": [1.0, 2.0], "layers": layers}})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / store.FILE).write_text("{")
    with pytest.warns(UserWarning, match="broken"):
        frame = dataframe.load(tmp_path)
    assert frame["config.format.name"].tolist() == ["int8", "nf4"]
    assert frame["metrics.windows"][0].tolist() == [1.0, 2.0]
    assert frame["metrics.layers.mse"][1].tolist() == [1.0, 2.0] and frame["metrics.layers.name"][1] == ("a", "b")
    assert len(dataframe.load(tmp_path / "nf4", tmp_path / "nf4" / "result.json")) == 1


def test_partial_files_have_names_of_their_own_and_are_cleared(tmp_path):
    """Processes in containers that share a folder have the same id."""
    with files.atomic_write(tmp_path / "a") as first, files.atomic_write(tmp_path / "a") as second:
        assert first.name != second.name
        first.write(b"1")
        second.write(b"2")
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    with pytest.raises(KeyError), files.atomic_write(tmp_path / "a") as third:
        (tmp_path / "copy").write_bytes(b"")
        left = third.name
        raise KeyError
    os.rename(tmp_path / "copy", left)  # as where the process is killed
    files.remove_partial(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_the_name_of_a_file_is_on_the_disk_too(tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync

    def seen(descriptor):
        flushed.append(stat.S_ISDIR(os.fstat(descriptor).st_mode))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", seen)
    with files.atomic_write(tmp_path / "a") as file:
        file.write(b"1")
    assert flushed == [False, True]
