"""Notebooks run from top to bottom; what they claim is asserted in their own cells."""

import base64
import importlib.util
import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
for needed in ("nbclient", "torch", "skimage", "pywt", "ipykernel", "dask"):
    pytest.importorskip(needed)

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
TAKE_MINUTES = {"noise2self_paper"}
NEED_A_DOWNLOAD = {"choosing_rank", "markers_after_denoising"}


spec = importlib.util.spec_from_file_location("runner", NOTEBOOKS / "run.py")
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Jupyter's own parts
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=pytest.mark.slow if path.stem in TAKE_MINUTES else (), id=path.stem)
        for path in sorted(NOTEBOOKS.glob("*.ipynb"))
    ],
)
def test_notebook(path, tmp_path):
    if path.stem in NEED_A_DOWNLOAD and not os.environ.get("SC_NOISE2SELF_DATA"):
        pytest.skip("SC_NOISE2SELF_DATA names no folder of real counts")
    committed = nbformat.read(path, as_version=4)
    executed = runner.run(nbformat.read(path, as_version=4), tmp_path)
    assert [len(cell.get("outputs", [])) for cell in executed.cells] == [
        len(cell.get("outputs", [])) for cell in committed.cells
    ]


def test_there_are_notebooks():
    assert list(NOTEBOOKS.glob("*.ipynb"))


def test_the_picture_of_the_readme_is_that_of_the_notebook():
    """The first of `markers_after_denoising`; to replace it, write the notebook's to docs/images/markers.png."""
    notebook = nbformat.read(NOTEBOOKS / "markers_after_denoising.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    first = next(output.data["image/png"] for output in outputs if "image/png" in output.get("data", {}))
    assert base64.b64decode(first) == (NOTEBOOKS.parent / "docs" / "images" / "markers.png").read_bytes()
