"""How many principal components: every rank's self-supervised loss from one factorisation per split.

Molecules are split into X1 and X2; principal components are learned from X1 and must predict X2 (`select_rank`):

* ``"loo"``: X2 is regressed on X1's left singular vectors U, and each cell is predicted by the regression of all other
  cells: the leave-one-out residual r_i / (1 - h_i), with h_i the leverage, is exact. (Without it cell i's own X2 is in
  its prediction, and the loss falls for ever.)
* ``"noise2self"``: the regression is learned on some cells and scored on the others.
* ``"bcv"``: genes are split, not molecules, and the regression B D_k^+ C is learned from other cells.
* ``"mcv"``: X1 truncated to rank k is itself the prediction.

A half sees half the molecules, so its best rank is too small for the full data. The fit to the molecules that a
component was learned from falls by I = signal + noise; the self-supervised loss by D = signal - noise. With all
molecules the noise is p times as large (p = 1/2 for halves), so the loss would fall by signal - p noise = ((1 - p) I +
(1 + p) D) / 2: the loss at full depth is that mean of the two curves.

The counts are read some eight times, a block of cells at a time. All splits and directions share the passes, and each
block is split anew every time, so that no half is ever held.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import scipy.sparse as sp

from .._blocks import Block, Chunks, Partial
from .._counts import column_sums, depth_of, row_sums
from .._random import as_key, random_groups
from .._split import halves
from .._transform import Transform, TransformName
from ._svd import components_of, start_block

Protocol = Literal["loo", "noise2self", "mcv", "bcv"]
MAX_RANK = 50  # the largest that is tried where none is given
_CELL_GROUPS = 4  # of "bcv"
_LEAST_LEFT = 1e-5  # of 1 less a leverage: less is rounding


@dataclass(frozen=True, eq=False)
class RankCurve:
    """The loss of every rank from 0 to the largest, and the choice.

    `loss` is the mean squared error per entry of X2 on the transformed scale, `error` the standard error of loss less
    the least, paired by cell; `splits` has the loss of each split and direction, shape (splits, ranks);
    `full_depth_loss` is None where the loss is not corrected. Rank 0 is the mean profile where counts are centred.
    """

    ranks: np.ndarray
    loss: np.ndarray
    error: np.ndarray
    splits: np.ndarray
    full_depth_loss: np.ndarray | None
    transform: TransformName
    center: bool

    @property
    def table(self) -> pd.DataFrame:
        table = pd.DataFrame({"rank": self.ranks, "loss": self.loss, "error": self.error})
        if self.full_depth_loss is not None:
            table["full_depth_loss"] = self.full_depth_loss
        table["chosen"] = self.ranks == self.rank
        return table

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
        return self.ranks[-1] in (self.rank, self.split_rank)

    @property
    def beats_none(self) -> bool:
        """Whether some rank beats rank 0 by more than the error."""
        return bool(self.loss[0] - self.loss.min() > self.error[0])


def rank_curve(
    chunks: Chunks,
    max_rank: int,
    rng: np.random.Generator,
    *,
    protocol: Protocol = "loo",
    transform: TransformName | None = None,
    center: bool | None = None,
    n_splits: int = 1,
    phi: np.ndarray | None = None,
) -> RankCurve:
    """Return the self-supervised loss of every rank from 0 to `max_rank`; None takes the protocol's own options.

    `phi` is the overdispersion of each gene that molecules are split with, shape (genes,).
    """
    transform = transform or ("log1p" if protocol == "loo" else "sqrt")
    center = protocol == "loo" if center is None else center
    hidden = [
        _HiddenGenes(chunks.shape, rng) if protocol == "bcv" else _HiddenMolecules(protocol, chunks.shape, rng, phi)
        for _ in range(n_splits)
    ]

    def sizes(block: Block) -> Partial:
        return Partial(rows=[size for each in hidden for size in each.sizes(block)])

    found = chunks.run(sizes).rows
    for i, each in enumerate(hidden):
        of_halves = found[2 * i : 2 * i + 2]
        if not all(size.any() for size in of_halves):
            raise ValueError(
                f"the counts hold {int(np.sum(of_halves))} molecule(s): too few to split into halves that each hold "
                f"some, which protocol {protocol!r} needs."
            )
        medians = [depth_of(size) for size in of_halves]
        each.transforms = [Transform(transform, median) for median in medians]

    def pieces(block: Block) -> list[Piece]:
        return [piece for each in hidden for piece in each.pieces(block)]

    n_seen = [n_genes for each in hidden for n_genes in each.n_seen]
    models = fit(chunks, pieces, n_seen, max_rank, protocol, center, rng)
    return _scored(chunks, pieces, models, transform, max_rank)


def learned_shape(protocol: Protocol, n_cells: int, n_genes: int) -> tuple[int, int]:
    """Return how many cells and genes components are learned from."""
    if protocol == "bcv":
        return n_cells - -(-n_cells // _CELL_GROUPS), n_genes // 2
    return n_cells - max(1, n_cells // 4) if protocol == "noise2self" else n_cells, n_genes


@dataclass(frozen=True, eq=False)
class Piece:
    """What one prediction takes from a block: components of what is seen predict the target, both transformed CSR.

    `learned` and `scored` are the cells that are learned from and that are predicted, boolean of shape (cells,).
    """

    seen: sp.csr_matrix
    target: sp.csr_matrix
    learned: np.ndarray
    scored: np.ndarray


Pieces = Callable[[Block], Sequence[Piece]]


def _only(matrix: sp.csr_matrix, rows: np.ndarray) -> sp.csr_matrix:
    """Return some rows, boolean; all of them without a copy."""
    return matrix if rows.all() else matrix[rows]


class _HiddenMolecules:
    """A split: half of the molecules, in both directions; of ``"noise2self"`` one, a quarter of the cells scored."""

    def __init__(
        self, protocol: Protocol, shape: tuple[int, int], rng: np.random.Generator, phi: np.ndarray | None
    ) -> None:
        self.transforms: Sequence[Transform] = ()
        self._phi = phi
        self._key = as_key(rng)
        self._scored: np.ndarray | None = None
        if protocol == "noise2self":
            self._scored = np.zeros(shape[0], bool)
            self._scored[rng.permutation(shape[0])[: max(1, shape[0] // 4)]] = True
        self.n_seen: Sequence[int] = [shape[1]] * (2 if self._scored is None else 1)

    def sizes(self, block: Block) -> list[np.ndarray]:
        """Return the two sizes of cells whose medians the transforms bring cells to."""
        return [row_sums(half) for half in self._halves(block)]

    def _halves(self, block: Block) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        return halves(block.counts, self._key, block.cells, self._phi)

    def pieces(self, block: Block) -> list[Piece]:
        parts = self._halves(block)
        z1, z2 = (transform.apply(part, row_sums(part)) for transform, part in zip(self.transforms, parts, strict=True))
        if self._scored is not None:
            scored = self._scored[block.cells]
            return [Piece(z1, z2, ~scored, scored)]
        every = np.ones(len(block.cells), bool)
        return [Piece(z1, z2, every, every), Piece(z2, z1, every, every)]


class _HiddenGenes:
    """A split: half of the genes in a group of cells, for every half and group."""

    def __init__(self, shape: tuple[int, int], rng: np.random.Generator) -> None:
        self.transforms: Sequence[Transform] = ()
        genes = random_groups(shape[1], 2, rng) == 0
        self._hidden = genes, ~genes
        self._group = random_groups(shape[0], _CELL_GROUPS, rng)
        self.n_seen: Sequence[int] = [int((~hidden).sum()) for hidden in self._hidden for _ in range(_CELL_GROUPS)]

    def sizes(self, block: Block) -> list[np.ndarray]:
        return [row_sums(block.counts[:, ~hidden]) for hidden in self._hidden]

    def pieces(self, block: Block) -> list[Piece]:
        out = []
        groups = self._group[block.cells]
        for hidden, transform, size in zip(self._hidden, self.transforms, self.sizes(block), strict=True):
            z = transform.apply(block.counts, size)
            seen, target = z[:, ~hidden], z[:, hidden]
            out += [Piece(seen, target, groups != group, groups == group) for group in range(_CELL_GROUPS)]
        return out


@dataclass(frozen=True, eq=False)
class Model:
    """Every rank's prediction of a target by the components of what was seen.

    From V, shape (genes seen, K), and [1, seen @ V] (without the ones where genes are not centred) `to_scores` gives
    the scores of cells, and `loadings` what each score adds to the target. With `center` the first score is that of the
    mean, which rank 0 has already.
    """

    protocol: Protocol
    components: np.ndarray
    to_scores: np.ndarray
    loadings: np.ndarray
    center: bool

    def scores(self, seen: sp.csr_matrix) -> np.ndarray:
        """Return the scores of cells, orthonormal over the cells learned from but for ``"mcv"``."""
        return _coordinates(seen, self.components, self.center) @ self.to_scores

    def losses(self, piece: Piece) -> tuple[np.ndarray, np.ndarray | None]:
        """Return squared errors per entry, shape (cells scored, ranks), and those in the sample, if it has any.

        The leave-one-out error of a cell is its residual over 1 less its leverage. A component that a cell has alone
        is none without it, so its error is then that at the last rank that other cells know of.
        """
        scores = self.scores(_only(piece.seen, piece.scored))
        first, n_genes = int(self.center), piece.target.shape[1]
        held_out = cumulative_residuals(_only(piece.target, piece.scored), scores, self.loadings)
        in_sample = None
        if self.protocol == "loo":
            in_sample = held_out.copy()
            left = 1 - np.cumsum(np.square(scores), axis=1)
            known = (left > _LEAST_LEFT).sum(axis=1, keepdims=True)
            held_out[:, 1:] /= np.maximum(left, _LEAST_LEFT) ** 2
            held_out = np.take_along_axis(held_out, np.minimum(np.arange(held_out.shape[1]), known), axis=1)
        if self.protocol == "mcv":
            in_sample = cumulative_residuals(_only(piece.seen, piece.scored), scores, self.loadings)
        return held_out[:, first:] / n_genes, None if in_sample is None else in_sample[:, first:] / n_genes


def fit(
    chunks: Chunks,
    pieces: Pieces,
    n_seen: Sequence[int],
    max_rank: int,
    protocol: Protocol,
    center: bool,
    rng: np.random.Generator,
) -> list[Model]:
    """Return the model of each prediction, all learned in the same passes; `n_seen` genes are seen by each."""
    means: Sequence[np.ndarray | None] = [None] * len(n_seen)
    mean_rows = means
    if center:
        means, mean_rows = _means(chunks, pieces)

    def seen(block: Block) -> list[sp.csr_matrix]:
        return [_only(piece.seen, piece.learned) for piece in pieces(block)]

    starts = [start_block(n_genes, max_rank, rng) for n_genes in n_seen]
    components = [v for _, v in components_of(chunks, seen, starts, max_rank, mean_rows=mean_rows)]
    if protocol == "mcv":
        return [_truncation(v, mean) for v, mean in zip(components, means, strict=True)]

    def of_regression(block: Block) -> Partial:
        sums = []
        for piece, v in zip(pieces(block), components, strict=True):
            found = _coordinates(_only(piece.seen, piece.learned), v, center)
            sums += [found.T @ found, _only(piece.target, piece.learned).T @ found]
        return Partial(sums)

    sums = chunks.run(of_regression).sums
    transforms = [_orthonormalising(squares) for squares in sums[::2]]
    return [
        Model(protocol, v, t, (products @ t).T, center)
        for v, t, products in zip(components, transforms, sums[1::2], strict=True)
    ]


def _means(chunks: Chunks, pieces: Pieces) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return the mean cell that each prediction learns from, and q'Z, with q the unit vector of even weights."""

    def of_block(block: Block) -> Partial:
        found = pieces(block)
        totals = [column_sums(_only(piece.seen, piece.learned)) for piece in found]
        return Partial([*totals, np.array([piece.learned.sum() for piece in found])])

    *totals, n_cells = chunks.run(of_block).sums
    means = [total / n for total, n in zip(totals, n_cells, strict=True)]
    return means, [mean * n**0.5 for mean, n in zip(means, n_cells, strict=True)]


