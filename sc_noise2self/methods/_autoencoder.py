"""An autoencoder trained to predict some of a cell's molecules from the others, its width chosen by the same loss.

Every step deals the molecules of a batch of cells anew to a part that the network sees and a part that it must
predict (Noise2Self, Batson & Royer 2019, section 3.1, with unlimited splits); one fixed split would be learned by
heart. A tenth of the molecules of some cells is never trained on: their held-out gain says when to stop, which state
was best, and which width.

PyTorch is imported when it is used, not before.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import scipy.sparse as sp

from .._blocks import Block, Counts, InMemory
from .._checks import as_positive, check_name, check_number, check_one_of
from .._compare import Comparison
from .._counts import column_sums, row_sums
from .._loss import Gain
from .._model import LINKS
from .._transform import Link
from ..partitions import Fold, fold_of
from ._base import Learned, Learner, Method, bounded_values, is_several, set_aside, set_tuples
from ._components import learn_components
from ._pca import n_components_of
from ._profiles import LowRankProfiles, profiles_in_blocks

if TYPE_CHECKING:
    import torch

    from .._model import State
    from ._network import Counts as DeviceCounts
    from ._network import Network, PrincipalScores, StreamedCounts
    from ._network_losses import Loss
    from ._training import History

_LEARNED_CELLS = 50_000  # of a half that the autoencoder learns from: enough to choose by
_VALIDATION_ENTRIES = 20_000_000  # dense entries of the cells that have molecules set aside
_CHECKED_ENTRIES = 5_000_000  # and of those predicted while training goes on
_COMPONENT_CELLS = 50_000  # principal components are learned from so many cells at most
_CELLS_SHOWN = 60_000  # in training, over all epochs, as far as these bounds allow
_LEAST_EPOCHS, _MOST_EPOCHS = 12, 100
_PREDICTED = 1024  # cells predicted at a time
_SEEDS_DIFFER = 0.01  # of the gain: two runs that differ by their seed alone differ by as much
_SCALED_CELLS = 20_000  # that the scales of genes are learned from, at most
_LEAST_SPREAD = 0.01  # of the first score, in lengths of the mean cell
_TRAINING = Lock()  # its random numbers are those of the process


@dataclass(frozen=True, kw_only=True)
class Autoencoder(Method):
    """An autoencoder on the principal scores of a cell, trained on fresh molecule splits. It needs PyTorch.

    Parameters
    ----------
    width
        Width of the bottleneck, or several to compare, from the widest to the first whose gain on molecules set aside
        is below the best by more than one paired standard error and more than 1 %; the narrowest that is not is taken.
    loss
        Loss of training: `"multinomial"`, nats per held-out molecule; `"poisson"`; `"negative_binomial"`, with a
        dispersion per gene; `"masked_multinomial"`, genes hidden instead of molecules (Noise2Self, Noise2Void);
        `"mse_log1p"` and `"mse_sqrt"`, squared errors on that scale; `"noise2same_log1p"` and `"noise2same_sqrt"`
        (Noise2Same, Xie et al. 2020).
    n_seeds
        Networks to average, each from another random start.
    batch_key
        Column of `obs` with each cell's batch: the decoder then knows it, so that the code of a cell need not. Expected
        counts are still those of the cell's own batch.
    device
        `"auto"`, CUDA where there is one; `"cpu"`, which never touches it; or any that PyTorch knows.
    n_components
        Principal scores that a cell enters by. None takes 100, or as many as there are.
    n_hidden
        Units of the hidden layers on both sides of the bottleneck. None takes twice the width, at least 64.
    dropout
        Share of the encoder's hidden units dropped in training.
    learning_rate
        Learning rate of Adam at the start; it falls to 0 by a cosine.
    invariance
        Weight of Noise2Same's invariance term, in units of the noise's standard deviation. The theorem has 2, which
        allows for more copying than a bottleneck can do.
    prior_scale
        Standard deviation of the Gaussian prior on the weights of each gene. Against the likelihood of the gene's own
        molecules it keeps a rare gene near its mean and lets an abundant one go where its molecules say.
    n_epochs
        Epochs at most. None takes as many as show 60 000 cells, at least 12 and at most 100.
    batch_size
        Cells a step. None takes 128; on CUDA more for many cells, up to 4096.

    Raises
    ------
    ValueError, TypeError
        If an option is out of range.

    Notes
    -----
    The same seed gives the same bytes on the same machine with the same number of threads.
    """

    name: ClassVar[str] = "autoencoder"
    title: ClassVar[str] = "an autoencoder"
    needs_memory: ClassVar[bool] = False
    can_transfer: ClassVar[bool] = True

    width: int | Sequence[int] = (128, 32, 8, 2)
    loss: str = "multinomial"
    n_seeds: int = 1
    batch_key: str | None = None
    device: str = "auto"
    n_components: int | None = None
    n_hidden: int | None = None
    dropout: float = 0.1
    learning_rate: float = 7e-3
    invariance: float = 0.5
    prior_scale: float = 0.08
    n_epochs: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        set_tuples(self, "width")
        check_one_of("loss", self.loss, tuple(LINKS))
        as_positive("n_seeds", self.n_seeds)
        check_name("device", self.device)
        if self.batch_key is not None:
            check_name("batch_key", self.batch_key)
        for name in ("n_hidden", "n_epochs", "batch_size"):
            if getattr(self, name) is not None:
                as_positive(name, getattr(self, name))
        for name in ("learning_rate", "prior_scale"):
            check_number(name, getattr(self, name), 0, np.inf, open_below=True)
        check_number("invariance", self.invariance, 0, np.inf)
        check_number("dropout", self.dropout, 0, 1)

    @property
    def columns(self) -> tuple[str, ...]:
        """See `Method`."""
        return () if self.batch_key is None else (self.batch_key,)

    @property
    def is_average(self) -> bool:
        """See `Method`."""
        return self.n_seeds > 1

    def checked(self, counts: Counts) -> Self:
        """See `Method`."""
        require_torch()
        if self.batch_key is not None and len(counts.columns[self.batch_key].cat.categories) < 2:
            raise ValueError(f"adata.obs[{self.batch_key!r}] has one batch: leave batch_key out.")
        n_genes = counts.chunks.shape[1]
        width = bounded_values("width", self.width, type(self).width, n_genes, f"{n_genes} genes")
        return replace(self, width=width, n_components=n_components_of(self.n_components, counts))

    def learners(self, counts: Counts) -> Sequence[Learner]:
        """See `Method`."""
        first = _AutoencoderLearner(self, counts)
        return [first, *(_AutoencoderLearner(self, counts, first) for _ in range(1, self.n_seeds))]

    def codes(self, counts: Counts) -> np.ndarray | None:
        """Return the code of each cell's batch, shape (cells,); None without batches."""
        return None if self.batch_key is None else counts.columns[self.batch_key].cat.codes.to_numpy()


