"""The result file: whole or not there."""

import errno
import json
import math
import os

import pytest

from qbench import record


def test_round_trip_without_nan(tmp_path):
    record.write(tmp_path / "new", {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": None}})
    assert record.read(tmp_path / "new") == {"a": None, "b": [None, 1.5], "c": {"d": None}}
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


def test_many_results_are_one_frame(tmp_path):
    for name in ("nf4", "int8"):
        record.write(tmp_path / name, {"config": {"format": {"name": name}}, "metrics": {"windows": [1.0, 2.0]}})
    frame = record.frame(tmp_path)
    assert frame["config.format.name"].tolist() == ["int8", "nf4"]
    assert frame["metrics.windows"][0] == [1.0, 2.0]
    assert len(record.frame(tmp_path / "nf4", tmp_path / "nf4" / "result.json")) == 1
