"""An autoencoder trained to predict some of a cell's molecules from the others, its width chosen by the same loss.

Every step deals the molecules of a batch of cells anew to a part that the network sees and a part that it must
predict (Noise2Self, Batson & Royer 2019, section 3.1, with unlimited splits); one fixed split would be learned by
heart. A tenth of the molecules of some cells is never trained on: its held-out gain says when to stop, which state
was best, and which width.

PyTorch is imported when it is used, not before.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from numbers import Integral, Real
from threading import Lock
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import scipy.sparse as sp

from .. import _model
from .._blocks import Block, Survey
from .._counts import column_sums, row_sums
from .._loss import Gain, held_out_gain, held_out_probabilities
from .._model import Saved, State
from .._random import RandomState, as_generator
from .._threads import in_threads
from .._transform import Link
from ._pca import PCADenoiser
from ._profiles import LowRankProfiles, profiles_in_blocks

if TYPE_CHECKING:
    import torch

    from ._network import Network, PrincipalScores
    from ._training import History

LossName = Literal[
    "multinomial",
    "poisson",
    "negative_binomial",
    "masked_multinomial",
    "mse_log1p",
    "mse_sqrt",
    "noise2same_log1p",
    "noise2same_sqrt",
]
WIDTHS = (128, 32, 8, 2)
"""Widths that are compared unless others are given."""

FURTHER = ("n_hidden", "dropout", "learning_rate", "invariance", "prior_scale", "n_epochs", "batch_size")
"""Parameters that can be left as they are."""

_ASIDE = 0.1  # share of the molecules set aside, in the cells that have some set aside
_ASIDE_ENTRIES = 20_000_000  # dense entries of those cells
_CHECKED_ENTRIES = 5_000_000  # and of those predicted while training goes on
_COMPONENT_CELLS = 50_000  # principal components are learned from so many cells at most
_CELLS_SHOWN = 60_000  # in training, over all epochs, as far as these bounds allow
_LEAST_EPOCHS, _MOST_EPOCHS = 12, 100
_PREDICTED = 1024  # cells predicted at a time
_SEEDS_DIFFER = 0.01  # of the gain
_SCALED_CELLS = 20_000  # that the scales of genes are learned from, at most
_LEAST_SPREAD = 0.01  # of the first score, in lengths of the mean cell
_TRAINING = Lock()  # its random numbers are those of the process
_PARAMETERS = ("loss", "n_components", "n_batches", *FURTHER)
# Whose rate, scaled and added over genes, is far from float32's end; log rates may have any level that it resolves.
_LARGEST_OUTPUT = {"exp": 1e4, "log1p": 60.0, "sqrt": 1e12, "none": 1e12}
_FITTED = ("width", "link", "depth")
_OF_GENES = ("gene_share", "gene_scale")


class Autoencoder:
    """Autoencoder on the principal scores of a cell, trained on fresh molecule splits.

    Parameters
    ----------
    widths
        Of the bottleneck, tried from the widest to the first whose gain on molecules set aside is below the best by
        more than one paired standard error and more than 1 %; the narrowest that is not is kept.
    loss
        `"multinomial"`, nats per held-out molecule; `"poisson"`; `"negative_binomial"`, with a dispersion per gene;
        `"masked_multinomial"`, genes instead of molecules are hidden (Noise2Self, Noise2Void);
        `"mse_log1p"` and `"mse_sqrt"`, squared errors on that scale; `"noise2same_log1p"` and `"noise2same_sqrt"`,
        see `sc_noise2self.methods._network_losses`.
    n_hidden
        Units of the hidden layers on both sides of the bottleneck. None takes twice the width, at least 64.
    n_components
        Principal scores that a cell enters by.
    dropout
        Share of the encoder's hidden units dropped in training.
    learning_rate
        Of Adam, at the start; it falls to 0 by a cosine.
    invariance
        Weight of Noise2Same's invariance term, in units of the noise's standard deviation. The theorem has 2, which
        allows for more copying than a bottleneck can do: on PBMC 3k 2 gained .119, .5 .130, 0 .132 nats per molecule.
    prior_scale
        Standard deviation of the Gaussian prior on the weights of each gene. Against the likelihood of the gene's own
        molecules it keeps a rare gene near its mean and lets an abundant one go where its molecules say.
    n_batches
        Batches known to the decoder; 0 without a batch covariate.
    n_epochs
        At most. None takes as many as show 60 000 cells, at least 12 and at most 100.
    batch_size
        Cells a step. None takes 128; on CUDA more for many cells, up to 4096.
    device
        `"auto"`, CUDA where there is one; `"cpu"`; or any that PyTorch knows.
    random_state
        Seed or generator.
    on_check
        Called with (width, epochs, epoch, gain) after each check of the molecules set aside.

    Attributes
    ----------
    width_
        The width kept.
    tried_
        The widths tried.
    gains_
        The gain of each of them on the molecules set aside, a `Gain` each.
    histories_
        How each width was learned, a `History` each.
    network_
        The `Network` in its best state.
    feature_names_in_, batch_names_
        Names of genes and batches, saved with the rest where the caller has set them.
    link_, depth_
        How its output becomes rates, see `sc_noise2self._transform.rates`, and the depth of a square root.
    gene_share_, gene_scale_
        The share of all molecules that each gene has, and what the output must be multiplied by to give it that share,
        shape (genes,); 1 for a likelihood, which learns it.

    Notes
    -----
    The same seed gives the same bytes on the same machine with the same number of threads.
    """

    feature_names_in_: np.ndarray
    batch_names_: np.ndarray

    def __init__(
        self,
        widths: Sequence[int] = WIDTHS,
        *,
        loss: LossName = "multinomial",
        n_hidden: int | None = None,
        n_components: int = 100,
        dropout: float = 0.1,
        learning_rate: float = 7e-3,
        invariance: float = 0.5,
        prior_scale: float = 0.08,
        n_batches: int = 0,
        n_epochs: int | None = None,
        batch_size: int | None = None,
        device: str = "auto",
        random_state: RandomState = 0,
        on_check: Callable[[int, int, int, float], object] = lambda *_: None,
    ) -> None:
        self.widths = widths
        self.loss = loss
        self.n_hidden = n_hidden
        self.n_components = n_components
        self.dropout = dropout
        self.learning_rate = learning_rate
        self.invariance = invariance
        self.prior_scale = prior_scale
        self.n_batches = n_batches
        self.n_epochs = n_epochs
        self.batch_size = batch_size
        self.device = device
        self.random_state = random_state
        self.on_check = on_check

    def fit(
        self,
        counts: sp.csr_matrix,
        genes: np.ndarray | None = None,
        batch: np.ndarray | None = None,
        *,
        survey: Survey | None = None,
        cells: np.ndarray | None = None,
    ) -> Self:
        """Learn from counts, CSR of shape (cells, genes).

        Parameters
        ----------
        genes
            Boolean, shape (genes,): the genes that a cell enters by. None uses all.
        batch
            Code of each cell's batch, from 0 to `n_batches` - 1, shape (cells,); needed if `n_batches` is not 0. With
            `survey`, that of all its cells.
        survey
            Counts that are not in memory, to train on, in pools of random stretches of cells. Then `counts` are those
            of some of its cells, `cells` in rising order, from which all is learned that needs no more: the
            principal components, and when to stop.

        Raises
        ------
        ValueError
            If a parameter is out of range.
        FloatingPointError
            If the loss is not finite before there is a state to keep.
        MemoryError
            If the device has too little memory.

        Warns
        -----
        UserWarning
            If the loss stops being finite later; the best state is kept.
        """
        import torch

        from ._network import Counts, Network, StreamedCounts
        from ._network_losses import LOSSES
        from ._training import choose_device, train

        self._check_parameters()
        rng = as_generator(self.random_state)
        device = choose_device(self.device)
        n_held = min(counts.shape[0], max(2, _ASIDE_ENTRIES // counts.shape[1]))
        held = np.sort(rng.choice(counts.shape[0], n_held, replace=False))
        seen, aside = set_aside(counts, held, rng)
        codes_here = batch if batch is None or cells is None else batch[cells]
        scores = self._principal_scores(seen, genes, rng)
        share = column_sums(seen) / seen.sum()
        self.tried_: list[int] = []
        self.gains_: list[Gain] = []
        self.histories_: list[History] = []
        n_cells = counts.shape[0] if survey is None else survey.chunks.shape[0]
        n_epochs, batch_size = self._n_epochs(n_cells), self._batch_size(n_cells, device)
        loss = LOSSES[self.loss](seen, self.invariance)
        self.link_, self.depth_ = loss.link, loss.depth

        n_checked = max(2, _CHECKED_ENTRIES // counts.shape[1])

        def gain(network: Network, n_cells: int | None = None) -> Gain:
            of = slice(n_cells)
            codes = None if codes_here is None else codes_here[held[of]]
            profiles = self._predict(network, seen[held[of]], codes, share, n_rounds=int(self.link_ != "exp"))
            return held_out_gain(held_out_probabilities(profiles, aside[of]), aside[of], share)

        networks: list[Network] = []
        try:
            on_device: Counts | StreamedCounts
            if survey is None or cells is None:
                on_device = Counts(seen, batch, device)
            else:
                on_device = StreamedCounts(survey, batch, device, (cells[held], seen[held]))
            with _TRAINING, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                for width in sorted(self.widths, reverse=True):
                    torch.manual_seed(int(rng.integers(2**63)))
                    network = Network(scores, width, self._n_hidden(width), loss.start, self.n_batches, self.dropout)
                    history = train(
                        network.to(device),
                        copy.deepcopy(loss).to(device),
                        on_device,
                        rng,
                        check=partial(gain, network, n_checked),
                        on_check=partial(self.on_check, width, n_epochs),
                        n_epochs=n_epochs,
                        batch_size=batch_size,
                        learning_rate=self.learning_rate,
                        prior_scale=self.prior_scale,
                    )
                    networks.append(network)
                    self.histories_.append(history)
                    self.gains_.append(gain(network))
                    self.tried_.append(int(width))
                    if narrowest_as_good(self.gains_) < len(self.gains_) - 1:
                        break
        except torch.OutOfMemoryError as error:
            raise MemoryError(
                f"{device} has too little memory: pass a smaller batch_size (it was {batch_size}) or device='cpu'."
            ) from error
        best = narrowest_as_good(self.gains_)
        self.width_, self.network_ = self.tried_[best], networks[best]
        totals = column_sums(counts) if survey is None else survey.totals
        self.gene_share_ = totals / totals.sum()
        self.gene_scale_ = np.ones(counts.shape[1], np.float32)
        if self.link_ != "exp":
            self.gene_scale_ = self._learned_gene_scale(counts, codes_here, rng)
        return self

    def predict(self, counts: sp.csr_matrix, batch: np.ndarray | None = None, *, n_rounds: int = 0) -> LowRankProfiles:
        """Return the denoised profiles of cells, of those fitted or of others.

        Parameters
        ----------
        counts
            CSR of shape (cells, genes), the genes in the order of `fit`.
        batch
            Code of each cell's batch, as in `fit`.
        n_rounds
            Of `LowRankProfiles.with_totals`. Other cells than those fitted need not have their genes' totals, so 0 is
            right for them.

        Raises
        ------
        ValueError
            If the network's output is beyond what can be a rate, which weights from elsewhere can bring about.
        """
        factors, loadings = self._factors(self.network_, counts, batch)
        _check_output(self.link_, factors, loadings)
        size = row_sums(counts)
        return LowRankProfiles.with_totals(
            self.link_, factors, loadings, size, self.gene_share_, n_rounds, self.gene_scale_
        )

    def profiles(self, survey: Survey, batch: np.ndarray | None = None) -> LowRankProfiles:
        """Return the denoised profiles of all cells, wherever their counts are, every gene with its total."""

        def unscaled(block: Block, gene_scale: np.ndarray) -> LowRankProfiles:
            codes = None if batch is None else batch[block.cells]
            factors, loadings = self._factors(self.network_, block.counts, codes)
            size = row_sums(block.counts)
            return LowRankProfiles.unscaled(self.link_, factors, loadings, size, self.gene_share_, gene_scale)

        first = np.arange(min(survey.chunks.shape[0], 2))
        some = self.predict(survey.chunks.take(first), None if batch is None else batch[first])
        return profiles_in_blocks(survey.chunks, survey.size, some, unscaled)

    def state(self) -> State:
        """Return what prediction needs, for `sc_noise2self._model.save`."""
        values = {"widths": list(self.widths)} | {name: getattr(self, name) for name in _PARAMETERS}
        values |= {name: getattr(self, f"{name}_") for name in _FITTED}
        arrays = {name: np.asarray(getattr(self, f"{name}_")) for name in _OF_GENES} | self.network_.arrays()
        return State("autoencoder", values, arrays)

    @classmethod
    def from_state(cls, state: State, *, device: str = "auto") -> Self:
        """Return the fitted autoencoder that `state` came from."""
        from ._network import Network
        from ._training import choose_device

        values, arrays = dict(state.values), dict(state.arrays)
        fitted = {f"{name}_": values.pop(name) for name in _FITTED}
        fitted |= {f"{name}_": arrays.pop(name) for name in _OF_GENES}
        out = cls(**values, device=device)
        for name, value in fitted.items():
            setattr(out, name, value)
        out.network_ = Network.from_arrays(arrays).to(choose_device(device))
        return out

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted network to a file that `load` reads, whole or not at all; nothing is overwritten.

        Genes and batches without names are numbered.
        """
        numbers = {"feature_names_in_": len(self.gene_share_), "batch_names_": self.n_batches}
        genes, batches = (getattr(self, name, np.arange(n).astype(str)) for name, n in numbers.items())
        _model.save(path, Saved((self.state(),), (1.0,), genes, tuple(batches.tolist())))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, device: str = "auto") -> Self:
        """Return a fitted autoencoder from a file that `save` wrote.

        Raises
        ------
        FileNotFoundError
            If there is no file.
        ValueError
            If it is not such a file.
        """
        saved = _model.load(path)
        if [state.method for state in saved.states] != ["autoencoder"]:
            raise ValueError(f"{os.fspath(path)} is not the model of one autoencoder.")
        out = cls.from_state(saved.states[0], device=device)
        out.feature_names_in_, out.batch_names_ = saved.genes, np.array(saved.batches, dtype=str)
        return out

    def _predict(
        self,
        network: Network,
        counts: sp.csr_matrix,
        batch: np.ndarray | None,
        gene_share: np.ndarray,
        n_rounds: int,
    ) -> LowRankProfiles:
        factors, loadings = self._factors(network, counts, batch)
        return LowRankProfiles.with_totals(self.link_, factors, loadings, row_sums(counts), gene_share, n_rounds)

    def _factors(
        self, network: Network, counts: sp.csr_matrix, batch: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and loadings, see `LowRankProfiles`."""
        import torch

        from ._network import Counts

        network.eval()
        cells = Counts(counts, batch, network.scores.components.device)
        factors = np.ones((len(cells), network.n_factors + 2), np.float32)
        factors[:, -1] = 0
        with torch.no_grad():
            for start in range(0, len(cells), _PREDICTED):
                some = np.arange(start, min(start + _PREDICTED, len(cells)))
                factors[some, :-2] = network.factors(cells[some]).cpu().numpy()
        if self.link_ == "sqrt":
            factors *= np.sqrt(row_sums(counts) / self.depth_).astype(np.float32)[:, None]
        return factors, network.loadings()

    def _learned_gene_scale(
        self, counts: sp.csr_matrix, batch: np.ndarray | None, rng: np.random.Generator
    ) -> np.ndarray:
        """Return what gives every gene the total that it has in some of the cells, shape (genes,)."""
        cells = np.sort(rng.choice(counts.shape[0], min(counts.shape[0], _SCALED_CELLS), replace=False))
        some, codes = counts[cells], None if batch is None else batch[cells]
        share = column_sums(some) / max(1, some.sum())
        return self._predict(self.network_, some, codes, share, n_rounds=2).gene_scale

    def _principal_scores(
        self, counts: sp.csr_matrix, genes: np.ndarray | None, rng: np.random.Generator
    ) -> PrincipalScores:
        from ._network import PrincipalScores

        cells = np.flatnonzero(row_sums(counts))
        if len(cells) > _COMPONENT_CELLS:
            cells = np.sort(rng.choice(cells, _COMPONENT_CELLS, replace=False))
        some = counts[cells]
        some.eliminate_zeros()
        n_used = counts.shape[1] if genes is None else int(genes.sum())
        pca = PCADenoiser(
            "log1p",
            n_components=min(self.n_components, max(1, len(cells) - 1), n_used - 1),
            n_passes=3,
            random_state=rng,
        ).fit(some, genes)
        components = pca.components_ * pca.genes_[:, None]
        # Where cells do not differ, the components are rounding errors, and so would be what they are divided by.
        scale = max(pca.coordinates(some)[:, 0].std(), _LEAST_SPREAD * np.linalg.norm(pca.mean_))
        return PrincipalScores(
            components,
            pca.gene_weights_,
            pca.mean_ @ components,
            pca.transform_.target,
            pca.mean_,
            pca.gene_share_,
            scale,
        )

    def _check_parameters(self) -> None:
        for name in ("n_hidden", "n_epochs", "batch_size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
                raise ValueError(f"{name} is {value!r}: pass a whole number, 1 or more, or None.")
        for name in ("learning_rate", "prior_scale"):
            if not 0 < _number(getattr(self, name)) < np.inf:
                raise ValueError(f"{name} is {getattr(self, name)!r}: pass a number above 0.")
        if not 0 <= _number(self.dropout) < 1 or not 0 <= _number(self.invariance) < np.inf:
            raise ValueError(
                f"dropout is {self.dropout!r} and invariance {self.invariance!r}: dropout is from 0 to below 1, "
                "invariance 0 or more."
            )

    def _n_hidden(self, width: int) -> int:
        return max(64, 2 * width) if self.n_hidden is None else self.n_hidden

    def _n_epochs(self, n_cells: int) -> int:
        if self.n_epochs is not None:
            return self.n_epochs
        return int(np.clip(_CELLS_SHOWN // n_cells, _LEAST_EPOCHS, _MOST_EPOCHS))

    def _batch_size(self, n_cells: int, device: torch.device) -> int:
        if self.batch_size is not None:
            return self.batch_size
        return 128 if device.type == "cpu" else int(np.clip(n_cells // 200, 128, 4096))


def _number(value: object) -> float:
    """Return a real number as it is, NaN for anything else."""
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else float("nan")


def require_torch() -> None:
    """Raise unless PyTorch is installed, without importing it."""
    if find_spec("torch") is None:
        raise ImportError(
            'the autoencoder needs PyTorch: pip install "sc-noise2self[autoencoder]" (for the processor alone, add '
            "--extra-index-url https://download.pytorch.org/whl/cpu)."
        )


def _check_output(link: Link, factors: np.ndarray, loadings: np.ndarray) -> None:
    """Raise where a cell's largest rate, or the sum of its rates, would not be a number, or would be 0."""
    most = _LARGEST_OUTPUT[link]
    step = max(1, _CHECKED_ENTRIES // len(loadings))

    def largest(start: int) -> float:
        with np.errstate(all="ignore"):
            return float(np.abs((factors[start : start + step] @ loadings.T).max(axis=1)).max())

    for found in in_threads(largest, range(0, len(factors), step)):
        if not found <= most:  # nor NaN
            raise ValueError(
                f"the autoencoder's output for these cells reaches {found:.3g}, and {most:g} is the most that can "
                "become a rate: its weights, or these counts, are out of range."
            )


def narrowest_as_good(gains: Sequence[Gain]) -> int:
    """Return the index of the last gain that is as good as the best.

    That is within one paired standard error over cells, or within 1 % of it: two runs that differ by their seed alone
    differ by as much.
    """
    best = max(gains, key=lambda gain: gain.mean)
    return max(
        i
        for i, gain in enumerate(gains)
        if gain.mean >= best.mean - max(gain.error_of_difference(best), _SEEDS_DIFFER * best.mean)
    )


def set_aside(
    counts: sp.csr_matrix, cells: np.ndarray, rng: np.random.Generator
) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Return the counts less what is set aside, and what is set aside of these cells.

    Cells that would lose all their molecules keep them all. The first shares its indices with `counts`, so zeros may
    be stored.
    """
    own = counts[cells]
    starts = counts.indptr[:-1][cells]
    positions = np.arange(own.nnz) + np.repeat(starts - own.indptr[:-1], np.diff(own.indptr))
    size = row_sums(own)
    own.data = rng.binomial(own.data.astype(np.int64), _ASIDE).astype(np.float32)
    own.data *= np.repeat(row_sums(own) < size, np.diff(own.indptr))
    data = counts.data.copy()
    data[positions] -= own.data
    own.eliminate_zeros()
    return sp.csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape, copy=False), own
