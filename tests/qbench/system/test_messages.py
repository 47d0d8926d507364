"""The terminal of a run shows what qbench says; what libraries say is in the run's folder."""

import logging
import os
import re
import subprocess
import sys
import warnings
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest

from qbench.system import messages

SHORT = ["eval.tokens=200", "data.seq=32", "tune.steps=1", "tune.batch=2"]
#: a library that warns and logs, by its own handler, by that of the root, and by none
NOISY = """
import logging
import warnings

from formats import Format

logging.getLogger("early").addHandler(logging.StreamHandler())


class Noisy(Format):
    name, bits, source = "noisy", 2, "−1, 0, 1 and a spare code"
    levels = (-1.0, 0.0, 1.0, 1.0)

    def quantize(self, w, *more, **options):
        warnings.warn("noise in a warning", FutureWarning, stacklevel=2)
        late = logging.getLogger("late")
        late.addHandler(logging.StreamHandler())
        for logger in (late, logging.getLogger("early"), logging.getLogger("none"), logging.getLogger("transformers.x")):
            logger.warning("noise of %s", logger.name)
        late.handlers.clear()
        return super().quantize(w, *more, **options)
"""
PHASE = re.compile(r"[a-z0-9 ,:=_-]{28,}  +\d+\.\d s")
#: the announcement of a run, and the head and the rows of the table at the end of a sweep
SWEEP = re.compile(
    r"run \d+ of \d+.*: noisy\S+|run +bits/weight +perplexity +tuned perplexity +status *|noisy.* done *"
)


def job(folder: Path, *arguments: object, stderr: int = subprocess.PIPE) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "120"}
    command = [sys.executable, "-m", "qbench", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)


@pytest.mark.parametrize(
    "methods", ["lora,prefix", pytest.param("dora,rslora,ia3,p_tuning", marks=pytest.mark.thorough)]
)
def test_libraries_do_not_interrupt_a_run(methods, tmp_path, tiny_llama):
    (tmp_path / "noisy.py").write_text(NOISY, "utf-8")
    noisy = ["+format=custom", "format.target=noisy.Noisy", f"model.path={tiny_llama}", *SHORT]
    done = job(tmp_path, "-m", f"tune={methods}", *noisy, "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if not PHASE.fullmatch(line) and not SWEEP.fullmatch(line)]
    count = len(methods.split(","))
    ours = f"{count} of {count} runs", "python -m qbench report"
    assert [line for line in lines if line and not line.startswith(ours)] == []
    assert "noise" not in done.stdout
    logs = list((tmp_path / "sweep").glob("*/warnings.log"))
    assert len(logs) == count
    for log in logs:
        text = log.read_text("utf-8")
        assert "FutureWarning: noise in a warning" in text
        for name in ("late", "early", "none", "transformers.x"):
            assert f"WARNING {name}: noise of {name}\n" in text


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_nor_its_bars_in_a_terminal(tmp_path, tiny_llama):
    (tmp_path / "noisy.py").write_text(NOISY, "utf-8")
    ours, theirs = os.openpty()
    noisy = ["+format=custom", "format.target=noisy.Noisy", f"model.path={tiny_llama}", *SHORT]
    seen = b""

    def read() -> None:
        nonlocal seen
        with suppress(OSError):  # the other end is closed
            while chunk := os.read(ours, 1 << 16):
                seen += chunk

    reader = Thread(target=read)
    reader.start()
    try:
        done = job(tmp_path, *noisy, "tune=prefix", "hydra.run.dir=out", stderr=theirs)
    finally:
        os.close(theirs)
        reader.join()
        os.close(ours)
    assert done.returncode == 0
    assert b"score the tuned model" in seen and b"noise" not in seen and b"arning" not in seen
    assert "noise in a warning" in (tmp_path / "out" / messages.FILE).read_text("utf-8")


@pytest.mark.thorough
def test_training_all_weights_says_nothing_either(tmp_path, tiny_llama):
    done = job(tmp_path, "+format=none", "tune=full", f"model.path={tiny_llama}", *SHORT, "hydra.run.dir=out")
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if not PHASE.fullmatch(line) and not SWEEP.fullmatch(line)] == []
    assert not (tmp_path / "out" / messages.FILE).exists()


