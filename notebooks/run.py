"""Run notebooks from top to bottom and keep their outputs; as tests they are run by `make docs`.

python notebooks/run.py                           every notebook, its new outputs kept in it
python notebooks/run.py quickstart --into results in that folder, which gets the page and what the notebook saves
"""

import argparse
import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
SECONDS = 1200  # a cell may take


def digest_of_code(notebook: nbformat.NotebookNode) -> str:
    """Return a hash of the code of a notebook, which says of its outputs whether they are of this code."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.blake2b("\0".join(code).encode(), digest_size=8).hexdigest()


def run(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Run a notebook in a folder and return it, without what differs from run to run and no reader needs."""
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", resources=resources).execute()
    notebook.metadata.pop("widgets", None)
    notebook.metadata["code_that_ran"] = digest_of_code(notebook)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if "outputs" in cell:  # progress bars go to stderr
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks (default: all)")
    parser.add_argument("--into", type=Path, help="folder to run in and to write an HTML page to")
    args = parser.parse_args()
    for name in args.names or sorted(path.stem for path in HERE.glob("*.ipynb")):
        path = HERE / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        if args.into is None:
            with TemporaryDirectory() as folder:  # for what it saves
                nbformat.write(run(notebook, Path(folder)), path)
            continue
        from nbconvert import HTMLExporter

        args.into.mkdir(parents=True, exist_ok=True)
        page, _ = HTMLExporter().from_notebook_node(run(notebook, args.into))
        (args.into / f"{name}.html").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
