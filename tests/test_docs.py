"""docs/formats.md does what it says: every block of it is run, in order, in an empty folder, and prints what it shows."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from importlib import import_module, invalidate_caches
from pathlib import Path

import pytest
import torch

import formats
from formats import registry
from qbench.checkpoint import loading
from qbench.measure.error import Sums, compare_weights
from qbench.model import devices, quantizing
from qbench.model.selection import linear_layers

PAGE = (Path(__file__).parent.parent / "docs" / "formats.md").read_text()
pytestmark = pytest.mark.slow
SHORT = ["eval.tokens=64", "data.seq=32"]
MAINS = {
    "qbench": "qbench.cli.run",
    "qbench.report": "qbench.cli.report",
    "qbench.plan": "qbench.cli.plan",
    "qbench.quantize": "qbench.cli.quantize",
}


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Someone in an empty folder, whose Python looks there, and to whom pip installs there; no trace is left."""
    monkeypatch.chdir(tmp_path)
    formats.names()  # ours are found once a process
    for name in ("_entries", "_problems"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    monkeypatch.setattr(registry, "_discovered", True)
    for path in (tmp_path / "site", tmp_path):
        monkeypatch.syspath_prepend(str(path))
    yield
    sys.modules.pop("bof4", None)


def shown(code: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "a block of the page", "exec"), {"__name__": "__main__"})
    return out.getvalue()


def typed(line: str, tiny_llama: Path, monkeypatch, tmp_path) -> None:
    """A command as a console takes it, but with little text."""
    python, minus_m, module, *arguments = shlex.split(line)
    assert (python, minus_m) == ("python", "-m")
    if module == "pip":
        quietly = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(tmp_path / "site")]
        subprocess.run([sys.executable, "-m", "pip", *arguments, *quietly], check=True)
        invalidate_caches()
        monkeypatch.setattr(registry, "_discovered", False)
        return
    if module == "qbench" and "--formats" not in arguments:
        arguments += [*SHORT, f"model.path={tiny_llama}"]
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    assert import_module(MAINS[module]).main() == 0, line


def test_the_page(reader, tmp_path, tiny_llama, monkeypatch, capsys):
    printed = ""
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.S | re.M):
        first, _, _ = block.partition("\n")
        if re.fullmatch(r"# \w+\.\w+", first):
            assert len(block.splitlines()) <= 40
            (tmp_path / first[2:]).write_text(block)
        elif language == "python":
            printed = shown(block)
        elif language == "text":
            assert printed == block
        elif language == "console":
            for line in block.splitlines():
                typed(line.removeprefix("$ "), tiny_llama, monkeypatch, tmp_path)
    out = capsys.readouterr().out
    assert {"bof4", "bof4_fit"} < set(formats.names()) and "bof4-format" in out
    assert len(list(tmp_path.glob("sweeps/*/*/result.json"))) == 3 + 2
    check_table()


def check_table() -> None:
    """What the weights alone decide of the page's table; and that nothing in it is missing."""
    layers = linear_layers(
        loading.load(None, devices.pick_dtype("auto", torch.device("cpu")), torch.device("cpu")).model
    )
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")
    ]
    head, *rows = rows
    assert head == ["format", "bits/weight", "perplexity", "Δ nll", "KL", "SQNR, dB"]
    assert {row[0] for row in rows} == {"nf4, block 64", "bof4, block 64", "bof4_fit, block 64", "16 bit, untuned"}
    for title, bits, perplexity, _, _, sqnr in rows:
        assert 90 < float(perplexity) < 110
        if title.startswith("16 bit"):
            continue
        packed = quantizing.quantize(layers, formats.get(title.partition(",")[0]))
        sums = sum((compare_weights(layers[name].weight, q.dequantize()) for name, q in packed.items()), Sums())
        assert bits == "4.500" and float(sqnr) == pytest.approx(sums.weights()["sqnr_db"], abs=0.02)
