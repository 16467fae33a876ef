"""The package as others meet it: `scanpy.external.n2s`, imports, the command line."""

import doctest
import importlib
import importlib.metadata
import re
import subprocess
import sys

import anndata as ad
import pytest
from helpers import layer_names

from sc_noise2self.__main__ import main
from sc_noise2self.methods import REGISTRY


def python(code):
    """Run code in a fresh interpreter and return what it prints; its errors are ours."""
    done = subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light():
    slow = ["torch", "scanpy", "anndata", "pandas", "matplotlib", "sklearn", "scipy", "numpy"]
    code = f"import sys, sc_noise2self; print([name for name in {slow} if name in sys.modules])"
    assert python(code) == "[]"


def test_every_public_name_loads_and_torch_is_not_needed():
    code = """
import sys, sc_noise2self as n2s
names = "Autoencoder Clusters Diffusion Function KNN PCA calibrate cluster_support datasets denoise denoise_file"
names += " denoise_with get methods null_counts overdispersion partitions pl rank_genes_groups remove report scales"
names += " select_rank select_resolution split_molecules"
assert sorted({*n2s.__all__} - {"__version__"}) == names.split()
for name in n2s.__all__: getattr(n2s, name)
assert callable(n2s.denoise) and "torch" not in sys.modules
"""
    python(code)


@pytest.mark.parametrize(
    "module",
    [
        *("_anndata", "_calibrate", "_denoise", "_files", "_groups", "_null", "_overdispersion", "_rank", "_report"),
        *("_resolution", "_slots", "_support", "_transfer", "get"),
    ],
)
def test_examples_in_docstrings_are_true(module):
    tested = doctest.testmod(importlib.import_module(f"sc_noise2self.{module}"))
    assert tested.attempted
    assert not tested.failed