class _AutoencoderLearner(Learner):
    """An autoencoder; its width is chosen on all molecules but those that it sets aside.

    A width chosen on halves would be that for halves: on sparse data they support a narrower one. What the choice
    may tell of a half's held-out molecules is which of a handful of widths was best.
    """

    enough_cells: int | None = _LEARNED_CELLS

    def __init__(self, options: Autoencoder, counts: Counts, like: _AutoencoderLearner | None = None) -> None:
        """Take the width of `like`, another learner, instead of choosing one: this one then differs by its seed."""
        self.name = options.name
        self._options = options
        self._like = like
        self._used = counts.used
        self._codes = options.codes(counts)
        self._fits: list[AutoencoderModel] = []
        self._fitted: _Training | None = None
        self._choice: _Training | None = None

    @property
    def settings(self) -> Sequence[Any]:
        """The width chosen."""
        return (f"width {self.width}",)

    @property
    def width(self) -> int:
        """Width of its bottleneck."""
        assert self._fitted is not None  # prepared before anything was learned
        return self._fitted.model.width

    def prepare(self, counts: sp.csr_matrix, cells: np.ndarray, rng: np.random.Generator) -> None:
        """See `Learner`."""
        width = self._options.width
        widths: Sequence[int] = width if is_several(width) else [width]  # type: ignore[assignment, list-item]
        self._fitted = self._choice = self._fit(
            counts, cells, widths if self._like is None else [self._like.width], rng
        )

    def learn(self, half: Fold, rng: np.random.Generator) -> None:
        """See `Learner`."""
        self._fits.append(self._fit(half.seen, half.cells, [self.width], rng).model)

    def forget(self) -> None:
        """See `Learner`."""
        self._fits.clear()

    def predict(self, half: int, setting: Any, seen: sp.csr_matrix, cells: np.ndarray) -> LowRankProfiles:
        """See `Learner`."""
        return self._fits[half].predict(seen, self._codes_of(cells))

    def refit(self, counts: Counts, setting: Any, rng: np.random.Generator) -> LowRankProfiles:
        """See `Learner`."""
        assert self._fitted is not None
        n_cells = counts.chunks.shape[0]
        if n_cells > _LEARNED_CELLS:
            if isinstance(counts.chunks, InMemory):
                data = _TrainingData(counts.in_memory(), self._used, self._codes)
            else:
                cells = np.sort(rng.choice(n_cells, _LEARNED_CELLS, replace=False))
                data = _TrainingData(counts.chunks.take(cells), self._used, self._codes, counts, cells)
            self._fitted = _fit(self._options, [self.width], data, rng)
        profiles = self._fitted.model.profiles(counts, self._codes)
        model = replace(self._fitted.model, gene_scale=profiles.gene_scale)  # a saved model gives these cells the same
        self._fitted = replace(self._fitted, model=model)
        return profiles

    def learned(self, setting: Any) -> Learned:
        """See `Learner`."""
        assert self._fitted is not None
        assert self._choice is not None
        history, compared = self._fitted.history, self._choice.comparison
        values = {
            "table": compared.table("one_standard_error", _SEEDS_DIFFER, last=True, gain=True).drop(
                columns=["seconds", "failure"]
            ),
            "epoch_losses": np.array(history.losses),
            "checked_epochs": np.array(history.checked),
            "checked_gains": np.array(history.gains),
        }
        return Learned(self._options.title, self._options.described(setting), self.width, values)

    def state(self) -> State:
        """See `Learner`."""
        assert self._fitted is not None
        return self._fitted.model.state()

    def _fit(
        self, counts: sp.csr_matrix, cells: np.ndarray, widths: Sequence[int], rng: np.random.Generator
    ) -> _Training:
        """Return an autoencoder fitted to as many of the cells as are enough."""
        if counts.shape[0] > _LEARNED_CELLS:
            some = np.sort(rng.choice(counts.shape[0], _LEARNED_CELLS, replace=False))
            counts, cells = counts[some], cells[some]
        return _fit(self._options, widths, _TrainingData(counts, self._used, self._codes_of(cells)), rng)

    def _codes_of(self, cells: np.ndarray) -> np.ndarray | None:
        return None if self._codes is None else self._codes[cells]