def _coordinates(seen: sp.csr_matrix, components: np.ndarray, center: bool) -> np.ndarray:
    """Return seen @ V, float64, after a column of ones where genes are centred."""
    found = np.asarray(seen @ components, dtype=np.float64)
    return np.column_stack([np.ones(len(found)), found]) if center else found


def _orthonormalising(gram: np.ndarray) -> np.ndarray:
    """Return T, upper triangular, such that P T has orthonormal columns, from P'P (Gram and Schmidt).

    The first columns of P T span what the first of P span. Columns without a part beyond those before give 0.
    """
    out = np.zeros_like(gram)
    for j in range(len(gram)):
        beyond = np.eye(len(gram))[j] - out @ (out.T @ gram[:, j])
        square = beyond @ gram @ beyond
        if square > 1e-9 * gram[j, j]:
            out[:, j] = beyond / square**0.5
    return out


def _truncation(v: np.ndarray, mean: np.ndarray | None) -> Model:
    """Return the model that predicts the target by what was seen, cut to the first components beyond the mean."""
    if mean is None:
        return Model("mcv", v, np.eye(v.shape[1]), v.T, center=False)
    to_scores = np.eye(1 + v.shape[1])
    to_scores[0, 1:] = -(mean @ v)
    return Model("mcv", v, to_scores, np.vstack([mean, v.T]), center=True)


