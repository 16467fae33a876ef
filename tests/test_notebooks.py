"""Notebooks run from top to bottom; what they claim is asserted in their own cells."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
for needed in ("torch", "skimage", "pywt", "ipykernel"):
    pytest.importorskip(needed)

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's own parts
@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=resources).execute()
    errors = [output for cell in notebook.cells for output in cell.get("outputs", []) if output.output_type == "error"]
    assert not errors


def test_there_are_notebooks():
    assert list(NOTEBOOKS.glob("*.ipynb"))