@dataclass(frozen=True, eq=False)
class AutoencoderModel:
    """A trained network, which denoises other cells too.

    Attributes
    ----------
    network
        The `Network`.
    loss
        Loss that it was trained by, which says how its output becomes rates, see `link`.
    width
        Width of its bottleneck.
    depth
        Depth of a square root.
    gene_share, gene_scale
        The share of all molecules that each gene has, and what the output must be multiplied by to give it that share,
        shape (genes,); 1 for a likelihood, which learns it.
    """

    network: Network
    loss: str
    width: int
    depth: float
    gene_share: np.ndarray
    gene_scale: np.ndarray

    name: ClassVar[str] = "autoencoder"

    @property
    def link(self) -> Link:
        """From the output to rates."""
        return LINKS[self.loss]

    def learned(self) -> Learned:
        """Return what is worth writing down."""
        title = Autoencoder.title
        return Learned(title, f"{title} (width {self.width})", self.width)

    def state(self) -> State:
        """Return what a model file keeps of it."""
        from .._model import State

        values = {"loss": self.loss, "width": self.width, "n_batches": self.network.n_batches, "depth": self.depth}
        arrays = {"gene_share": self.gene_share, "gene_scale": self.gene_scale} | self.network.arrays()
        return State(self.name, values, arrays)

    @classmethod
    def from_state(cls, state: State, device: str) -> Self:
        """Return the model that a state was made of, on a device."""
        require_torch()
        from ._network import Network
        from ._training import choose_device

        values, arrays = state.values, dict(state.arrays)
        of_genes = [arrays.pop(name) for name in ("gene_share", "gene_scale")]
        network = Network.from_arrays(arrays).to(choose_device(device))
        return cls(network, values["loss"], values["width"], values["depth"], *of_genes)

    def predict(self, counts: sp.csr_matrix, codes: np.ndarray | None = None) -> LowRankProfiles:
        """Return the denoised profiles of cells, of those fitted or of others; genes keep the scale of the fit.

        Parameters
        ----------
        counts
            CSR of shape (cells, genes).
        codes
            Code of each cell's batch, shape (cells,).

        Raises
        ------
        ValueError
            If the network's output is beyond what can be a rate, which weights from elsewhere can bring about.
        """
        found = self._unscaled(counts, codes, self.gene_scale)
        return found.checked("the autoencoder's output").scaled(n_rounds=0)

    def profiles(self, counts: Counts, codes: np.ndarray | None) -> LowRankProfiles:
        """Return the denoised profiles of all cells, wherever their counts are, every gene with its total."""

        def unscaled(block: Block, gene_scale: np.ndarray) -> LowRankProfiles:
            return self._unscaled(block.counts, None if codes is None else codes[block.cells], gene_scale)

        first = np.arange(min(counts.chunks.shape[0], 2))
        some = self.predict(counts.chunks.take(first), None if codes is None else codes[first])
        return profiles_in_blocks(counts.chunks, counts.size, some, unscaled)

    def _unscaled(self, counts: sp.csr_matrix, codes: np.ndarray | None, gene_scale: np.ndarray) -> LowRankProfiles:
        factors, loadings = _factors(self.network, counts, codes, self.link, self.depth)
        return LowRankProfiles.unscaled(self.link, factors, loadings, row_sums(counts), self.gene_share, gene_scale)


