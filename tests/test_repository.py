"""What the repository says of the package elsewhere is what pyproject.toml says; its component of a benchmark runs."""

import re
import runpy
import tomllib
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from packaging.requirements import Requirement

import sc_noise2self as n2s
from sc_noise2self.methods import REGISTRY
from sc_noise2self.scales import SCALES

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COMPONENT = ROOT / "benchmarks" / "openproblems"


def read(name):
    return yaml.safe_load((ROOT / name).read_text())


FILES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("*.yaml", "*.cff", ".*.yaml", ".github/**/*.y*ml", "conda/*.yaml", "benchmarks/**/*.yaml")
    for path in ROOT.glob(pattern)
)


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_yaml(name):
    assert isinstance(read(name), dict)


def test_versions_and_addresses_agree():
    citation, recipe, entry, config = (
        read(name)
        for name in ("CITATION.cff", "conda/recipe.yaml", "meta.yaml", "benchmarks/openproblems/config.vsh.yaml")
    )
    assert citation["version"] == recipe["context"]["version"] == PROJECT["version"]
    assert citation["license"] == recipe["about"]["license"] == entry["license"] == PROJECT["license"]
    home, pages = PROJECT["urls"]["Source"], PROJECT["urls"]["Documentation"]
    assert home == citation["repository-code"] == recipe["about"]["homepage"] == entry["project_home"]
    assert home == config["links"]["repository"]
    assert pages == citation["url"] == recipe["about"]["documentation"] == entry["documentation_home"]
    assert pages == config["links"]["documentation"]
    assert recipe["about"]["summary"] == PROJECT["description"]
    assert entry["install"]["pypi"] == recipe["package"]["name"] == PROJECT["name"]


def test_the_recipe_asks_for_what_the_package_asks_for():
    run = read("conda/recipe.yaml")["requirements"]["run"]
    elsewhere = {
        "matplotlib-base": "matplotlib",
        "python-igraph": "igraph",
        "adjusttext": "adjustText",
    }  # on conda-forge
    asked = {elsewhere.get(name, name): bound for name, bound in map(str.split, run)}
    required = {each.name: str(each.specifier) for each in map(Requirement, PROJECT["dependencies"])}
    assert asked == {"python": PROJECT["requires-python"], **required}


def test_every_python_that_is_named_is_tested():
    named = [match[1] for each in PROJECT["classifiers"] if (match := re.fullmatch(r".*Python :: (3\.\d+)", each))]
    matrix = read(".github/workflows/test.yaml")["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == named == ["3.11", "3.12", "3.13", "3.14"]


def test_ruff_is_the_same_before_a_commit_and_in_the_tests():
    pinned = re.search(r"^ruff==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    revisions = {each["repo"]: each.get("rev") for each in read(".pre-commit-config.yaml")["repos"]}
    assert revisions["https://github.com/astral-sh/ruff-pre-commit"] == f"v{pinned}"


def test_actions_are_pinned_by_commit():
    uses = [
        line.split("uses:")[1].split("#")[0].strip()
        for path in (ROOT / ".github" / "workflows").glob("*.yaml")
        for line in path.read_text().splitlines()
        if "uses:" in line
    ]
    assert uses
    assert all(re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", each) for each in uses)


class TestOpenProblems:
    """The component of the denoising task, on data of its layout, as viash runs it."""

    @pytest.fixture
    def run(self, simulated, tmp_path, capsys):
        train = ad.AnnData(
            layers={"counts": simulated.astype(np.int64)}, uns={"dataset_id": "some", "dataset_organism": "x"}
        )
        train.obs_names = [f"cell-{i}" for i in range(train.n_obs)]
        train.write_h5ad(tmp_path / "train.h5ad")

        def with_options(**options):
            code, start, end = (COMPONENT / "script.py").read_text(), "## VIASH START", "## VIASH END"
            par = {"input_train": str(tmp_path / "train.h5ad"), "output": str(tmp_path / "out.h5ad"), **options}
            inner = code[code.index(start) : code.index(end)]
            script = tmp_path / "script.py"
            script.write_text(code.replace(inner, f"par = {par!r}\nmeta = {{'name': 'sc_noise2self'}}\n"))
            runpy.run_path(str(script))
            return ad.read_h5ad(tmp_path / "out.h5ad")

        return with_options

    def test_it_writes_what_the_task_reads(self, run, adata):
        out = run(method="pca", scale="counts")
        assert out.shape == adata.shape
        assert out.X is None
        assert set(out.layers) - {None} == {"denoised"}
        assert dict(out.uns) == {"dataset_id": "some", "method_id": "sc_noise2self"}
        assert list(out.obs_names) == list(adata.obs_names)
        assert not len(out.obs.columns)
        n2s.denoise(adata)
        np.testing.assert_allclose(out.layers["denoised"], adata.layers["denoised"], rtol=1e-5)

    def test_the_scale_of_logarithms_is_what_metrics_find_again(self, run, adata):
        out = run(method="pca", scale="expected_log1p_cp10k")
        n2s.denoise(adata, scale="expected_log1p_cp10k")
        size = np.asarray(sp.csr_matrix(adata.X).sum(axis=1))
        np.testing.assert_allclose(np.log1p(out.layers["denoised"] / size * 1e4), adata.layers["denoised"], rtol=1e-4)

    def test_its_options_are_those_of_the_package(self):
        config = yaml.safe_load((COMPONENT / "config.vsh.yaml").read_text())
        arguments = {each["name"].removeprefix("--"): each for each in config["arguments"]}
        assert set(arguments["method"]["choices"]) == set(REGISTRY)
        assert set(arguments["scale"]["choices"]) <= set(SCALES)
        for each in config["info"]["variants"].values():
            assert all(value in arguments[name]["choices"] for name, value in each.items())