def _scored(
    chunks: Chunks, pieces: Pieces, models: Sequence[Model], transform: TransformName, max_rank: int
) -> RankCurve:
    """Return the curve: one pass.

    Errors are paired by cell: what is summed are the products of the losses' differences to that of rank 0, from
    which the variance of any difference follows.
    """
    center, corrected = models[0].center, models[0].protocol in ("loo", "mcv")

    def of_block(block: Block) -> Partial:
        n_cells = len(block.cells)
        total, times = np.zeros((n_cells, max_rank + 1)), np.zeros(n_cells)
        splits, in_samples = np.zeros((len(models), max_rank + 1)), np.zeros(max_rank + 1)
        counted = np.zeros(len(models))
        for i, (piece, model) in enumerate(zip(pieces(block), models, strict=True)):
            held_out, in_sample = model.losses(piece)
            total[piece.scored] += held_out
            times += piece.scored
            splits[i] = held_out.sum(axis=0)
            counted[i] = len(held_out)
            if in_sample is not None:
                in_samples += in_sample.sum(axis=0)
        losses = total[times > 0] / times[times > 0, None]
        differences = losses - losses[:, :1]
        n = np.array(len(losses))
        return Partial([splits, counted, in_samples, losses.sum(axis=0), differences.T @ differences, n])

    splits, counted, in_samples, losses, products, n_cells = chunks.run(of_block).sums
    loss = losses / n_cells
    full = (in_samples / counted.sum() + 3 * loss) / 4 if corrected else None
    error = paired_errors(loss, products, float(n_cells))
    by_split = splits[counted > 0] / counted[counted > 0, None]  # of three cells or fewer, some groups have none
    return RankCurve(np.arange(max_rank + 1), loss, error, by_split, full, transform, center)


