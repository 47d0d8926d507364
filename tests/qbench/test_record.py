"""The result file: whole or not there."""

import errno
import json
import math
import os

import pytest

from qbench import jobs, record
from qbench.errors import InputError


def test_round_trip_without_nan(tmp_path):
    result = record.blank({})
    record.write(tmp_path / "new", result | {"metrics": {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": None}}})
    assert record.read(tmp_path / "new") == result | {"metrics": {"a": None, "b": [None, 1.5], "c": {"d": None}}}
    assert record.read(tmp_path / "new" / "result.json") == record.read(tmp_path / "new")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, failing):
    record.write(tmp_path, {"status": "done"})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(OSError, match="space"):
        record.write(tmp_path, {"status": "new"})
    assert json.loads((tmp_path / "result.json").read_text()) == {"status": "done"}
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]


def test_the_id_tells_what_decides():
    base = record.run_id({"block": 64}, weights="a", text="b")
    assert base == record.run_id({"block": 64}, text="b", weights="a")
    assert base != record.run_id({"block": 32}, weights="a", text="b")
    assert base != record.run_id({"block": 64}, weights="c", text="b")


@pytest.mark.parametrize(
    "content", ["", '{"schema": 1, "sta', "[]", '"text"', "\x00", '{"schema": 1}', '{"schema": 99}']
)
def test_what_is_no_result_is_named(tmp_path, content):
    good, bad = record.write(tmp_path / "good", record.blank({})), tmp_path / "bad" / "result.json"
    bad.parent.mkdir()
    bad.write_text(content)
    with pytest.raises(InputError, match=str(bad)):
        record.read(bad)
    results, unreadable = record.collect(tmp_path)
    assert list(results) == [good] and str(bad) in unreadable[bad]


def test_another_schema_is_named(tmp_path):
    file = record.write(tmp_path, record.blank({}) | {"schema": 99})
    with pytest.raises(InputError, match="schema 99; 1 is accepted"):
        record.read(file)


def test_a_finished_run_is_told_from_another(tmp_path):
    done = record.blank({}) | {"status": "done", "run": {"id": "one", "started": record.now()}}
    record.write(tmp_path, done)
    assert record.finished(tmp_path, "one") == done
    assert record.finished(tmp_path, "two") is None and (tmp_path / "result-one.json").exists()
    record.write(tmp_path, done | {"status": "failed"})
    assert record.finished(tmp_path, "one") is None and record.finished(tmp_path / "nothing", "one") is None


def test_a_failure_is_not_written_over_what_had_finished(tmp_path):
    done = record.blank({}) | {"status": "done", "run": {"id": "one", "started": record.now()}}
    record.write(tmp_path, done)
    with pytest.raises(KeyError), record.kept(tmp_path, record.blank({})):
        raise KeyError("gone")
    assert record.read(tmp_path)["error"]["type"] == "KeyError"
    assert record.read(tmp_path / "result-one.json") == done


def test_many_results_are_one_frame(tmp_path):
    for name in ("nf4", "int8"):
        result = record.blank({"format": {"name": name}})
        layers = [{"name": "a", "mse": 1.0}, {"name": "b", "mse": 2.0}]
        record.write(tmp_path / name, result | {"metrics": {"windows": [1.0, 2.0], "layers": layers}})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / record.FILE).write_text("{")
    with pytest.warns(UserWarning, match="broken"):
        frame = record.load(tmp_path)
    assert frame["config.format.name"].tolist() == ["int8", "nf4"]
    assert frame["metrics.windows"][0].tolist() == [1.0, 2.0]
    assert frame["metrics.layers.mse"][1].tolist() == [1.0, 2.0] and frame["metrics.layers.name"][1] == ("a", "b")
    assert len(record.load(tmp_path / "nf4", tmp_path / "nf4" / "result.json")) == 1


@pytest.mark.parametrize("status", ["done", "failed"])
def test_a_run_that_was_finished_before_its_process_ended_counts(tmp_path, status):
    started = record.now()
    assert jobs._done(tmp_path, started) is None
    result = record.blank({}) | {"status": status}
    result["run"]["started"] = record.now()
    record.write(tmp_path, result)
    assert bool(jobs._done(tmp_path, started)) == (status == "done")
    assert jobs._done(tmp_path, "9999-01-01T00:00:00+00:00") is None, "that was another time"
