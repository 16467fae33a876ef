"""The law of every way to split molecules, against SciPy's exact one; and that parts are independent.

Each test takes a chi-square or a normal statistic and refuses below p = 1e-4; seeds are fixed. A cell of the chi-square
expects at least 10 draws, where its distribution is accurate to that p.
"""

import numpy as np
import pytest
import scipy.sparse as sp
from helpers import dense
from scipy import stats

from sc_noise2self import split_molecules

LEAST_P = 1e-4
SIZE = 40_000


def split(n, size=SIZE, **options):
    """Return the parts of `size` counts of n each, shape (parts, size)."""
    x = np.full((size // 200, 200), n)
    return np.array([part.ravel() for part in split_molecules(x, **options)])


def chi_square(drawn, law):
    """Return the p-value of draws of whole numbers under a frozen SciPy distribution."""
    edges = np.unique(law.ppf(np.linspace(0, 1, min(200, len(drawn) // 100))[1:-1]))
    probabilities = np.diff(np.concatenate([[0], law.cdf(edges), [1]]))
    observed = np.bincount(np.searchsorted(edges, drawn), minlength=len(edges) + 1)
    if probabilities[-1] * len(drawn) < 10:  # no draws are wanted beyond the last edge
        observed[-2] += observed[-1]
        probabilities[-2] += probabilities[-1]
        observed, probabilities = observed[:-1], probabilities[:-1]
    few = probabilities * len(drawn) < 10
    assert probabilities[few].sum() * len(drawn) < 30
    observed = np.append(observed[~few], observed[few].sum())
    probabilities = np.append(probabilities[~few], probabilities[few].sum())
    kept = probabilities > 1e-12
    assert observed[~kept].sum() == 0
    if kept.sum() < 2:
        return 1.0
    return stats.chisquare(observed[kept], probabilities[kept] / probabilities[kept].sum() * len(drawn)).pvalue


def correlation_p(a, b):
    """Return the p-value of two samples being uncorrelated, with the variance of their own products."""
    product = (a - a.mean()) * (b - b.mean())
    return 2 * stats.norm.sf(abs(product.mean()) / (product.std() / np.sqrt(len(product))))


FRACTIONS = [0.5, 0.1, 1 / 3, 0.9]
COUNTS = [1, 2, 7, 16, 17, 63, 64, 65, 300, 10_000, 10**6]


@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_a_part_is_binomial(fraction, n):
    x1, x2 = split(n, fraction=fraction)
    np.testing.assert_array_equal(x1 + x2, n)
    assert chi_square(x1, stats.binom(n, fraction)) > LEAST_P


@pytest.mark.parametrize("n", [1, 3, 40, 1000, 10**6])
@pytest.mark.parametrize("folds", range(2, 13))
def test_every_fold_is_binomial_and_given_the_others_again(folds, n):
    parts = split(n, size=20_000, folds=folds)
    np.testing.assert_array_equal(parts.sum(axis=0), n)
    p = [chi_square(part, stats.binom(n, 1 / folds)) for part in parts]
    # Of a multinomial the sum of two parts is binomial too: that holds the covariances of all pairs.
    p += [chi_square(parts[i] + parts[j], stats.binom(n, 2 / folds)) for i in range(folds) for j in range(i)]
    assert min(p) > LEAST_P / len(p)


@pytest.mark.parametrize("n", [1, 4, 30, 500, 10**6])
@pytest.mark.parametrize("fraction", [0.5, 0.1, 0.9])
@pytest.mark.parametrize("capture", [0.05, 0.2, 0.5, 0.9])
def test_overlapping_parts_follow_two_samples_of_one_cell(capture, fraction, n):
    x1, x2 = split(n, fraction=fraction, capture=capture)
    # Batson, Royer & Webber 2019: p' + p'' - p' p'' = capture and p'' = p' (1 - s) / s.
    a = (1 - fraction) / fraction
    first = ((1 + a) - np.sqrt((1 + a) ** 2 - 4 * a * capture)) / (2 * a)
    assert ((x1 <= n) & (x2 <= n) & (x1 + x2 >= n)).all()
    p = [
        chi_square(x1, stats.binom(n, first / capture)),
        chi_square(x2, stats.binom(n, a * first / capture)),
        chi_square(x1 + x2 - n, stats.binom(n, a * first**2 / capture)),
    ]
    assert min(p) > LEAST_P / 3


@pytest.mark.parametrize("n", [1, 2, 20, 1000, 10**6])
@pytest.mark.parametrize("phi", [0.01, 0.5, 5])
@pytest.mark.parametrize("options", [{"fraction": 0.5}, {"fraction": 0.1}, {"folds": 4}])
def test_overdispersed_parts_are_beta_binomial(options, phi, n):
    parts = split(n, size=20_000, overdispersion=phi, **options)
    np.testing.assert_array_equal(parts.sum(axis=0), n)
    shares = [0.25] * 4 if "folds" in options else [options["fraction"], 1 - options["fraction"]]
    laws = [stats.betabinom(n, share / phi, (1 - share) / phi) for share in shares]
    p = [_p_of_beta_binomial(part, n, law) for part, law in zip(parts, laws, strict=True)]
    assert min(p) > LEAST_P / len(p)


def _p_of_beta_binomial(part, n, law):
    if n <= 1000:
        return stats.chisquare(
            *_binned(np.bincount(part, minlength=n + 1), law.pmf(np.arange(n + 1)) * len(part))
        ).pvalue
    # SciPy sums a beta-binomial up to every quantile; that of so many molecules is Beta to a part in a million.
    a, b = law.args[1:]
    near_ends = (part < 50) | (part > n - 50)  # where the Beta density is too steep for that
    inside = stats.beta(a, b).cdf((part[~near_ends] + 0.5) / (n + 1))
    low, high = stats.beta(a, b).cdf(np.array([50.0, n - 49.0]) / (n + 1))
    return stats.kstest((inside - low) / (high - low), "uniform").pvalue


def _binned(observed, expected):
    """Return both added up over neighbours until every bin expects 10."""
    group = np.minimum(np.cumsum(expected) // 10, expected.sum() // 10 - 1).astype(int)
    observed, expected = np.bincount(group, observed), np.bincount(group, expected)
    kept = expected > 0
    return observed[kept], expected[kept]


POISSON = [{"fraction": f} for f in FRACTIONS] + [{"folds": k} for k in range(3, 13)]


@pytest.mark.parametrize("mean", [0.1, 2, 50])
@pytest.mark.parametrize("options", POISSON, ids=str)
def test_parts_of_poisson_counts_are_independent(options, mean):
    x = np.random.default_rng(1).poisson(mean, size=(1000, 300))
    parts = [part.ravel() for part in split_molecules(x, **options)]
    shares = [1 / len(parts)] * len(parts) if "folds" in options else [options["fraction"], 1 - options["fraction"]]
    for part, share in zip(parts, shares, strict=True):
        z = (part.sum() - share * mean * x.size) / np.sqrt(share * mean * x.size)
        assert 2 * stats.norm.sf(abs(z)) > LEAST_P / len(parts)
    pairs = [(parts[i], parts[j]) for i in range(len(parts)) for j in range(i)]
    rests = [(part, x.ravel() - part) for part in parts]
    p = [correlation_p(a, b) for a, b in pairs + rests]
    # Independence, not the lack of correlation alone: squares and upper halves too.
    p += [correlation_p(a**2, b**2) for a, b in rests] + [
        correlation_p(a > np.median(a), b > np.median(b)) for a, b in rests
    ]
    assert min(p) > LEAST_P / len(p)


@pytest.mark.parametrize("options", [{}, {"fraction": 0.1}, {"folds": 5}, {"folds": 12}], ids=str)
@pytest.mark.parametrize("phi", [0.2, 1.0, 5.0])
def test_overdispersed_parts_of_negative_binomial_counts_are_independent(options, phi):
    rng = np.random.default_rng(2)
    x = rng.poisson(rng.gamma(1 / phi, phi * 2.0, size=(1000, 300)))
    parts = [part.ravel() for part in split_molecules(x, overdispersion=phi, **options)]
    p = [correlation_p(part, x.ravel() - part) for part in parts]
    p += [correlation_p(part > 0, x.ravel() - part > 0) for part in parts]
    assert min(p) > LEAST_P / len(p)


@pytest.mark.parametrize(
    "options", [{}, {"fraction": 0.9}, {"folds": 5}, {"capture": 0.3}, {"overdispersion": 1.0}], ids=str
)
@pytest.mark.parametrize("n", [1, 12, 200])
def test_parts_of_other_seeds_cells_and_genes_are_independent(options, n):
    x = np.full((400, 400), n)
    first, other = (split_molecules(x, random_state=seed, **options)[0] for seed in (3, 4))
    neighbours = [(first, other), (first[1:], first[:-1]), (first[:, 1:], first[:, :-1]), (first, first.T)]
    off_diagonal = ~np.eye(400, dtype=bool)
    p = [correlation_p(a.ravel(), b.ravel()) for a, b in neighbours[:3]]
    p.append(correlation_p(*(each[off_diagonal] for each in neighbours[3])))
    assert min(p) > LEAST_P / len(p)


@pytest.mark.parametrize("options", [{}, {"fraction": 0.9}, {"folds": 5}], ids=str)
def test_a_part_and_other_counts_are_split_independently_by_the_same_seed(options):
    x, other = (np.random.default_rng(seed).poisson(3.0, size=(1000, 300)) for seed in (1, 2))
    parts = split_molecules(x, **options)
    again = split_molecules(parts[0], **options)
    share = 1 / len(parts) if "folds" in options else options.get("fraction", 0.5)
    z = (again[0].sum() - share * parts[0].sum()) / np.sqrt(share * (1 - share) * parts[0].sum())
    assert 2 * stats.norm.sf(abs(z)) > LEAST_P
    of_others = [split_molecules(parts[1], **options)[0], split_molecules(other, **options)[1]]
    p = [correlation_p(parts[0].ravel(), each.ravel()) for each in of_others]
    p += [correlation_p(again[0].ravel(), again[1].ravel())]
    assert min(p) > LEAST_P / len(p)


@pytest.mark.parametrize(
    "options", [{}, {"fraction": 0.1}, {"folds": 7}, {"capture": 0.5}, {"overdispersion": 0.5}], ids=str
)
def test_the_same_split_for_every_piece_format_and_dtype(options):
    rng = np.random.default_rng(0)
    x = rng.poisson(rng.gamma(0.3, 20.0, size=(120, 90)))
    expected = split_molecules(x, **options)
    for dtype in ("int64", "uint16", "float32", "float64", "int32"):
        for container in (np.asarray, np.asfortranarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array, sp.csc_array):
            for part, other in zip(expected, split_molecules(container(x.astype(dtype)), **options), strict=True):
                np.testing.assert_array_equal(dense(other), part)
    for n_cells in (1, 50):
        for part, other in zip(expected, split_molecules(sp.csr_matrix(x[:n_cells]), **options), strict=True):
            np.testing.assert_array_equal(dense(other), part[:n_cells])


@pytest.mark.parametrize(
    "options", [{}, {"fraction": 0.9}, {"folds": 10}, {"overdispersion": 0.3}, {"capture": 0.2}], ids=str
)
def test_huge_counts_are_dealt_exactly(options):
    huge = np.array([[2**24 + 1, 2**31, 2**31 + 1], [2**40 + 3, 2**53 - 1, 2**53]])
    for x in (huge, huge.astype(np.uint64), huge.astype(np.float64)):
        parts = split_molecules(x, **options)
        total = sum(part.astype(np.int64) for part in parts)
        if "capture" in options:
            assert (total >= huge).all()
            assert all((part <= x).all() for part in parts)
        else:
            np.testing.assert_array_equal(total, huge)
        if "overdispersion" not in options and "capture" not in options:
            share = 1 / len(parts) if "folds" in options else options.get("fraction", 0.5)
            z = (parts[0] - share * huge) / np.sqrt(share * (1 - share) * huge)
            assert stats.chi2.sf((z**2).sum(), huge.size) > LEAST_P


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.array([[1, 2**53 + 1]]), r"9007199254740993 at cell 0, gene 1: counts are exact up to 2\^53"),
        (np.array([[2**63]], dtype=np.uint64), r"counts are exact up to 2\^53"),
        (sp.csr_matrix(np.array([[0, 1e300]])), r"counts are exact up to 2\^53"),
        (np.array([[2.0**24 + 2]], dtype=np.float32), r"16777218 at cell 0, gene 0: counts are exact up to 2\^24"),
        (np.array([[1, 2.00000001]]), "holds 2.00000001 at cell 0, gene 1: molecule splitting needs raw counts"),
        (np.array([[1e-300, 1]]), "holds 1e-300 at cell 0, gene 0: molecule splitting needs raw counts"),
    ],
)
def test_refuses_counts_that_would_not_be_exact(x, message):
    with pytest.raises(ValueError, match=message):
        split_molecules(x)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8"])
def test_narrow_integers(dtype, adata):
    import sc_noise2self as n2s

    adata.X = sp.csr_matrix(adata.X.minimum(1 if dtype == "bool" else 127), dtype=dtype)
    before = adata.X.toarray().copy()
    parts = split_molecules(adata)
    assert all(part.X.dtype == adata.X.dtype for part in parts)
    np.testing.assert_array_equal(sum(part.X.toarray().astype(int) for part in parts), before)
    null = n2s.null_counts(adata).X
    assert null.sum() == before.sum()
    np.testing.assert_array_equal(null.astype(int).sum(axis=1), before.astype(int).sum(axis=1)[:, None])


@pytest.mark.parametrize("dtype", ["uint8", "int8", "bool", "float32"])
def test_repeated_entries_add_up_whatever_the_dtype(dtype):
    x = sp.csr_matrix((np.ones(700, dtype), np.zeros(700, int), np.array([0, 300, 700])), shape=(2, 3))
    x1, x2 = split_molecules(x)
    np.testing.assert_array_equal((x1.astype(int) + x2.astype(int)).toarray(), [[300, 0, 0], [400, 0, 0]])
    assert x.nnz == 700
    assert x.dtype == dtype


@pytest.mark.parametrize("broken", ["index", "negative index", "indptr falls", "indptr too far"])
def test_a_broken_sparse_matrix_is_refused(broken):
    x = sp.csr_matrix(np.arange(12).reshape(3, 4))
    if broken.endswith("index"):
        x.indices[3] = -7 if broken.startswith("negative") else 10**6
    else:
        x.indptr[1] = 9 if broken == "indptr falls" else 10**6
    with pytest.raises(ValueError, match="the matrix is a broken sparse matrix: ind"):
        split_molecules(x)