ORDERS = [
    "import sc_noise2self as n2s; import scanpy as sc",
    pytest.param("import scanpy as sc; import sc_noise2self as n2s", marks=pytest.mark.slow),
    pytest.param("import sc_noise2self as n2s; import scanpy.external; import scanpy as sc", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("order", ORDERS)
def test_scanpy_external(order):
    code = f"""
import warnings; warnings.simplefilter("ignore")
{order}
assert sc.external.n2s is n2s
assert "n2s" not in sc.external.__all__
import scanpy.external.n2s as alias
assert alias is n2s
import scanpy.external.n2s.pl as alias_pl
import sc_noise2self.pl
assert alias_pl is sc_noise2self.pl is n2s.pl
assert alias_pl.__name__ == alias_pl.__spec__.name == "sc_noise2self.pl"
from scanpy.external.n2s import denoise
assert denoise is n2s.denoise is sc.external.n2s.denoise
import importlib
importlib.reload(n2s)
assert sc.external.n2s is n2s
import sys
assert sum(type(finder).__name__ == "_Finder" for finder in sys.meta_path) == 1
"""
    python(code)


def test_scanpy_without_external():
    code = """
import importlib.machinery, sys, types
import scanpy as sc
sys.modules.pop("scanpy.external", None); vars(sc).pop("external", None)
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *rest: None if name == "scanpy.external" else find(name, *rest)
import sc_noise2self as n2s
try:
    import scanpy.external
except ModuleNotFoundError:
    print(callable(n2s.denoise))
"""
    assert python(code) == "True"


def test_never_over_something_already_there():
    code = """
import warnings; warnings.simplefilter("ignore")
import scanpy as sc, scanpy.external
sc.external.n2s = "somebody else's"
import sc_noise2self
print(sc.external.n2s)
"""
    assert python(code) == "somebody else's"


@pytest.fixture
def source(adata, tmp_path):
    adata.layers["counts"] = adata.X.copy()
    adata.write_h5ad(tmp_path / "in.h5ad")
    return tmp_path / "in.h5ad"


def test_command_line(source, tmp_path, capsys):
    before = source.read_bytes()
    assert main(["denoise", str(source), str(tmp_path / "out.h5ad"), "--layer", "counts", "--quiet"]) == 0
    assert capsys.readouterr().out == ""
    out = ad.read_h5ad(tmp_path / "out.h5ad")
    assert out.layers["denoised"].shape == (300, 120)
    assert out.uns["denoised"]["params"]["layer"] == "counts"
    assert source.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.h5ad", "out.h5ad"]


def test_command_line_factors(source, tmp_path):
    assert (
        main(["denoise", str(source), str(tmp_path / "out.h5ad"), "--factors", "--mix", "--key-added", "x", "--quiet"])
        == 0
    )
    out = ad.read_h5ad(tmp_path / "out.h5ad")
    assert layer_names(out) == {"counts"}
    assert out.obsm["x"].shape[0] == 300
    assert out.uns["x"]["params"]["mix"]


def test_command_line_says_what_is_wrong_and_writes_nothing(source, tmp_path, capsys):
    (tmp_path / "taken.h5ad").write_text("mine")
    normalised = ad.read_h5ad(source)
    normalised.X = normalised.X * 0.3
    normalised.write_h5ad(tmp_path / "normalised.h5ad")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    out = str(tmp_path / "out.h5ad")
    for arguments, message in [
        (["missing.h5ad", out], "missing.h5ad does not exist"),
        ([str(source), str(tmp_path / "taken.h5ad")], "taken.h5ad exists: nothing is overwritten"),
        ([str(source), str(tmp_path / "out.csv")], "does not end in .h5ad"),
        ([str(source), str(tmp_path / "no" / "out.h5ad")], "is not a folder: make it first"),
        ([str(tmp_path / "normalised.h5ad"), out], "molecule splitting needs raw counts"),
        ([str(source), out, "--method", "magic"], "method is 'magic': pass one of"),
        ([str(source), out, "--layer", "raw"], "layer 'raw' is missing: the file has"),
    ]:
        assert main(["denoise", *arguments, "--quiet"]) == 2
        assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_module_runs_as_a_program_and_reports_the_gain(source, tmp_path):
    command = [sys.executable, "-m", "sc_noise2self", "denoise", str(source), str(tmp_path / "out.h5ad")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nats per held-out molecule" in done.stderr
    assert "out.h5ad, result 'denoised'" in done.stdout
    assert "test on the counts" in done.stdout


def test_version_is_recorded_and_printed(adata, capsys):
    import sc_noise2self as n2s

    n2s.denoise(adata)
    version = importlib.metadata.version("sc-noise2self")
    assert n2s.__version__ == adata.uns["denoised"]["version"] == version
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert not end.value.code
    assert capsys.readouterr().out == f"sc-noise2self {version}\n"


@pytest.mark.parametrize("command", [[], ["denoise"], ["select-rank"], ["report"]])
def test_help_is_plain_text(command, capsys):
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    said = capsys.readouterr().out
    assert said.startswith(f"usage: {' '.join(['sc-noise2self', *command])} ")
    assert not {"`", "*", "\x1b"} & set(said)
    if command == ["denoise"]:
        assert set(REGISTRY) <= set(re.findall(r"\w+", said))


def test_command_line_selects_the_rank(source, adata, capsys):
    import sc_noise2self as n2s

    before = source.read_bytes()
    assert main(["select-rank", str(source), "--layer", "counts", "--max-rank", "9", "--seed", "2", "--quiet"]) == 0
    assert capsys.readouterr().out == f"{n2s.select_rank(adata, max_rank=9, random_state=2)}\n"
    assert source.read_bytes() == before
    for arguments, message in [
        (["--protocol", "x"], "--protocol is 'x': pass one of loo"),
        (["--max-rank", "500"], "--max-rank is 500: 300 cells x 120 genes have at most 119 components"),
        (["--layer", "raw"], "layer 'raw' is missing: the file has ['counts']"),
    ]:
        assert main(["select-rank", str(source), *arguments, "--quiet"]) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


def test_command_line_reports(adata, tmp_path, capsys):
    import sc_noise2self as n2s

    adata.obs["kind"] = ["a", "b", "b"] * 100
    n2s.denoise(adata, key_added="x", write_layer=False)
    adata.write_h5ad(tmp_path / "out.h5ad")
    for options, expected in [
        ([], n2s.report(adata, key="x") + "\n"),
        (["--detail"], n2s.report(adata, key="x", detail=True) + "\n"),
        (["--groupby", "kind"], n2s.report(adata, key="x", groupby="kind").to_csv(sep="\t", float_format="%.6g")),
        (["--as-frame"], n2s.report(adata, key="x", as_frame=True).to_csv(sep="\t", float_format="%.6g")),
    ]:
        assert main(["report", str(tmp_path / "out.h5ad"), "--key", "x", *options]) == 0
        assert capsys.readouterr().out == expected
    assert main(["report", str(tmp_path / "out.h5ad")]) == 2
    assert capsys.readouterr().err == (
        "sc_noise2self: there is no result 'denoised': run sc-noise2self denoise IN OUT --key-added 'denoised', or "
        "pass another --key: the results in the file are 'x'.\n"
    )
    assert main(["report", str(tmp_path / "no.h5ad")]) == 2
    assert "no.h5ad does not exist" in capsys.readouterr().err
