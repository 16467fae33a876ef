"""Molecule splitting: exact, independent, and nothing but the counts decides what it accepts."""

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from helpers import dense

from sc_noise2self import split_molecules
from sc_noise2self._split import overlap_probabilities

DTYPES = ["float32", "float64", "int64", "int32", "uint16", "uint8"]


@pytest.fixture
def counts():
    rng = np.random.default_rng(3)
    return rng.poisson(rng.gamma(0.5, 2.0, size=(60, 40)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"fraction": 0.9}, {"folds": 4}, {"overdispersion": 0.7}])
def test_parts_add_up_exactly_and_keep_type_and_dtype(counts, array_type, dtype, options):
    x = array_type(counts.astype(dtype))
    before = dense(x).copy()
    parts = split_molecules(x, **options)
    assert len(parts) == options.get("folds", 2)
    assert all(type(part) is type(x) and part.dtype == x.dtype for part in parts)
    assert all((dense(part) <= before).all() for part in parts)
    np.testing.assert_array_equal(sum(dense(part).astype(np.int64) for part in parts), before)
    np.testing.assert_array_equal(dense(x), before)
    if sp.issparse(x):
        assert all((part.data > 0).all() and part.has_canonical_format for part in parts)


def test_read_only_input(counts, array_type):
    x = array_type(counts)
    for array in (x.data, x.indices, x.indptr) if sp.issparse(x) else (x,):
        array.flags.writeable = False
    split_molecules(x)


@pytest.mark.parametrize(("fraction", "n"), [(0.5, 1), (0.5, 7), (0.5, 8), (0.5, 9), (0.3, 1), (0.3, 6)])
def test_binomial_distribution(fraction, n):
    x1, _ = split_molecules(np.full((200, 500), n), fraction)
    size = x1.size
    mean, variance = n * fraction, n * fraction * (1 - fraction)
    assert abs(x1.mean() - mean) < 5 * np.sqrt(variance / size)
    # The variance of a sample variance is at most (fourth moment) / size <= (variance + 3 variance^2) / size.
    assert abs(x1.var() - variance) < 5 * np.sqrt((variance + 3 * variance**2) / size)
    expected = np.array([np.prod([(n - j) / (j + 1) for j in range(k)]) for k in range(n + 1)])
    expected *= fraction ** np.arange(n + 1) * (1 - fraction) ** (n - np.arange(n + 1)) * size
    observed = np.bincount(x1.ravel(), minlength=n + 1)
    assert ((observed - expected) ** 2 / expected).sum() < n + 6 * np.sqrt(2 * n)


def test_poisson_halves_are_uncorrelated():
    x = np.random.default_rng(0).poisson(1.5, size=(1000, 300))
    x1, x2 = split_molecules(x)
    assert abs(np.corrcoef(x1.ravel(), x2.ravel())[0, 1]) < 5 / np.sqrt(x.size)


def test_overdispersed_halves_are_uncorrelated_with_dirichlet_multinomial_alone():
    phi = np.linspace(0.2, 2.0, 300)
    rng = np.random.default_rng(0)
    x = rng.poisson(rng.gamma(1 / phi, phi * 2.0, size=(2000, 300)))

    def correlation(parts):
        a, b = (part - part.mean(axis=0) for part in parts)
        return (a * b).mean() / np.sqrt((a**2).mean() * (b**2).mean())

    # Heavy tails widen the error of a correlation; five times that of normal data leaves room for kurtosis.
    assert abs(correlation(split_molecules(x, overdispersion=phi))) < 5 * 5 / np.sqrt(x.size)
    assert correlation(split_molecules(x)) > 0.3


@pytest.mark.parametrize("dtype", ["csr", "csc", "dense"])
def test_overdispersion_follows_the_gene(dtype):
    x = np.full((4000, 3), 20)
    x = {"csr": sp.csr_matrix, "csc": sp.csc_matrix, "dense": np.asarray}[dtype](x)
    x1, _ = split_molecules(x, overdispersion=np.array([0.0, 0.1, 10.0]))
    spread = dense(x1).var(axis=0)
    # Beta-binomial with a = b = 1 / 2 phi: variance n/4 (n + 1/phi) / (1 + 1/phi); binomial n/4 where phi = 0.
    np.testing.assert_allclose(spread, [5, 5 * 30 / 11, 5 * 20.1 / 1.1], rtol=0.1)


