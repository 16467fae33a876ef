"""Code on pages that promise code to copy runs as it stands, on the counts that come with scanpy."""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import scanpy as sc

import sc_noise2self as n2s

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "docs/index.md", "docs/which_layer.md", "docs/clusters.md", "docs/coming_from.md"]


def blocks_of(page):
    """Return the blocks of Python on a page, without those of MAGIC, which is no dependency."""
    found = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    return [code for code in found if "import magic" not in code]


BLOCKS = [(page, i, code) for page in PAGES for i, code in enumerate(blocks_of(page))]


@pytest.fixture
def adata(pbmc):
    pbmc.layers["counts"] = pbmc.X.copy()
    pbmc.obs["cell_type"] = pbmc.obs["bulk_labels"]
    pbmc.obs["batch"] = ["one", "two"] * (pbmc.n_obs // 2)
    return pbmc


@pytest.mark.parametrize(("page", "i", "code"), BLOCKS, ids=[f"{Path(page).stem}-{i}" for page, i, _ in BLOCKS])
def test_code_runs(adata, page, i, code, tmp_path, monkeypatch):
    if "Autoencoder" in code:
        pytest.importorskip("torch")
    if "get.lazy" in code:
        pytest.importorskip("dask")
    monkeypatch.chdir(tmp_path)
    adata.write_h5ad("mine.h5ad")
    exec(compile(code, f"{page}, block {i}", "exec"), {"adata": adata, "n2s": n2s, "sc": sc})
    plt.close("all")


def test_pages_have_code():
    assert {page for page, *_ in BLOCKS} == set(PAGES)
