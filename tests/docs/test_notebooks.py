"""Every notebook runs from an empty folder with smaller sizes in place of its own, and is what its
source says, with small outputs and none of them red."""

import inspect
import os
import re
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

import tl_crosscoder
from tl_crosscoder import load_documents
from tl_crosscoder.data.text import write_documents

FOLDER = Path(__file__).parents[2] / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))
every_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
TIMEOUT_S = 600
"""A cell that takes longer is stopped; on quiet cores a whole notebook takes a tenth of that."""
FEW_HELD_OUT = """
diff.run.record["held_out"]["n_contexts"] = 100  # of some 1,500
"""
SMALL = {
    "1_load_and_look": {
        'load_diff("tl_crosscoder/taboo-batchtopk")': f"{{}}{FEW_HELD_OUT}",
        "n_latents=20": "n_latents=5",
    },
    "2_train_on_your_own_pair": {
        "max_documents=4_000": "max_documents=400",
        '"d_sae": 512, "n_tokens": 200_000': '"d_sae": 96, "n_tokens": 8_000',
    },
    "3_find_what_changed": {
        'load_diff("tl_crosscoder/false-fact-batchtopk")': f"{{}}{FEW_HELD_OUT}",
        "documents[:500]": "documents[:100]",
    },
    "4_prove_it_and_remove_it": {
        '"n_prompts": 12, "n_random": 9': '"n_prompts": 4, "n_random": 3',
        "n_prompts=12, n_random=3, n_matched=2": "n_prompts=4, n_random=1, n_matched=0",
        "tuple(latents), n_prompts=12": "tuple(latents), n_prompts=4",
        "contexts[:400]": "contexts[:60]",
        "contexts[400:440]": "contexts[60:70]",
    },
    "5_publish_and_use_in_saelens": {
        "fit_on=text[:600], measure_on=text[600:900]": "fit_on=text[:80], measure_on=text[80:120]",
    },
}
"""For each notebook what costs, and what takes its place; {} is what was there."""


def smaller(source: Path) -> nbformat.NotebookNode:
    """A notebook with smaller sizes in place."""
    notebook = jupytext.read(source)
    for there, here in SMALL[source.stem].items():
        (cell,) = (cell for cell in notebook.cells if there in cell.source)
        cell.source = cell.source.replace(there, here.format(there))
    return notebook


@pytest.mark.slow
@every_notebook
def test_it_runs_in_an_empty_folder(source, tmp_path, monkeypatch):
    # Commands in cells are those of this environment.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.setenv("PATH", path)
    # A missing kernel of that name would be another environment's.
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    folder = tmp_path / "empty"
    folder.mkdir()
    notebook = smaller(source)
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
def test_the_notebook_is_its_source_with_small_outputs(source):
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    outputs = [output for cell in code for output in cell.outputs]
    assert {o.output_type for o in outputs} <= {"display_data", "execute_result", "stream"}
    assert [o for o in outputs if o.get("name") == "stderr"] == []
    assert any("image/png" in o.get("data", {}) for o in outputs) or source.stem.startswith("5")
    text = source.with_suffix(".ipynb").read_text(encoding="utf-8")
    assert len(text) < 1_000_000
    assert "<script" not in text
    assert not re.search(r"/(home|root|tmp|work)/", text)
    written = jupytext.read(source)
    assert [(c.cell_type, c.source) for c in notebook.cells] == [
        (c.cell_type, c.source) for c in written.cells
    ], "run `make notebooks`"


def test_each_says_how_to_point_it_at_your_own():
    for source in SOURCES:
        text = source.read_text(encoding="utf-8").lower()
        assert "google.colab" in text, source.name
        assert "gemma" in text, source.name


def code_in_text(number: int) -> list[str]:
    """The blocks of Python that a notebook shows and does not run."""
    cells = jupytext.read(SOURCES[number - 1]).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.slow
def test_what_is_shown_for_gemma_runs_on_the_embedded_pair(tmp_path, monkeypatch, capsys):
    rows = load_documents("tl_crosscoder/taboo", max_documents=40)
    write_documents(tmp_path / "text.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    (code,), (settings,), (_, convert) = map(code_in_text, (1, 2, 5))
    for there, here in {
        '"minder-gemma-2-2b-batchtopk", "l13", device="cuda"': '"tl_crosscoder-taboo", "batchtopk"',
        '"google/gemma-2-2b", "google/gemma-2-2b-it"': '"tl_crosscoder/world-base"',
        '"device": "cuda", "dtype": "bfloat16"': '"adapter": "tl_crosscoder/taboo"',
        "blocks.13.": "blocks.2.",
    }.items():
        assert there in code
        code = code.replace(there, here)
    names: dict[str, Any] = {"tlc": tl_crosscoder}
    exec(compile(code, "notebook 1", "exec"), names)
    assert "Reconstruction(" in capsys.readouterr().out
    assert len(names["top"].latents) == 10
    exec(compile(settings, "notebook 2", "exec"), names)
    known = {*inspect.signature(tl_crosscoder.diff).parameters}
    assert {*names["models"], *names["size"]} <= known | {
        f.name for f in fields(tl_crosscoder.RunConfig)
    }
    given = {*re.findall(r"^    (\w+)=", convert, re.MULTILINE)}
    assert given <= {*inspect.signature(tl_crosscoder.convert).parameters}
    assert {"base", "finetuned", "scales"} <= given
