"""Many results in one file are read as the files that they were, and a bad line, or a bad file, is named."""

import json
import lzma
import os
import sys
import tracemalloc
from pathlib import Path

import pytest

import qbench
from qbench.cli import report, runs
from qbench.errors import InputError
from qbench.results import archive, dataframe, json_files, store
from tests.qbench.sample_results import whole

GOOD = json.dumps(
    {"path": "a/result.json", "result": json.loads(json.dumps(json_files._replace_non_finite(whole())))}
).encode()


@pytest.fixture
def sweep(tmp_path) -> Path:
    for name, seed, shift in [("none", 0, 0.0), ("nf4", 0, 0.02), ("nf4", 1, 0.03), ("int8", 0, 0.001)]:
        store.write(tmp_path / "sweep" / f"{name}{seed}", whole(name, seed, shift))
    store.write(
        tmp_path / "sweep" / "failed",
        store.new_result({"format": "\ud800"}) | {"error": store.describe_error(KeyError("x"))},
    )
    return tmp_path / "sweep"


def test_no_byte_of_a_result_changes(sweep):
    files = dataframe.find_results(sweep)
    assert archive.write(sweep, files) == 5
    for path, result in archive.read(sweep / archive.FILE):
        former = sweep / path.relative_to(sweep / archive.FILE)
        assert (
            json.dumps(result, indent=1) == former.read_text("utf-8") and archive.on_disk(path) == sweep / archive.FILE
        )


def test_it_is_read_as_the_folders_are(sweep, tmp_path, monkeypatch, capsys):
    """The same frame, but for the paths, and the same page, but for where its rows link to."""

    def compared() -> tuple:
        monkeypatch.setattr(sys, "argv", ["qbench.report", str(sweep), "--out", str(tmp_path / "report")])
        assert report.main() == 0
        return qbench.load(sweep), capsys.readouterr().out, (tmp_path / "report" / "report.md").read_text("utf-8")

    before = compared()
    monkeypatch.setattr(sys, "argv", ["qbench.runs", "--archive", str(sweep)])
    assert runs.main() == 0 and "results.jsonl.xz has 5 results" in capsys.readouterr().out
    for file in dataframe.find_results(sweep):
        if file.name == store.FILE:
            file.unlink()
    after = compared()
    assert after[0].drop(columns="path").to_json() == before[0].drop(columns="path").to_json()
    assert list(after[0].path) == [path.replace("sweep", "sweep/results.jsonl.xz") for path in before[0].path]
    assert after[1] == before[1]
    page = before[2]
    for run in ("none0", "nf40", "nf41", "int80"):
        page = page.replace(f"(../sweep/{run}/result.json)", f'(../sweep/results.jsonl.xz "{run}")')
    assert after[2] == page.replace("../sweep/failed/result.json", "../sweep/results.jsonl.xz")
    assert len(qbench.load(sweep / archive.FILE)) == 5


def test_what_is_archived_later_is_added(sweep):
    archive.write(sweep, dataframe.find_results(sweep))
    (sweep / "nf40" / store.FILE).unlink()
    store.write(sweep / "int80", whole("int8", 0, 0.5))
    store.write(sweep / "later", whole("int4"))
    assert archive.write(sweep, [f for f in dataframe.find_results(sweep) if not archive.is_archive(f)]) == 6
    results = dict(archive.read(sweep / archive.FILE))
    assert len(results) == 6
    assert results[sweep / archive.FILE / "int80" / store.FILE] == store.read(sweep / "int80")


def test_nothing_is_lost_where_a_result_is_not_whole(sweep, monkeypatch, capsys):
    archive.write(sweep, dataframe.find_results(sweep))
    before = (sweep / archive.FILE).read_bytes()
    (sweep / "nf40" / store.FILE).write_text("{")
    monkeypatch.setattr(sys, "argv", ["qbench.runs", "--archive", str(sweep)])
    assert runs.main() == 1 and "nf40/result.json is not valid JSON" in capsys.readouterr().err
    assert (sweep / archive.FILE).read_bytes() == before and len(list(sweep.iterdir())) == 6


