"""The notebooks run from top to bottom on a CPU, and are kept without outputs."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs").glob("*.ipynb"))
each = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.name)


@each
def test_a_notebook_is_kept_without_outputs(file):
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


@pytest.mark.release
@each
def test_a_notebook_runs(file, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # other tests run beside it, and threads that wait for each other spin
    notebook = nbformat.read(file, as_version=4)
    NotebookClient(notebook, timeout=1800, resources={"metadata": {"path": str(file.parent)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "entries in both masks: 0" in "".join(output.get("text", "") for output in outputs)
