"""Old names of modules still work, and one line says the new name."""

import subprocess
import sys
from pathlib import Path

import pytest

from qbench.system.moved import MOVED

CODE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    module = __import__("{old}", fromlist=["x"])
    for place in {places}:
        __import__(place, fromlist=["x"])
print([str(w.message) for w in caught if "is now" in str(w.message)])
print(hasattr(module, "{attribute}"))
"""


@pytest.mark.parametrize(
    ("old", "attribute"), [("quant_linear", "QuantLinear"), ("models", "BUNDLED"), ("interop.gguf", "GGUFFile")]
)
def test_an_old_name_is_the_module_and_says_the_new_one(old, attribute):
    places = [f"qbench.{place}" for place in MOVED[old].split()]
    code = CODE.format(old=f"qbench.{old}", places=places, attribute=attribute)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3], timeout=120
    )
    said, there = done.stdout.splitlines()
    assert f"qbench.{old} is now {' and '.join(places)}" in said and there == "True", done.stderr
