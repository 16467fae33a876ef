"""ALRA (Linderman et al. 2022, Nature Communications 13:192), rewritten in numpy after the authors' description.

    python run_alra.py IN.h5ad OUT.npy

log1p of counts at 10 000 per cell; rank = the last spacing of singular values that exceeds the mean of the spacings
80 to 99 by six of their standard deviations; each gene's values at or below the size of its 0.1 % quantile become 0;
the others are brought to the mean and standard deviation of the gene's observed non-zero values; observed values that
ended as 0 are put back. Tested with scikit-learn 1.9.1. Requires: scikit-learn anndata.
"""

import sys

import anndata as ad
import numpy as np
from sklearn.utils.extmath import randomized_svd


def nonzero_moments(x):
    """Return mean and sample standard deviation of the non-zero values of every column."""
    number = (x != 0).sum(axis=0)
    mean = x.sum(axis=0) / np.maximum(number, 1)
    square = (x**2).sum(axis=0) - number * mean**2
    return mean, np.sqrt(np.maximum(square, 0) / np.maximum(number - 1, 1)), number


def main() -> None:
    """Denoise one file."""
    counts = ad.read_h5ad(sys.argv[1]).X.toarray().astype(np.float64)
    observed = np.log1p(counts * (1e4 / np.maximum(counts.sum(axis=1, keepdims=True), 1)))
    values = randomized_svd(observed, 100, n_iter=2, random_state=0)[1]
    spacing = -np.diff(values)
    noise = spacing[78:]
    rank = 1 + int(np.flatnonzero(spacing > noise.mean() + 6 * noise.std(ddof=1))[-1])
    u, s, vt = randomized_svd(observed, rank, n_iter=10, random_state=0)
    low = (u * s) @ vt
    low[low <= np.abs(np.quantile(low, 0.001, axis=0))] = 0
    mean, sd, number = nonzero_moments(low)
    mean_observed, sd_observed, number_observed = nonzero_moments(observed)
    rescale = (number > 1) & (number_observed > 1) & (sd > 0)
    factor = np.where(rescale, sd_observed / np.where(rescale, sd, 1), 1)
    shift = np.where(rescale, mean_observed - mean * factor, 0)
    denoised = np.where(low == 0, 0, np.maximum(low * factor + shift, 0))
    denoised = np.where((observed > 0) & (denoised == 0), observed, denoised)
    print(f"note: rank {rank}")
    np.save(sys.argv[2], np.expm1(denoised).astype(np.float32))


if __name__ == "__main__":
    main()