LINES = {
    "cut": (GOOD[:-9], "is not valid JSON"),
    "empty": (b"", "is not valid JSON"),
    "no UTF-8": (b"\xff", "is not valid JSON"),
    "deep": (b"[" * 100_000, "nested too deep"),
    "NaN": (GOOD.replace(b"0.01", b"NaN", 1), "is not a JSON number"),
    "a list": (b"[1]", "is not {"),
    "no path": (GOOD.replace(b'"path"', b'"way"', 1), "is not {"),
    "a result alone": (GOOD[GOOD.index(b'"result": ') + 10 : -1], "is not {"),
    "no result": (b'{"path": "a/result.json", "result": 1}', "is not a qbench result"),
    "schema 2": (GOOD.replace(b'"schema": 1', b'"schema": 2', 1), "has schema 2"),
    "above": (GOOD.replace(b"a/result", b"../a/result", 1), "has the path"),
    "absolute": (GOOD.replace(b"a/result", b"/a/result", 1), "has the path"),
    "nameless": (GOOD.replace(b"a/result.json", b"", 1), "has the path"),
    "twice": (GOOD, "has the path of an earlier line"),
}


@pytest.mark.parametrize("line", LINES)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path, line):
    text, why = LINES[line]
    last = GOOD.replace(b"a/result", b"b\\u001b\\ud800/result", 1)
    file = tmp_path / archive.FILE
    file.write_bytes(lzma.compress(b"\n".join([GOOD, text, last])))
    results, unreadable = dataframe.read_results(tmp_path)
    assert len(results) == 2 and list(unreadable) == [Path(f"{file}:2")]
    assert unreadable[Path(f"{file}:2")].startswith(f"{file}:2 ") and why in unreadable[Path(f"{file}:2")]
    with pytest.warns(UserWarning, match=":2 "):
        assert len(qbench.load(tmp_path)) == 2


PACKED = lzma.compress(GOOD + b"\n" + GOOD.replace(b"a/result", b"b/result", 1) + b"\n")
FILES = {
    "empty": (b"", "cut short after line 0"),
    "no xz": (GOOD, "is damaged after line 0"),
    "cut": (PACKED[:-9], "cut short after line 2"),
    "changed": (PACKED[:300] + b"\0" * 9 + PACKED[309:], "is damaged after line"),
    "more after it": (PACKED + b"more", "has other data"),
    "much memory": (lzma.compress(GOOD, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}]), "is damaged"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(tmp_path, name):
    content, why = FILES[name]
    (tmp_path / archive.FILE).write_bytes(content)
    results, unreadable = dataframe.read_results(tmp_path)
    assert list(unreadable) == [tmp_path / archive.FILE] and why in unreadable[tmp_path / archive.FILE]
    assert len(results) == (2 if "line 2" in why or "other" in why else 0)


@pytest.mark.parametrize("content", ["line", "lines", "results"])
def test_what_decompresses_without_end_is_not_read_to_it(tmp_path, monkeypatch, content):
    monkeypatch.setattr(archive, "LARGEST", 64 << 20)
    monkeypatch.setattr(json_files, "LARGEST", 16 << 20)
    packer = lzma.LZMACompressor(preset=0)
    piece = {"line": b"0" * (1 << 20), "lines": b"\n" * (1 << 20), "results": (b" " * 999 + b"\n") * 1000}[content]
    with (tmp_path / archive.FILE).open("wb") as file:
        for _ in range(200):
            file.write(packer.compress(piece))
        file.write(packer.flush())
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="is too large, after line"):
            for _ in archive.read(tmp_path / archive.FILE):
                pass
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(sys.platform == "win32", reason="has no pipes in folders")
def test_what_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / archive.FILE)
    (tmp_path / "folder" / archive.FILE).mkdir(parents=True)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone" / archive.FILE).symlink_to("nowhere")
    results, unreadable = dataframe.read_results(tmp_path)
    assert not results and len(unreadable) == 3
    assert "is a pipe" in unreadable[tmp_path / archive.FILE].replace("not a file, but", "is")
