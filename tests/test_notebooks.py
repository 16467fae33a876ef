"""Notebooks as they are committed. They are run where the documentation is built: `make docs`, see `docs/conf.py`."""

import base64
import importlib.util
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

spec = importlib.util.spec_from_file_location("runner", ROOT / "notebooks" / "run.py")
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)


def outputs_of(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_whole_and_of_the_code_beside_them(path):
    """To mend: `python notebooks/run.py NAME` runs a notebook and keeps its outputs."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not [
        output for output in outputs_of(notebook) if output.output_type == "error" or output.get("name") == "stderr"
    ]
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert notebook.metadata["code_that_ran"] == runner.digest_of_code(notebook)


def test_the_picture_of_the_readme_is_that_of_the_notebook():
    """The first of `markers_after_denoising`; to replace it, write the notebook's to docs/images/markers.png."""
    notebook = nbformat.read(ROOT / "notebooks" / "markers_after_denoising.ipynb", as_version=4)
    first = next(output.data["image/png"] for output in outputs_of(notebook) if "image/png" in output.get("data", {}))
    assert base64.b64decode(first) == (ROOT / "docs" / "images" / "markers.png").read_bytes()
