"""The file that models are saved to: what is written is read, and whatever else is refused in a sentence."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from helpers import low_rank_profiles, poisson_counts
from model_files import claims, read_parts, write_parts

from sc_noise2self import _model
from sc_noise2self._model import Saved, State
from sc_noise2self.methods._components import learn_components
from sc_noise2self.methods._pca import PCAModel
from sc_noise2self.methods._populations import Refinement

N_GENES, K = 12, 3


def pca_state(**arrays):
    rng = np.random.default_rng(0)
    made = {
        "gene_share": rng.dirichlet(np.ones(N_GENES)),
        "gene_scale": rng.uniform(0.5, 2, N_GENES).astype(np.float32),
        "gene_weights": rng.uniform(0, 1, N_GENES).astype(np.float32),
        "mean": rng.normal(size=N_GENES),
        "components": np.asfortranarray(rng.normal(size=(N_GENES, K)).astype(np.float32)),
        "weights": np.array([1, 0.5, 0]),
        "used": np.arange(N_GENES) != 4,
        "population_centers": rng.uniform(0, 1, (2, N_GENES)).astype(np.float32),
        "population_factors": rng.uniform(0, 9, (2, N_GENES)).astype(np.float32),
        "population_shares": rng.dirichlet(np.ones(N_GENES), 2).astype(np.float32),
    }
    return State("pca", {"transform": "log1p", "target": np.float64(120.5), "floor": 0.25}, made | arrays)


def saved(**arrays):
    mean = State("mean", {}, {"gene_share": np.full(N_GENES, 1 / N_GENES)})
    genes = np.array([f"gene-{i}" for i in range(N_GENES - 1)] + ["µ-globulin"])
    return Saved((pca_state(**arrays), mean), (0.75, 0.25), genes, ("a", "b"))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model"
    _model.save(path, saved())
    return path


def same(first, second):
    assert first.weights == second.weights
    assert first.batches == second.batches
    assert list(first.genes) == list(second.genes)
    assert [state.method for state in first.states] == [state.method for state in second.states]
    for one, other in zip(first.states, second.states, strict=True):
        assert one.values == other.values
        assert set(one.arrays) == set(other.arrays)
        for name, value in one.arrays.items():
            assert value.dtype == other.arrays[name].dtype
            np.testing.assert_array_equal(value, other.arrays[name])


def test_what_is_saved_is_loaded(path):
    same(_model.load(path), saved())
    with np.load(path) as parts:  # NumPy alone reads it
        assert parts["genes"][-1] == "µ-globulin"


def test_pca_that_was_saved_predicts_the_same(tmp_path):
    counts = poisson_counts(low_rank_profiles(80, 40, 3, seed=0), depth=300, seed=1)
    components = learn_components(counts, "sqrt", 4, np.random.default_rng(0), used=np.arange(40) > 2)
    weights = np.array([1, 0.9, 0.5, 0])
    found = components.weighted_profiles(counts, weights).scaled().refined(counts, Refinement(2, 0.5))
    fitted = PCAModel(components, weights, found.gene_scale, found.populations)
    _model.save(tmp_path / "model", Saved((fitted.state(),), (1.0,), np.arange(40).astype(str)))
    (state,) = _model.load(tmp_path / "model").states
    found = PCAModel.from_state(state, "cpu").predict(counts)
    assert found.counts().tobytes() == fitted.predict(counts).counts().tobytes()


def test_the_same_models_are_the_same_bytes(path, tmp_path):
    _model.save(tmp_path / "again.npz", saved())
    assert (tmp_path / "again.npz").read_bytes() == path.read_bytes()


def test_it_is_read_without_pytorch_and_without_pickle(path):
    code = (
        "import sys; sys.modules['torch'] = None; import pickle; from sc_noise2self import _model; "
        "pickle.load = pickle.loads = pickle.Unpickler = None; print(_model.load(sys.argv[1]).weights)"
    )
    found = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "(0.75, 0.25)"


def test_nothing_is_overwritten_or_left_half(path, tmp_path, monkeypatch):
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        _model.save(path, saved())
    assert path.read_bytes() == before

    def interrupt(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _model.save(tmp_path / "model", saved())
    assert not list(tmp_path.iterdir())


def test_models_that_could_not_be_loaded_are_not_saved(tmp_path):
    genes = np.array(["a"] * N_GENES)
    nan = np.full(N_GENES, np.nan)
    for models, message in (
        (saved(mean=nan), "the model cannot be saved: its mean holds values that are not finite"),
        (saved(mean=np.zeros(3)), r"its mean has shape \(3,\) instead of \(12,\)"),
        (saved(mean=np.zeros(N_GENES, object)), "its mean is of type object"),
        (saved(more=np.zeros(3)), "the file has in excess '0/more'"),
        (Saved((pca_state(),), (1.0,), genes), "its names of genes repeat"),
        (Saved((pca_state(),), (0.5,), saved().genes), "its weights are not 1 shares that add up to 1"),
        (Saved((), (), saved().genes), "its states is of type list"),
    ):
        with pytest.raises(ValueError, match=message):
            _model.save(tmp_path / "model", models)
    assert not list(tmp_path.iterdir())


def test_who_may_not_read_it_is_told_so(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none is not a file: pass one that denoise"):
        _model.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        _model.load(tmp_path)
    _model.save(tmp_path / "model", saved())
    assert stat.S_IMODE((tmp_path / "model").stat().st_mode) & 0o111 == 0
    (tmp_path / "model").chmod(0)
    if not os.access(tmp_path / "model", os.R_OK):
        with pytest.raises(PermissionError):
            _model.load(tmp_path / "model")


def put(value, *keys):
    """Return the edit that puts a value, or what a function makes of the old one, into the JSON."""

    def edit(text, arrays):
        for key in keys[:-1]:
            text = text[key]
        text[keys[-1]] = value(text[keys[-1]]) if callable(value) else value

    return edit


def array(name, value):
    """Return the edit that puts an array, or what a function makes of the old one, into the file."""

    def edit(text, arrays):
        arrays[name] = value(arrays[name]) if callable(value) else value

    return edit


def lack(name, *keys):
    def edit(text, arrays):
        part = text if name in text or keys else arrays
        for key in keys:
            part = part[key]
        del part[name]

    return edit


def many_components(text, arrays):
    """Return 10^12 components, of which nothing is stored."""
    arrays["0/components"], arrays["0/weights"] = claims((N_GENES, 10**12)), claims((10**12,))


VALUES = ("states", 0, "values")
HOSTILE = {
    "no states": (lack("states"), "the file lacks 'states'"),
    "an empty list of states": (put([], "states"), "its states is of type list"),
    "a number for states": (put(3, "states"), "its states is 3"),
    "a state that is a list": (put([], "states", 0), "a state is of type list"),
    "more in the text": (put(["a"], "fit"), "the file has in excess 'fit'"),
    "more parts": (array("code", np.zeros(3)), "the file has in excess 'code'"),
    "a part of another state": (array("2/mean", np.zeros(3)), "the file has in excess '2/mean'"),
    "a part without its state": (put(lambda states: states[:1], "states"), "its weights are not 1 shares"),
    "a list for values": (put([], *VALUES), "its pca is of type list"),
    "no target": (lack("target", *VALUES), "its pca lacks 'target'"),
    "one more value": (put(3, *VALUES, "predict"), "its pca has in excess 'predict'"),
    "an unknown method": (put("magic", "states", 0, "method"), "its method is 'magic'"),
    "a method that is a list": (put(["pca"], "states", 0, "method"), "its method is of type list"),
    "another method": (put("mean", "states", 0, "method"), "its mean has in excess 'floor', 'target', 'transform'"),
    "an unknown transform": (put("cube", *VALUES, "transform"), "its transform is 'cube'"),
    "a transform of a wrong type": (put(["sqrt"], *VALUES, "transform"), "its transform is of type list"),
    "a target of 0": (put(0.0, *VALUES, "target"), "its target is 0.0"),
    "a target that is text": (put("1", *VALUES, "target"), "its target is '1'"),
    "a target that is true": (put(True, *VALUES, "target"), "its target is True"),
    "a target that is nan": (put(float("nan"), *VALUES, "target"), "its target is nan"),
    "a target that is infinite": (put(float("inf"), *VALUES, "target"), "its target is inf"),
    "a target that no cell has": (put(1e30, *VALUES, "target"), "its target is 1e[+]30"),
    "a target that is huge": (put(10**400, *VALUES, "target"), "its target is 1000"),
    "weights of states": (put([0.75, 0.75], "weights"), "its weights are not 2 shares that add up to 1"),
    "a negative weight": (put([1.5, -0.5], "weights"), "its weights are not 2 shares"),
    "too many weights": (put([0.5, 0.25, 0.25], "weights"), "its weights are not 2 shares"),
    "weights that are text": (put("ab", "weights"), "its weights are not 2 shares"),
    "weights that are nan": (put([float("nan"), 1.0], "weights"), "its weights are not 2 shares"),
    "batches that repeat": (put(["a", "a"], "batches"), "its batches is of type list"),
    "batches that are numbers": (put([1, 2], "batches"), "its batches is of type list"),
    "batches that are text": (put("ab", "batches"), "its batches is 'ab'"),
    "another version": (put(2, "sc_noise2self"), "was saved by another version: fit and save it again"),
    "a later version": (put(5, "sc_noise2self"), "was saved by another version"),
    "a list for a version": (put([3, 3, 3], "sc_noise2self"), "was saved by another version"),
    "no version": (lack("sc_noise2self"), "was saved by another version"),
    "no names": (lack("genes"), "the file lacks 'genes'"),
    "too few names": (array("genes", np.array(["a", "b"])), r"gene_share has shape \(12,\) instead of \(2,\)"),
    "names that repeat": (array("genes", np.array(["a"] * N_GENES)), "its names of genes repeat"),
    "names that are numbers": (
        array("genes", np.arange(N_GENES)),
        r"its names of genes are \(12,\) values of type int",
    ),
    "names in a square": (array("genes", lambda x: x.reshape(3, 4)), r"its names of genes are \(3, 4\) values"),
    "names of no length": (array("genes", claims((10**12,), "<U0")), "stores 0 bytes for shape"),
    "names that are no characters": (array("genes", claims((N_GENES,), "<U1", b"\xff" * 48)), "saved[.]"),
    "no components": (lack("0/components"), "the file lacks '0/components'"),
    "whole numbers": (array("0/mean", np.zeros(N_GENES, np.int64)), "its mean is of type int64"),
    "half precision": (array("0/mean", np.zeros(N_GENES, np.float16)), "its mean is of type float16"),
    "complex numbers": (array("0/mean", np.zeros(N_GENES, complex)), "its mean is of type complex128"),
    "the other byte order": (array("0/mean", lambda x: x.astype(">f8")), "its mean is of type >f8"),
    "text": (array("0/mean", np.array(["a"] * N_GENES)), "its mean is of type <U1"),
    "a record": (array("0/mean", np.zeros(N_GENES, [("a", "f4")])), r"its mean is of type \[\('a', '<f4'\)\]"),
    "objects": (array("0/mean", np.array([None] * N_GENES)), "0/mean.npy' stores .* bytes for .* of object"),
    "objects in a record": (array("0/mean", np.zeros(N_GENES, [("a", "O")])), "0/mean.npy' stores .* bytes for .*"),
    "numbers of no length": (array("0/mean", claims((10**12,), "|V0")), "stores 0 bytes for shape"),
    "a wrong shape": (array("0/mean", np.zeros(11)), r"mean has shape \(11,\) instead of \(12,\)"),
    "more dimensions": (array("0/mean", np.zeros((12, 1))), r"mean has shape \(12, 1\) instead of 1 dimensions"),
    "no dimensions": (array("0/mean", np.zeros(())), r"mean has shape \(\) instead of 1 dimensions"),
    "no components in it": (
        array("0/components", np.zeros((12, 0))),
        r"components has shape \(12, 0\), and its k must be",
    ),
    "sizes that differ": (array("0/weights", np.ones(4)), r"weights has shape \(4,\) instead of \(3,\)"),
    "10^12 values": (array("0/mean", claims((10**12,))), "0/mean.npy' stores 0 bytes for shape"),
    "10^12 components": (many_components, "components.npy' stores 0 bytes for shape"),
    "10^12 of the text": (array("model", claims((10**12,), "|u1")), "model.npy' stores 0 bytes for shape"),
    "a negative size": (array("0/mean", claims((-12,), "<f4", bytes(48))), "mean.npy' stores 48 bytes for shape"),
    "two negative sizes": (array("0/components", claims((-12, -3), "<f4", bytes(144))), r"has shape \(-12, -3\)"),
    "a size that is true": (array("0/mean", claims((True,), "<f4", bytes(4))), r"has shape \(True,\) instead"),
    "too little stored": (array("0/mean", claims((N_GENES,), "<f8", bytes(90))), "mean.npy' stores 90 bytes for"),
    "too much stored": (array("0/mean", claims((N_GENES,), "<f8", bytes(97))), "mean.npy' stores 97 bytes for"),
    "no array": (array("0/mean", b"text"), "saved[.]"),
    "half a header": (array("0/mean", claims((N_GENES,))[:20]), "saved[.]"),
    "another version of NumPy's format": (array("0/mean", b"\x93NUMPY\x03\x00" + claims((12,))[8:]), "saved[.]"),
    "nested brackets": (array("0/mean", b"\x93NUMPY\x01\x00\xff\x1f" + b"(" * 8191), "saved[.]"),
    "many signs": (array("0/mean", b"\x93NUMPY\x01\x00\xff\x1f" + b"-" * 8191), "saved[.]"),
    "nan": (array("0/mean", np.full(N_GENES, np.nan)), "its mean holds values that are not finite"),
    "infinite": (array("0/components", lambda x: x * np.float32(np.inf)), "its components holds values that are not f"),
    "shares below 0": (array("0/gene_share", lambda x: -x), "its gene_share holds values that are not from 0 to 1"),
    "no shares": (array("0/gene_share", lambda x: 0 * x), "its gene_share does not add up to 1"),
    "too many shares": (array("1/gene_share", lambda x: 1.1 * x), "its gene_share does not add up to 1"),
    "weights above 1": (array("0/weights", lambda x: 2 * x), "its weights holds values that are not from 0 to 1"),
    "a scale of 1e30": (array("0/gene_scale", lambda x: 1e30 * x), "its gene_scale holds values that are not from 0"),
    "weights of genes below 0": (array("0/gene_weights", lambda x: -x), "its gene_weights holds values that are not"),
    "true that is 2": (array("0/used", claims((N_GENES,), "|b1", b"\x02" * 12)), "its used holds values that are not"),
}


@pytest.mark.parametrize(("edit", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_file_that_is_no_model_is_refused_in_a_sentence(path, tmp_path, edit, message):
    text, arrays = read_parts(path)
    edit(text, arrays)
    write_parts(tmp_path / "bad.pt", text, arrays)
    with pytest.raises(ValueError, match=f"bad.pt is not a model that .*{message}") as error:
        _model.load(tmp_path / "bad.pt")
    assert len(str(error.value)) < 300 + len(str(tmp_path))
    assert "\n" not in str(error.value)


TEXTS = {
    "deeply nested": (b"[" * 500_000, "saved[.]"),
    "deeply nested in a name": (b'{"states":' * 50_000, "saved[.]"),
    "50 MB": (b'{"sc_noise2self": 3, "states": [' + b" " * 50_000_000 + b"]}", "its text has 50000.* bytes"),
    "a list": (b"[3]", "was saved by another version"),
    "a number of many digits": (b'{"sc_noise2self": ' + b"3" * 10_000 + b"}", "saved[.]"),
    "no text": (b"", "saved[.]"),
    "cut": (b'{"sc_noise2self": 3', "saved[.]"),
    "no characters": (b'{"sc_noise2self": "\xff"}', "saved[.]"),
}


@pytest.mark.parametrize(("text", "message"), TEXTS.values(), ids=TEXTS)
def test_a_text_that_is_none_is_refused(path, tmp_path, text, message):
    write_parts(tmp_path / "bad.pt", text, read_parts(path)[1])
    with pytest.raises(ValueError, match=f"bad.pt is not a model that .*{message}"):
        _model.load(tmp_path / "bad.pt")


def repacked(path, target, compression=zipfile.ZIP_STORED, twice=()):
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w", compression) as other:
        for name in [*archive.namelist(), *twice]:
            other.writestr(name, archive.read(name))


def shared(path, target):
    """Copy a file in which a thousand parts share their bytes with the first."""
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(target, "w") as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name))
        for i in range(1000):
            copy = zipfile.ZipInfo(f"{i}.npy")
            for field in ("header_offset", "CRC", "compress_size", "file_size"):
                setattr(copy, field, getattr(other.filelist[0], field))
            other.filelist.append(copy)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_archive_that_is_none_is_refused(path, tmp_path):
    bad, whole = tmp_path / "bad.pt", path.read_bytes()

    def refused(reason):
        with pytest.raises(ValueError, match=f"bad.pt is not a model that sc_noise2self saved{reason}"):
            _model.load(bad)

    for compression in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
        repacked(path, bad, compression)
        refused(": its parts are compressed")
    repacked(path, bad, twice=["0/mean.npy"])
    refused(": it has two parts of one name")
    shared(path, bad)
    refused(": its parts say that they are larger than the file")
    for n in (0, 10, len(whole) // 2, len(whole) - 10):
        bad.write_bytes(whole[:n])
        refused("")
    bad.write_text("not a model")
    refused("[.]")
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("archive/data.pkl", b"what PyTorch writes")
    refused(": it holds none, or was saved by another version")


def test_a_byte_that_changed_is_noticed_or_means_nothing(path, tmp_path):
    """Zip checks the sums of what it stores, and the rest is held against the schemas."""
    rng, whole = np.random.default_rng(0), path.read_bytes()
    n_refused = 0
    for position in rng.choice(len(whole), 400, replace=False):
        changed = bytearray(whole)
        changed[position] ^= int(rng.integers(1, 256))
        (tmp_path / "bad").write_bytes(changed)
        try:
            found = _model.load(tmp_path / "bad")
        except ValueError as error:
            n_refused += "is not a model that sc_noise2self saved" in str(error)
        else:
            same(found, saved())
    assert n_refused > 200