@dataclass(frozen=True, eq=False)
class _TrainingData:
    """What a network is fitted to.

    Attributes
    ----------
    counts
        CSR of shape (cells, genes).
    used
        The genes that a cell enters by, boolean of shape (genes,); None for all.
    codes
        Code of each cell's batch, shape (cells,), of all cells where these are some; None without batches.
    all_counts, cells
        Counts that are not in memory, to train on in pools of random stretches of cells. Then `counts` are those of
        `cells` among them, in rising order, from which all is learned that needs no more: the principal components, and
        when to stop.
    """

    counts: sp.csr_matrix
    used: np.ndarray | None
    codes: np.ndarray | None
    all_counts: Counts | None = None
    cells: np.ndarray | None = None

    @property
    def n_cells(self) -> int:
        """How many cells are trained on."""
        return int(self.counts.shape[0] if self.all_counts is None else self.all_counts.chunks.shape[0])

    @property
    def totals(self) -> np.ndarray:
        """The molecules of each gene, shape (genes,)."""
        return column_sums(self.counts) if self.all_counts is None else self.all_counts.totals

    @property
    def codes_here(self) -> np.ndarray | None:
        """The codes of the cells of `counts`."""
        return self.codes if self.codes is None or self.cells is None else self.codes[self.cells]


@dataclass(frozen=True, eq=False)
class _Training:
    """A model, how each width compared on molecules set aside, and the history of the one kept."""

    model: AutoencoderModel
    comparison: Comparison
    history: History


