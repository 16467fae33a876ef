"""What tests share: simulated counts with known rates, the bundled counts, and the folder of real data."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Workers share the cores, and threads of PyTorch that wait for a core keep it busy. Set before anything imports it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import anndata as ad
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
from helpers import low_rank_profiles, poisson_counts, scanpy_settings

mpl.use("agg")

# A shell starts what runs in its background deaf to an interrupt, which tests send to themselves.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ARRAY_TYPES = {
    "csr_matrix": sp.csr_matrix,
    "csc_matrix": sp.csc_matrix,
    "csr_array": sp.csr_array,
    "csc_array": sp.csc_array,
    "dense": np.asarray,
    "fortran": np.asfortranarray,
}


@pytest.fixture(autouse=True)
def no_figure_is_left():
    """Close figures after each test: twenty that are open make the next one warn, in whichever test it is."""
    yield
    plt.close("all")


@pytest.fixture(params=list(ARRAY_TYPES))
def array_type(request):
    return ARRAY_TYPES[request.param]


@pytest.fixture(scope="session")
def truth():
    return low_rank_profiles(400, 150, 4, seed=3)


@pytest.fixture(scope="session")
def counts(truth):
    return poisson_counts(truth, 400, seed=4)


@pytest.fixture(scope="session")
def simulated() -> sp.csr_matrix:
    return poisson_counts(low_rank_profiles(300, 120, 5, seed=0), depth=600, seed=1)


@pytest.fixture
def adata(simulated) -> ad.AnnData:
    out = ad.AnnData(simulated.copy())
    out.obs_names = [f"cell-{i}" for i in range(out.n_obs)]
    out.var_names = [f"gene-{i}" for i in range(out.n_vars)]
    return out


@pytest.fixture(scope="session")
def _pbmc() -> ad.AnnData:
    from sc_noise2self.datasets import pbmc68k_reduced

    return pbmc68k_reduced()


@pytest.fixture
def pbmc(_pbmc) -> ad.AnnData:
    return _pbmc.copy()


@pytest.fixture
def scanpy2():
    """The defaults that scanpy 2 will have, where scanpy is 1.13 or newer with the extra `scanpy2`."""
    if not hasattr(sc, "Preset"):
        pytest.skip("scanpy has no presets before 1.13")
    try:
        with scanpy_settings(preset=sc.Preset.ScanpyV2Preview):
            yield
    except ImportError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def real_data():
    """Return a reader of the real counts by name; skips where the folder is not given."""
    folder = os.environ.get("SC_NOISE2SELF_DATA")
    if not folder:
        pytest.skip("SC_NOISE2SELF_DATA names no folder of real counts")

    def read(name: str) -> ad.AnnData:
        return ad.read_h5ad(Path(folder) / f"{name}.h5ad")

    return read
