"""Every notebook runs from an empty folder, and is what its source says, without outputs."""

import os
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))
every_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
TIMEOUT_S = 180
"""A cell that takes longer is stopped; a whole notebook takes less than that on two cores."""


@every_notebook
def test_it_runs_in_an_empty_folder(source, tmp_path, monkeypatch):
    # Commands in cells are those of this environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    # A missing kernel of that name would be another environment's.
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    folder = tmp_path / "empty"
    folder.mkdir()
    notebook = jupytext.read(source)
    client = NotebookClient(notebook, timeout=TIMEOUT_S, resources={"metadata": {"path": folder}})
    client.execute()
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert [o for o in outputs if o.output_type == "error"] == []
    # Commands fail without an exception.
    text = "".join(o.text for o in outputs if o.output_type == "stream")
    assert "error:" not in text
    assert "Traceback" not in text
    assert any("text/html" in o.get("data", {}) for o in outputs)


@every_notebook
def test_the_notebook_is_its_source_without_outputs(source):
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell for cell in code if cell.outputs or cell.execution_count] == []
    written = jupytext.read(source)
    assert [(c.cell_type, c.source) for c in notebook.cells] == [
        (c.cell_type, c.source) for c in written.cells
    ], "run `make notebooks`"


def test_each_says_how_to_point_it_at_your_own():
    for source in SOURCES:
        text = source.read_text(encoding="utf-8").lower()
        assert "google.colab" in text, source.name
        assert "gemma" in text, source.name