def _fit(options: Autoencoder, widths: Sequence[int], data: _TrainingData, rng: np.random.Generator) -> _Training:
    """Train a network of each width, from the widest to the first that is worse, and keep the narrowest that is not.

    Raises
    ------
    FloatingPointError
        If the loss is not finite before there is a state to keep.
    MemoryError
        If the device has too little memory.
    """
    import torch

    from ._network_losses import LOSSES
    from ._training import choose_device

    device, counts = choose_device(options.device), data.counts
    n_held = min(counts.shape[0], max(2, _VALIDATION_ENTRIES // counts.shape[1]))
    held = np.sort(rng.choice(counts.shape[0], n_held, replace=False))
    seen, aside = set_aside(counts, held, rng)
    codes = None if data.codes_here is None else data.codes_here[held]
    validation = _Validation(fold_of(seen[held], aside, share=column_sums(seen) / seen.sum()), codes)
    scores = _principal_scores(options, seen, data.used, rng)
    loss = LOSSES[options.loss](seen, options.invariance)
    batch_size = options.batch_size or _batch_size(data.n_cells, device)
    comparison, networks, histories = Comparison(), [], []
    try:
        on_device = _on_device(data, seen, held, device)
        with _TRAINING, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for width in sorted(widths, reverse=True):
                torch.manual_seed(int(rng.integers(2**63)))
                network, history = _trained(options, width, scores, loss, on_device, validation, batch_size, data, rng)
                networks.append(network)
                histories.append(history)
                comparison.add({"width": int(width)}, -validation.gain(network, loss))
                if narrowest_as_good(comparison) < len(networks) - 1:
                    break
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"{device} has too little memory: pass a smaller batch_size (it was {batch_size}) or device='cpu'."
        ) from error
    best = narrowest_as_good(comparison)
    share = data.totals / data.totals.sum()
    ones = np.ones(counts.shape[1], np.float32)
    width = comparison.parameters(best)["width"]
    model = AutoencoderModel(networks[best], options.loss, width, loss.depth, share, ones)
    if model.link != "exp":
        model = replace(model, gene_scale=_learned_gene_scale(model, counts, data.codes_here, rng))
    return _Training(model, comparison, histories[best])


def _on_device(
    data: _TrainingData, seen: sp.csr_matrix, held: np.ndarray, device: torch.device
) -> DeviceCounts | StreamedCounts:
    """Return what is trained on: the counts less the molecules of some cells that were set aside."""
    from ._network import Counts as DeviceCounts
    from ._network import StreamedCounts

    if data.all_counts is None or data.cells is None:
        return DeviceCounts(seen, data.codes, device)
    return StreamedCounts(data.all_counts, data.codes, device, (data.cells[held], seen[held]))


def _trained(
    options: Autoencoder,
    width: int,
    scores: PrincipalScores,
    loss: Loss,
    on_device: DeviceCounts | StreamedCounts,
    validation: _Validation,
    batch_size: int,
    data: _TrainingData,
    rng: np.random.Generator,
) -> tuple[Network, History]:
    """Return a network of this width in its best state, and how it came there."""
    from ._network import Network
    from ._training import Schedule, train

    n_hidden = options.n_hidden or max(64, 2 * width)
    n_batches = 0 if data.codes is None else int(data.codes.max()) + 1
    network = Network(scores, width, n_hidden, loss.start, n_batches, options.dropout)
    n_checked = max(2, _CHECKED_ENTRIES // data.counts.shape[1])
    schedule = Schedule(
        f"autoencoder, width {width}",
        options.n_epochs or int(np.clip(_CELLS_SHOWN // data.n_cells, _LEAST_EPOCHS, _MOST_EPOCHS)),
        batch_size,
        options.learning_rate,
        options.prior_scale,
    )
    check = partial(validation.gain, network, loss, n_checked)
    device = on_device.device
    history = train(network.to(device), copy.deepcopy(loss).to(device), on_device, rng, check, schedule)
    return network, history


@dataclass(frozen=True, eq=False)
class _Validation:
    """Cells of which molecules were set aside, and the codes of their batches."""

    fold: Fold
    codes: np.ndarray | None

    def gain(self, network: Network, loss: Loss, n_cells: int | None = None) -> Gain:
        """Return what a network gains on the molecules set aside of the first cells, None for all."""
        some = slice(n_cells)
        fold = fold_of(self.fold.seen[some], self.fold.held_out[some], share=self.fold.share)
        codes = None if self.codes is None else self.codes[some]
        factors, loadings = _factors(network, fold.seen, codes, loss.link, loss.depth)
        profiles = LowRankProfiles.unscaled(loss.link, factors, loadings, row_sums(fold.seen), fold.share)
        return fold.gain(profiles.scaled(n_rounds=int(loss.link != "exp")))


def narrowest_as_good(comparison: Comparison) -> int:
    """Return the number of the last row, the narrowest, that is as good as the best.

    That is within one paired standard error over cells, or within 1 % of it.
    """
    return comparison.best("one_standard_error", tolerance=_SEEDS_DIFFER, last=True)


def _factors(
    network: Network, counts: sp.csr_matrix, codes: np.ndarray | None, link: Link, depth: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and loadings, see `LowRankProfiles`."""
    import torch

    from ._network import Counts as DeviceCounts

    network.eval()
    cells = DeviceCounts(counts, codes, network.scores.components.device)
    factors = np.ones((len(cells), network.n_factors + 2), np.float32)
    factors[:, -1] = 0
    with torch.no_grad():
        for start in range(0, len(cells), _PREDICTED):
            some = np.arange(start, min(start + _PREDICTED, len(cells)))
            factors[some, :-2] = network.factors(cells[some]).cpu().numpy()
    if link == "sqrt":
        factors *= np.sqrt(row_sums(counts) / depth).astype(np.float32)[:, None]
    return factors, network.loadings()


def _learned_gene_scale(
    model: AutoencoderModel, counts: sp.csr_matrix, codes: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    """Return what gives every gene the total that it has in some of the cells, shape (genes,)."""
    cells = np.sort(rng.choice(counts.shape[0], min(counts.shape[0], _SCALED_CELLS), replace=False))
    some, codes = counts[cells], None if codes is None else codes[cells]
    factors, loadings = _factors(model.network, some, codes, model.link, model.depth)
    share = column_sums(some) / max(1, some.sum())
    return LowRankProfiles.unscaled(model.link, factors, loadings, row_sums(some), share).scaled(n_rounds=2).gene_scale


def _principal_scores(
    options: Autoencoder, counts: sp.csr_matrix, used: np.ndarray | None, rng: np.random.Generator
) -> PrincipalScores:
    """Return the first layer of the network, which is learned beforehand."""
    from ._network import PrincipalScores

    cells = np.flatnonzero(row_sums(counts))
    if len(cells) > _COMPONENT_CELLS:
        cells = np.sort(rng.choice(cells, _COMPONENT_CELLS, replace=False))
    some = counts[cells]
    some.eliminate_zeros()
    n_used = counts.shape[1] if used is None else int(used.sum())
    assert options.n_components is not None  # checked
    n_components = min(options.n_components, max(1, len(cells) - 1), n_used - 1)
    (found,) = learn_components(some, "log1p", n_components, rng, n_passes=3, used=used)
    components = found.vectors * found.used[:, None]
    # Where cells do not differ, the components are rounding errors, and so would be what they are divided by.
    scale = max(found.coordinates(some)[:, 0].std(), _LEAST_SPREAD * np.linalg.norm(found.mean))
    return PrincipalScores(
        components,
        found.gene_weights,
        found.mean @ components,
        found.transform.target,
        found.mean,
        found.gene_share,
        scale,
    )


def _batch_size(n_cells: int, device: torch.device) -> int:
    return 128 if device.type == "cpu" else int(np.clip(n_cells // 200, 128, 4096))


def require_torch() -> None:
    """Raise unless PyTorch is installed, without importing it."""
    if find_spec("torch") is None:
        raise ImportError(
            'the autoencoder needs PyTorch: pip install "sc-noise2self[autoencoder]" (for the processor alone, add '
            "--extra-index-url https://download.pytorch.org/whl/cpu)."
        )