def cumulative_residuals(target: sp.csr_matrix, scores: np.ndarray, loadings: np.ndarray) -> np.ndarray:
    """Return each cell's squared error when `target` is predicted by the first 0, 1, ..., K scores and loadings.

    With A the scores and C the loadings, M = target C' and G = C C':
    |r_i(k)|^2 = |x_i|^2 - 2 sum_{j<=k} A_ij M_ij + sum_{j,l<=k} A_ij A_il G_jl, of shape (cells, K + 1).
    Sparse products only; nothing of size cells x genes is formed.
    """
    a = scores.astype(np.float64)
    m = np.asarray(target @ np.ascontiguousarray(loadings.T), dtype=np.float64)
    gram = loadings.astype(np.float64) @ loadings.T.astype(np.float64)
    # What component k adds to the quadratic form: its products with the components before it, twice, and its square.
    adds = a * (2 * (a @ np.triu(gram, 1)) + a * np.diag(gram)) - 2 * a * m
    return row_square_sums(target)[:, None] + np.concatenate([np.zeros((len(a), 1)), np.cumsum(adds, axis=1)], axis=1)


def row_square_sums(matrix: sp.csr_matrix, block: int = 256) -> np.ndarray:
    """Return the squared norm of each row of a CSR matrix, float64, by blocks of rows."""
    out = np.empty(matrix.shape[0])
    for start in range(0, matrix.shape[0], block):
        ends = matrix.indptr[start : start + block + 1]
        rows = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
        squares = matrix.data[ends[0] : ends[-1]].astype(np.float64) ** 2
        out[start : start + block] = np.bincount(rows, weights=squares, minlength=len(ends) - 1)
    return out


def paired_errors(loss: np.ndarray, products: np.ndarray, n_cells: float) -> np.ndarray:
    """Return the standard error of each candidate's mean loss less the least one's, paired by cell; infinite of one.

    `products` are D'D, with D the cells' losses less that of one of the candidates: sums over cells from which the
    variance of any difference follows.
    """
    if n_cells < 2:
        return np.full(len(loss), np.inf)
    best = int(np.argmin(loss))
    squares = np.diag(products) + products[best, best] - 2 * products[best]
    variance = (squares - n_cells * (loss - loss[best]) ** 2) / (n_cells - 1)
    variance[best] = 0
    return np.sqrt(np.maximum(variance, 0) / n_cells)
