"""Write notebooks/*.ipynb from the .py files beside them, executed, with small outputs.

    python docs/executed_notebooks.py [NAME ...]

Each runs from an empty folder. Figures are pictures in what is kept, and token panels plain
texts, for GitHub runs no scripts; bars and notes of the work are left out, and so is the folder's
name. Fails where a cell fails, or where an output is larger than `MAX_OUTPUT`. Needs kaleido and a
Chrome or Chromium.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
MAX_OUTPUT = 300_000
"""Bytes of one output."""
_LIVE = ("application/vnd.plotly.v1+json", "text/html")


def executed(source: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs."""
    notebook = jupytext.read(source)
    # Cells that begin with "!" find this environment's commands.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        NotebookClient(notebook, timeout=1800, resources=resources).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times
            if cell.cell_type == "code":
                cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
                for output in cell.outputs:
                    _made_small(output, folder)
    notebook.metadata.pop("jupytext", None)
    for cell in notebook.cells:
        cell.pop("id", None)
    notebook.nbformat, notebook.nbformat_minor = 4, 4
    return notebook


def _made_small(output: nbformat.NotebookNode, folder: str) -> None:
    """Leave of a figure its picture, no scripts, which GitHub drops, and not the folder's name."""
    data = output.get("data", {})
    if _LIVE[0] in data:
        if "image/png" not in data:
            raise ValueError("a figure has no picture: is there a Chrome, and is it not too busy?")
        for kind in _LIVE:
            data.pop(kind, None)
    for holder, name in ((output, "text"), (data, "text/plain"), (data, "text/html")):
        if name in holder:
            text = re.sub(r"<script.*?</script>", "", holder[name], flags=re.DOTALL)
            holder[name] = re.sub(re.escape(folder) + "/?", "", text)
            if len(holder[name]) > MAX_OUTPUT:
                raise ValueError(f"an output of {len(holder[name]):,} characters ({name})")


def main(names: list[str]) -> None:
    """Write those that are named, or all."""
    for source in sorted(FOLDER.glob("*.py")):
        if not names or source.stem in names:
            notebook = executed(source)
            target = source.with_suffix(".ipynb")
            nbformat.write(notebook, target)
            print(f"{target.name}: {target.stat().st_size / 1e3:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