@pytest.fixture
def log():
    """A logger with a handler of its own on standard error, as transformers has one."""
    logger = logging.getLogger("test_messages")
    logger.handlers, logger.propagate = [logging.StreamHandler(sys.stderr)], False
    yield logger
    logger.handlers.clear()


def test_messages_go_to_the_innermost_folder(tmp_path, capsys, log):
    log.handlers = [logging.StreamHandler(sys.stderr)]
    with messages.redirect():
        log.warning("before")
        with messages.redirect(tmp_path / "a"):
            log.warning("in a, %d", 1)
            with messages.redirect(tmp_path / "b"):
                warnings.warn("in b", UserWarning, stacklevel=1)
            log.warning("in a, %d", "no number")
        assert capsys.readouterr().err == ""
        log.warning("after")
    assert re.fullmatch(r"[\d :-]{19} WARNING test_messages: after\n", capsys.readouterr().err), "none took it"
    log.warning("as ever")
    assert capsys.readouterr().err == "as ever\n"
    a, b = ((tmp_path / name / messages.FILE).read_text("utf-8") for name in "ab")
    assert [line.partition("test_messages: ")[2] for line in a.splitlines()[:2]] == ["before", "in a, 1"]
    assert "no number" in a and "UserWarning: in b" in b and "in b" not in a


def test_the_warnings_of_qbench_are_shown(tmp_path, capsys):
    with messages.redirect(tmp_path):
        warnings.warn("qbench: no kernels here", RuntimeWarning, stacklevel=1)
    assert capsys.readouterr().err == "qbench: no kernels here\n" and not (tmp_path / messages.FILE).exists()


def test_a_log_that_goes_to_a_file_still_does(tmp_path, log):
    log.addHandler(logging.FileHandler(tmp_path / "own.log"))
    with messages.redirect(tmp_path):
        log.warning("twice")
    for handler in log.handlers:
        handler.close()
    assert "twice" in (tmp_path / "own.log").read_text() and "twice" in (tmp_path / messages.FILE).read_text("utf-8")


def test_a_character_that_a_pipe_lacks_is_no_error(tmp_path):
    code = "from qbench.system import messages; messages.replace_unencodable(); print('4 − 1 ≈ 3')"
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0 and done.stdout.split() == [b"4", b"?", b"1", b"?", b"3"]


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform == "win32", reason="has no such locale")
def test_a_locale_that_is_not_utf8(tmp_path, tiny_llama):
    """Names of files that it cannot read, our own signs, pipes: all works, and what is written is UTF-8."""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "CUDA_VISIBLE_DEVICES": ""}
    (tmp_path / "texté.txt").write_text(
        "\n".join(f"Größe {i} − ein Satz über {i * i} Wörter." for i in range(2000)), "utf-8"
    )
    run = ["+format=nf4", f"model.path={tiny_llama}", "data.path='texté.txt'", *SHORT, "hydra.run.dir='dé/run'"]
    for command in (["qbench", "--formats"], ["qbench", *run], ["qbench.report", "dé"]):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=tmp_path, env=os.environ | locale, capture_output=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.isascii() and done.stderr.isascii()
    files = [
        file
        for file in (tmp_path / "dé").rglob("*")
        if file.suffix in (".json", ".md", ".html", ".csv", ".svg", ".log")
    ]
    assert {file.name for file in files} >= {"result.json", "report.html", "report.md", "results.csv", "README.md"}
    for file in files:
        file.read_text("utf-8")
    assert "−" in (tmp_path / "dé" / "report" / "report.md").read_text("utf-8")
