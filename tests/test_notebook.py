"""reports/analysis.ipynb runs from the first cell to the last, on the results beside it."""

import warnings
from pathlib import Path

import nbformat
import pytest

REPORTS = Path(__file__).parent.parent / "reports"


def test_the_notebook_runs():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        client = pytest.importorskip("nbclient").NotebookClient
        notebook = nbformat.read(REPORTS / "analysis.ipynb", 4)
        client(notebook, timeout=300, resources={"metadata": {"path": str(REPORTS)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert not any(output.output_type == "error" for output in outputs)