@pytest.mark.parametrize(
    ("fraction", "capture", "expected"),
    [(0.9, 0.2, (0.9168, 0.1019, 0.0187)), (0.5, 0.2, (0.5279, 0.5279, 0.0557)), (0.7, 1e-9, (0.7, 0.3, 0))],
)
def test_capture_fraction(fraction, capture, expected):
    np.testing.assert_allclose(overlap_probabilities(fraction, capture), expected, atol=5e-5)
    x = np.random.default_rng(0).poisson(3.0, size=(500, 400))
    x1, x2 = split_molecules(x, fraction, capture=capture)
    assert ((x1 <= x) & (x2 <= x) & (x1 + x2 >= x)).all()
    total = x.sum()
    found = [x1.sum() / total, x2.sum() / total, (x1 + x2 - x).sum() / total]
    np.testing.assert_allclose(found, expected, atol=5 * 0.5 / np.sqrt(total))


def test_same_seed_same_parts_and_generators_move_on(counts):
    a, b = (split_molecules(counts, random_state=7)[0] for _ in range(2))
    np.testing.assert_array_equal(a, b)
    rng = np.random.default_rng(7)
    np.testing.assert_array_equal(split_molecules(counts, random_state=rng)[0], a)
    assert (split_molecules(counts, random_state=rng)[0] != a).any()


def test_blocks_and_empty_rows_leave_nothing_out(monkeypatch):
    from sc_noise2self import _split as split

    x = sp.random(50, 30, 0.2, format="csr", random_state=0)
    x.data = np.ceil(x.data * 12)
    x = sp.vstack([sp.csr_matrix((3, 30)), x, sp.csr_matrix((4, 30))]).tocsr()
    monkeypatch.setattr(split, "_BLOCK", 7)
    for matrix in (x, x.tocsc()):
        x1, x2 = split_molecules(matrix, 0.3)
        np.testing.assert_array_equal((x1 + x2).toarray(), x.toarray())


def test_repeated_entries_are_one_entry():
    x = sp.csr_matrix((np.ones(3), np.array([0, 0, 1]), np.array([0, 3])), shape=(1, 2))
    x1, x2 = split_molecules(x)
    np.testing.assert_array_equal((x1 + x2).toarray(), [[2, 1]])
    assert x.nnz == 3


def test_anndata(adata):
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.copy() * 0.5
    adata.obs["group"] = "a"
    x1, x2 = split_molecules(adata, layer="counts")
    assert isinstance(x1, ad.AnnData)
    assert (adata.layers["counts"] != x1.X + x2.X).nnz == 0
    assert list(x1.obs) == ["group"]
    assert list(x1.var_names) == list(adata.var_names)
    x1.obs["group"] = "b"
    assert (adata.obs["group"] == "a").all()


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        (
            np.array([[1, 2.5]]),
            ValueError,
            "holds 2.5 at cell 0, gene 1: molecule splitting needs raw counts",
        ),
        (np.array([[1, -2]]), ValueError, "holds -2 at cell 0, gene 1"),
        (np.array([[1, np.nan]]), ValueError, "holds nan at cell 0, gene 1"),
        (sp.csr_matrix([[0, 1], [0, np.inf]]), ValueError, "holds inf at cell 1, gene 1"),
        (sp.csc_matrix([[0, 1], [3, 0.1]]), ValueError, "holds 0.1 at cell 1, gene 1"),
        (np.zeros((2, 2)), ValueError, "holds no molecule"),
        (sp.csr_matrix((2, 2)), ValueError, "holds no molecule"),
        (np.ones(3), TypeError, "1 dimension"),
        (np.array([["a"]]), TypeError, "counts are numbers"),
        (sp.coo_matrix(np.ones((2, 2))), TypeError, "tocsr"),
        ([[1, 2]], TypeError, "NumPy array"),
    ],
)
def test_refuses_what_is_not_counts(counts, error, message):
    with pytest.raises(error, match=message):
        split_molecules(counts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0}, "fraction is 0: pass a number between 0 and 1"),
        ({"fraction": "half"}, "fraction is 'half'"),
        ({"folds": 1}, "folds is 1: pass a whole number of parts, 2 or more"),
        ({"folds": 2, "fraction": 0.3}, "folds and fraction were both given"),
        ({"folds": 2, "capture": 0.3}, "folds and capture were both given"),
        ({"capture": 0.3, "overdispersion": 1}, "capture and overdispersion were both given"),
        ({"capture": 1.5}, "capture is 1.5"),
        ({"overdispersion": -1.0}, "negative"),
        ({"overdispersion": np.ones(3)}, "one per gene"),
        ({"random_state": -1}, "a seed is 0 or more"),
        ({"layer": "counts"}, "names a layer of an AnnData object"),
    ],
)
def test_refuses_options_out_of_range(counts, options, message):
    with pytest.raises(ValueError, match=message):
        split_molecules(counts, **options)


def test_refuses_overdispersion_that_is_no_number(counts):
    with pytest.raises(TypeError, match="overdispersion is 'a': pass one number"):
        split_molecules(counts, overdispersion="a")


def test_refuses_a_string_seed(counts):
    with pytest.raises(TypeError, match="random_state is 'abc': pass a whole number"):
        split_molecules(counts, random_state="abc")
