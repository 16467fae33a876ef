"""Configuration of Sphinx: ``sphinx-build -W --keep-going -b html docs docs/_build/html``. It needs no network.

Notebooks are shown with the outputs that were committed, unless ``-D nb_execution_mode=force`` runs them, as
``make docs`` does: this is the one place where they are tested. What they claim is asserted in their own cells, and an
error, or a cell that takes too long, fails the build.
"""

import json
import os
import re
import shutil
from importlib.metadata import version as version_of
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from docutils import nodes
from latex2mathml.converter import convert

HERE = Path(__file__).parent
NOTEBOOKS = HERE.parent / "notebooks"
FIRST = [
    "quickstart",
    "whole_analysis",
    "gallery",
    "choosing_rank",
    "markers_after_denoising",
    "autoencoder",
    "calibrate_your_own",
]
LAST = ["noise2self_paper"]  # any other notebook stands between the two
NEED_REAL_COUNTS = ["choosing_rank", "markers_after_denoising", "noise2self_paper"]  # else they download some

# Their names in signatures become links where these sites are reached.
OTHERS = {
    "python": "https://docs.python.org/3/",
    "numpy": "https://numpy.org/doc/stable/",
    "scipy": "https://docs.scipy.org/doc/scipy/",
    "pandas": "https://pandas.pydata.org/docs/",
    "matplotlib": "https://matplotlib.org/stable/",
    "anndata": "https://anndata.readthedocs.io/en/stable/",
    "scanpy": "https://scanpy.readthedocs.io/en/stable/",
    "dask": "https://docs.dask.org/en/stable/",
}


def reached(site):
    """Return whether a site gives its list of names; without a network the pages are built without links to it."""
    try:
        with urlopen(f"{site}objects.inv", timeout=5) as answer:
            return answer.status == 200
    except (URLError, TimeoutError):
        return False


project = "sc_noise2self"
author = "the sc_noise2self developers"
copyright = f"2026, {author}"
version = release = version_of("sc-noise2self")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
templates_path = ["_templates"]
exclude_patterns = ["_build"]
# A notebook may skip a level of headings, and keep a progress bar in its output.
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type"]

intersphinx_mapping = {name: (site, None) for name, site in OTHERS.items() if reached(site)}
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_execution_raise_on_error = True
nb_execution_timeout = 1200  # seconds a cell
nb_execution_in_temp = True  # what a notebook saves is not for the pages
nb_execution_excludepatterns = (
    [] if os.environ.get("SC_NOISE2SELF_DATA") else [f"notebooks/{name}.ipynb" for name in NEED_REAL_COUNTS]
)
nb_output_stderr = "remove"  # progress bars
nb_merge_streams = True

default_role = "code"  # docstrings put code in single backticks
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100
napoleon_google_docstring = False
napoleon_custom_sections = ["Returns", "Raises", "Warns"]  # prose and definition lists, no lists of types

html_theme = "sphinx_book_theme"
html_title = f"sc_noise2self {version}"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_math_renderer = "mathml"  # which browsers draw by themselves, without a script from elsewhere
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True


def setup(app):
    """Connect the functions below."""
    app.connect("config-inited", copy_notebooks)
    app.connect("autodoc-process-docstring", as_restructured_text, priority=400)  # napoleon is at 500
    app.add_html_math_renderer("mathml", (inline_formula, None), (formula, None))


def inline_formula(translator, node):
    """Write a formula within a line as MathML."""
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def formula(translator, node):
    """Write a formula on a line of its own as MathML."""
    translator.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def copy_notebooks(*_):
    """Copy the notebooks to docs/notebooks, where Sphinx finds them, and list them there in order."""
    folder = HERE / "notebooks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    found = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    middle = [name for name in found if name not in FIRST + LAST]
    names = [name for name in FIRST + middle + LAST if name in found]
    for name in names:
        notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
        notebook["metadata"].setdefault("language_info", {"name": "python", "pygments_lexer": "ipython3"})
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = re.sub(r"(?<!!)\[([^]]*)\]\(([^)\s]+)\)", _link, "".join(cell["source"]))
        (folder / f"{name}.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    toctree = "\n".join(["# Notebooks", "", "```{toctree}", ":maxdepth: 1", *names, "```", ""])
    (folder / "index.md").write_text(toctree, encoding="utf-8")


def _link(match):
    """Return a link of a notebook as it is from docs/notebooks; of one to a file that is no page, the text alone."""
    text, target = match.groups()
    if re.match(r"\w+:|#", target):
        return match[0]
    if target.startswith("../docs/"):
        return f"[{text}](../{target.removeprefix('../docs/')})"
    return match[0] if (NOTEBOOKS / target).suffix == ".ipynb" and (NOTEBOOKS / target).is_file() else text


def as_restructured_text(app, what, name, obj, options, lines):
    """Link the package's names that are in backticks, take |x| for a norm, and put a term to define on one line."""
    text = re.sub(r"^(`.*,)\n(?=`.*\n +\S)", r"\1 ", "\n".join(lines), flags=re.MULTILINE)
    lines[:] = text.split("\n")
    for i, line in enumerate(lines):
        if line.lstrip().startswith(">>>"):
            continue
        line = re.sub(r"(?<![`:])`(sc_noise2self\.[\w.]+)`(?!`)", r":py:obj:`\1`", line)
        # Every other piece is between backticks.
        pieces = re.split(r"(`+[^`]+`+)", line)
        lines[i] = "".join(piece if piece.startswith("`") else piece.replace("|", r"\|") for piece in pieces)
