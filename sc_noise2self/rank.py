"""How many principal components: every rank's self-supervised loss from one factorisation per split.

Molecules are split into X1 and X2; principal components are learned from X1 and must predict X2. Four protocols differ
in what predicts:

* ``"loo"``: X2 is regressed on X1's left singular vectors U, and each cell is predicted by the regression of all other
  cells: the leave-one-out residual r_i / (1 - h_i), with h_i the leverage, is exact, so no cells are set aside.
  (Without it cell i's own X2 is in its prediction, and the loss falls for ever.)
* ``"noise2self"``: the protocol of Noise2Self (Batson & Royer 2019), Figure 3: square roots, uncentred; the
  regression is learned on three quarters of the cells and scored on the rest, one direction.
* ``"bcv"``: genes are split, not molecules (bi-cross-validation, Owen & Perry 2009): one half of the genes in a quarter
  of the cells is predicted from the other half of the genes, by the regression learned from the other cells, B D_k^+ C.
  Square roots, uncentred; cells are brought to one depth by the genes that predict.
* ``"mcv"``: X1 truncated to rank k is itself the prediction of X2 (molecular cross-validation, Batson, Royer & Webber
  2019); square roots, uncentred.

Depth. A half sees half the molecules, so its best rank is too small for the full data. The fit to the molecules
that a component was learned from falls by I = signal + noise; the self-supervised loss by D = signal - noise. With
all molecules the noise is p times as large (p = 1/2 for halves), so the loss would fall by signal - p noise = ((1 -
p) I + (1 + p) D) / 2: the loss at full depth is that mean of the two curves. For ``"mcv"`` this is the rule to keep
a component whose weight 1 / (1 + p (1/c - 1)) exceeds 1/2, with c its least-squares weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.sparse as sp

from .counts import row_sums
from .denoisers.svd import truncated_svd
from .loss import cumulative_residuals, paired_errors
from .split import split_matrix
from .transform import Transform, TransformName

Protocol = Literal["loo", "noise2self", "mcv", "bcv"]
_CELL_GROUPS = 4  # of "bcv"


@dataclass(frozen=True, eq=False)
class RankCurve:
    """The loss of every rank, and the choice.

    Attributes
    ----------
    ranks
        0, 1, ..., max_rank; 0 is the mean profile where the counts are centred, nothing where they are not.
    loss
        Mean squared error per entry of X2 on the transformed scale, mean over splits and directions, shape (ranks,).
    error
        Standard error of loss less the smallest loss, paired by cell, shape (ranks,).
    splits
        The loss of each split and direction, shape (splits, ranks).
    full_depth_loss
        The loss corrected to the depth of the full data, shape (ranks,); None for ``"noise2self"`` and ``"bcv"``.
    transform, center
        What the loss was measured on.
    """

    ranks: np.ndarray
    loss: np.ndarray
    error: np.ndarray
    splits: np.ndarray
    full_depth_loss: np.ndarray | None
    transform: TransformName
    center: bool

    @property
    def split_rank(self) -> int:
        """The rank of least self-supervised loss, at the depth of a half."""
        return int(self.ranks[np.argmin(self.loss)])

    @property
    def rank(self) -> int:
        """The rank for the full data: of least loss at full depth, or as it is where it is not corrected."""
        if self.full_depth_loss is None:
            return self.split_rank
        return int(self.ranks[np.argmin(self.full_depth_loss)])

    @property
    def within_one_error(self) -> np.ndarray:
        """Ranks whose loss is within one standard error of the least: the basin is flat."""
        return self.ranks[self.loss - self.loss.min() <= self.error]

    @property
    def at_edge(self) -> bool:
        """Whether the loss still fell at the largest rank tried."""
        return self.rank == self.ranks[-1] or self.split_rank == self.ranks[-1]

    @property
    def beats_none(self) -> bool:
        """Whether some rank beats rank 0 by more than the error."""
        return bool(self.loss[0] - self.loss.min() > self.error[0])


def rank_curve(
    counts: sp.csr_matrix,
    max_rank: int,
    rng: np.random.Generator,
    *,
    protocol: Protocol = "loo",
    transform: TransformName | None = None,
    center: bool | None = None,
    n_splits: int = 1,
    on_step: Callable[[], object] = lambda: None,
) -> RankCurve:
    """Return the self-supervised loss of every rank from 0 to `max_rank`.

    Parameters
    ----------
    counts
        CSR, cells x genes.
    max_rank
        Largest rank tried, at most min(cells, genes) - 1 of `learned_shape`.
    protocol, transform, center
        See the module; None takes the protocol's own: log1p and centred for ``"loo"``, sqrt and uncentred else.
    n_splits
        Independent splits averaged; each is used in both directions but by ``"noise2self"``.
    on_step
        Called `n_steps(protocol)` times a split.
    """
    transform = transform or ("log1p" if protocol == "loo" else "sqrt")
    center = protocol == "loo" if center is None else center
    n_cells = counts.shape[0]
    total = np.zeros((n_cells, max_rank + 1))
    in_sample = np.zeros(max_rank + 1)
    scored = np.zeros(n_cells)
    splits = []
    for _ in range(n_splits):
        for losses in _losses(counts, protocol, transform, max_rank, center, rng):
            total[losses.cells] += losses.held_out
            scored[losses.cells] += 1
            splits.append(losses.held_out.mean(axis=0))
            if losses.in_sample is not None:
                in_sample += losses.in_sample
            on_step()
    per_cell = total[scored > 0] / scored[scored > 0, None]
    loss = per_cell.mean(axis=0)
    full = None if protocol in ("noise2self", "bcv") else (in_sample / len(splits) + 3 * loss) / 4
    error = paired_errors(per_cell, int(np.argmin(loss)))
    return RankCurve(np.arange(max_rank + 1), loss, error, np.array(splits), full, transform, center)


@dataclass(frozen=True, eq=False)
class _Losses:
    """Squared errors per entry of every rank: of the cells scored, and, where learned from, the mean over cells."""

    cells: np.ndarray | slice
    held_out: np.ndarray
    in_sample: np.ndarray | None


def _leave_one_out(
    z1: sp.csr_matrix, z2: sp.csr_matrix, max_rank: int, center: bool, rng: np.random.Generator
) -> _Losses:
    offset = _offset(z1, center)
    u, _, _ = truncated_svd(z1, max_rank, rng, offset=offset)
    scores = u if offset is None else np.column_stack([offset, u])
    residual = cumulative_residuals(z2, scores, (z2.T @ scores).T)
    leverage = np.cumsum(np.square(scores, dtype=np.float64), axis=1)
    held_out = residual.copy()
    held_out[:, 1:] /= (1 - leverage) ** 2
    first = 0 if offset is None else 1
    n_genes = z2.shape[1]
    return _Losses(slice(None), held_out[:, first:] / n_genes, residual[:, first:].mean(axis=0) / n_genes)


def _quarter(z1: sp.csr_matrix, z2: sp.csr_matrix, max_rank: int, center: bool, rng: np.random.Generator) -> _Losses:
    scored = np.sort(rng.permutation(z1.shape[0])[: max(1, z1.shape[0] // 4)])
    return _held_out_cells(z1, z2, scored, max_rank, center, rng)


def _held_out_cells(
    z1: sp.csr_matrix, z2: sp.csr_matrix, scored: np.ndarray, max_rank: int, center: bool, rng: np.random.Generator
) -> _Losses:
    """Predict z2 of some cells from their z1 by the regression of the others."""
    learned = np.setdiff1d(np.arange(z1.shape[0]), scored)
    train, valid = z1[learned], z1[scored]
    offset = _offset(train, center)
    u, s, v = truncated_svd(train, max_rank, rng, offset=offset)
    predictor = np.asarray(valid @ v)
    if offset is not None:
        predictor -= (train.T @ offset @ v) * offset[0]  # the mean cell's coordinates
    scores, basis = predictor / np.where(s > 0, s, 1), u
    if offset is not None:
        scores, basis = np.column_stack([np.full(len(scored), offset[0]), scores]), np.column_stack([offset, u])
    residual = cumulative_residuals(z2[scored], scores, (z2[learned].T @ basis).T)
    return _Losses(scored, residual[:, 0 if offset is None else 1 :] / z2.shape[1], None)


def _truncation(z1: sp.csr_matrix, z2: sp.csr_matrix, max_rank: int, center: bool, rng: np.random.Generator) -> _Losses:
    offset = _offset(z1, center)
    u, s, v = truncated_svd(z1, max_rank, rng, offset=offset)
    scores, loadings = u * s, v.T
    if offset is not None:
        scores, loadings = np.column_stack([offset, scores]), np.vstack([z1.T @ offset, loadings])
    first = 0 if offset is None else 1
    in_sample, held_out = (cumulative_residuals(z, scores, loadings)[:, first:] / z2.shape[1] for z in (z1, z2))
    return _Losses(slice(None), held_out, in_sample.mean(axis=0))


_PREDICTORS = {"loo": _leave_one_out, "noise2self": _quarter, "mcv": _truncation}


def n_steps(protocol: Protocol) -> int:
    """Return how many times something is predicted in a split."""
    return {"loo": 2, "noise2self": 1, "mcv": 2, "bcv": 2 * _CELL_GROUPS}[protocol]


def learned_shape(protocol: Protocol, n_cells: int, n_genes: int) -> tuple[int, int]:
    """Return how many cells and genes components are learned from."""
    if protocol == "bcv":
        return n_cells - -(-n_cells // _CELL_GROUPS), n_genes // 2
    return n_cells - max(1, n_cells // 4) if protocol == "noise2self" else n_cells, n_genes


def _losses(
    counts: sp.csr_matrix,
    protocol: Protocol,
    transform: TransformName,
    max_rank: int,
    center: bool,
    rng: np.random.Generator,
) -> Iterator[_Losses]:
    """Yield what every prediction of a split loses."""
    if protocol == "bcv":
        genes, groups = rng.permutation(counts.shape[1]) % 2 == 0, rng.permutation(counts.shape[0]) % _CELL_GROUPS
        for hidden in (genes, ~genes):
            z = _transformed(counts, transform, row_sums(counts[:, ~hidden]))
            for group in range(_CELL_GROUPS):
                scored = np.flatnonzero(groups == group)
                yield _held_out_cells(z[:, ~hidden], z[:, hidden], scored, max_rank, center, rng)
        return
    parts = list(split_matrix(counts, random_state=rng))
    first, second = (_transformed(parts.pop(0), transform) for _ in range(2))  # let go of each half in turn
    for z1, z2 in [(first, second), (second, first)][: n_steps(protocol)]:
        yield _PREDICTORS[protocol](z1, z2, max_rank, center, rng)


def _transformed(part: sp.csr_matrix, transform: TransformName, size: np.ndarray | None = None) -> sp.csr_matrix:
    size = row_sums(part) if size is None else size
    return Transform(transform, float(np.median(size[size > 0]))).apply(part, size)


def _offset(z: sp.csr_matrix, center: bool) -> np.ndarray | None:
    return np.full(z.shape[0], z.shape[0] ** -0.5, dtype=z.dtype) if center else None
