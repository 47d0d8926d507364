"""A format from another package is found by its entry point, with nothing changed here."""

import subprocess
import sys

MODULE = """
from formats import register
from formats.format import Format

@register("sf4_three")
class Other(Format):
    name, bits, source = "sf4_three", 3, "elsewhere"
    levels = (-1.0, -0.5, -0.2, 0.0, 0.1, 0.3, 0.6, 1.0)
"""
PROGRAM = """
import torch, formats
q = formats.get("sf4_three", block=32, dq=True).quantize(torch.randn(100, 33))
print("sf4_three" in formats.names(), q.dequantize().shape, q.bits)
"""


def test_an_entry_point_of_another_package(tmp_path):
    (tmp_path / "elsewhere.py").write_text(MODULE)
    info = tmp_path / "elsewhere-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: elsewhere\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[qbench.formats]\nsf4_three = elsewhere:Other\n")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.stdout.split() == ["True", "torch.Size([100,", "33])", "3"], done.stderr
