"""An autoencoder trained to predict some of a cell's molecules from the others, its width chosen by the same loss.

Every step deals the molecules of a batch of cells anew to a part that the network sees and a part that it must
predict (Noise2Self, Batson & Royer 2019, section 3.1, with unlimited splits); one fixed split would be learned by
heart. A network is the average of the states that training passes through. A tenth of the molecules of some cells is
never trained on: their held-out gain says when to stop, and which width.

PyTorch is imported when it is used, not before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import numpy as np
import scipy.sparse as sp

from .._blocks import Block, Counts, InMemory, Partial
from .._checks import as_whole, check_name, check_number, check_one_of
from .._compare import Comparison
from .._counts import column_sums, row_sums
from .._loss import Gain
from .._model import LINKS, State
from .._random import random_sample
from .._threads import ProcessLock
from .._transform import Link
from .._warnings import warn
from ..partitions import Fold, fold_of
from ._base import Learned, Learner, Method, as_several, bounded_values, set_aside, set_tuples
from ._components import learn_components
from ._pca import SCALED, n_components_of
from ._populations import Populations, Refinement
from ._profiles import LowRankProfiles, Profiles, combine, profiles_in_blocks
from ._svd import gram_product

if TYPE_CHECKING:
    import torch

    from ._network import AnyCounts, Network, PrincipalScores
    from ._network_losses import Loss
    from ._training import History

_LEARNED_CELLS = 50_000  # of a half that the autoencoder learns from: enough to choose by
_VALIDATION_ENTRIES = 20_000_000  # dense entries of the cells that have molecules set aside
_CHECKED_ENTRIES = 5_000_000  # and of those predicted while training goes on
_COMPONENT_CELLS = 50_000  # principal components are learned from so many cells at most
_CELLS_SHOWN = 120_000  # in training, over all epochs, as far as these bounds allow
_LEAST_EPOCHS, _MOST_EPOCHS = 12, 100
_STEPS = 800  # of training in all: PBMC 8k gains .1288 by 200, .1309 by 400, .1318 by 800 and 1 600, .1303 by 3 100
_BATCHES = (128, 4096)  # cells a step, at least and at most
_PREDICTED = 1024  # cells predicted at a time
_SCALED_CELLS = 20_000  # that the scales of genes are learned from, at most
_INVARIANCE = 0.5  # the weight of Noise2Same's second term, unless one is given
_LEAST_SPREAD = 0.01  # of the first score, in lengths of the mean cell
Out = TypeVar("Out")
_TRAINING = ProcessLock()  # its random numbers are those of the process


@dataclass(frozen=True, kw_only=True)
class Autoencoder(Method):
    """An autoencoder on the principal scores of a cell, trained on fresh molecule splits. It needs PyTorch.

    Parameters
    ----------
    width
        Width of the bottleneck, or several to compare, from the widest to the first whose gain on molecules set aside
        is below the best by more than one paired standard error; the narrowest that is not is taken.
    loss
        Loss of training: `"multinomial"`, nats per held-out molecule; `"poisson"`; `"negative_binomial"`, with a
        dispersion per gene; `"masked_multinomial"`, genes hidden instead of molecules (Noise2Self, Noise2Void);
        `"mse_log1p"` and `"mse_sqrt"`, squared errors on that scale; `"noise2same_log1p"` and `"noise2same_sqrt"`
        (Noise2Same, Xie et al. 2020).
    n_seeds
        Random starts to average.
    batch_key
        Column of `obs` with each cell's batch: the decoder then knows it, so that the code of a cell need not. Expected
        counts are still those of the cell's own batch.
    device
        `"auto"`, CUDA where there is one; `"cpu"`, which never touches it; or a GPU by name, as `"cuda:1"`.
    n_components
        Principal scores that a cell enters by. None takes 100, or as many as there are.
    n_hidden
        Units of the hidden layers on both sides of the bottleneck. None takes twice the width, at least 64.
    learning_rate
        Learning rate of Adam. It is constant; the states that it passes through are averaged.
    invariance
        Weight of Noise2Same's invariance term, in units of the noise's standard deviation; other losses have none. None
        takes 0.5. The theorem has 2, which
        allows for more copying than a bottleneck can do.
    prior_scale
        Standard deviation of the Gaussian prior on the weights of each gene. Against the likelihood of the gene's own
        molecules it keeps a rare gene near its mean and lets an abundant one go where its molecules say.
    n_epochs
        Epochs at most. None takes as many as show 120 000 cells, at least 12 and at most 100; of more than 270 000
        cells fewer, as many as make 800 steps of the largest batches.
    batch_size
        Cells a step. None takes 128, or more for many cells, so that training has 800 steps; at most 4096.

    Raises
    ------
    ValueError, TypeError
        If an option is out of range.

    Notes
    -----
    The same seed gives the same bytes on the same machine with the same number of threads. The result is the mean of
    what three networks predict from all molecules: one that learned from all of them, and one of each half of the
    split, with half its weight (with several splits, of each half of each). Of more than 50 000 cells, so many, drawn
    at random, choose the width and give the principal components; training shows all, and the network that it gives
    stands alone. Where `torch.distributed` was initialised, each process trains on its share of the cells, and all
    return the same.
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
    learning_rate: float = 7e-3
    invariance: float | None = None
    prior_scale: float = 0.08
    n_epochs: int | None = None
    batch_size: int | None = None

    def __post_init__(self) -> None:
        set_tuples(self, "width")
        check_one_of("loss", self.loss, tuple(LINKS))
        as_whole("n_seeds", self.n_seeds)
        check_name("device", self.device)
        if self.batch_key is not None:
            check_name("batch_key", self.batch_key)
        for name in ("n_hidden", "n_epochs", "batch_size"):
            if getattr(self, name) is not None:
                as_whole(name, getattr(self, name))
        for name in ("learning_rate", "prior_scale"):
            check_number(name, getattr(self, name), 0, np.inf, open_below=True)
        if self.invariance is not None:
            check_number("invariance", self.invariance, 0, np.inf)
            if not self.loss.startswith("noise2same"):
                raise ValueError(
                    f"invariance was given with the loss {self.loss!r}, which has no such term: leave it out."
                )

    @property
    def columns(self) -> tuple[str, ...]:
        return () if self.batch_key is None else (self.batch_key,)

    @property
    def is_average(self) -> bool:
        return self.n_seeds > 1

    def checked(self, counts: Counts) -> Self:
        require_torch()
        if self.batch_key is not None and len(counts.columns[self.batch_key].cat.categories) < 2:
            raise ValueError(f"adata.obs[{self.batch_key!r}] has one batch: leave batch_key out.")
        n_genes = counts.chunks.shape[1]
        width = bounded_values("width", self.width, type(self).width, n_genes, f"{n_genes} genes")
        return replace(self, width=width, n_components=n_components_of(self.n_components, counts))

    def learners(self, counts: Counts) -> Sequence[Learner]:
        first = _AutoencoderLearner(self, counts)
        return [first, *(_AutoencoderLearner(self, counts, first) for _ in range(1, self.n_seeds))]


def _by_torch(work: Callable[..., Out]) -> Callable[..., Out]:
    """Let gradients be, whatever the caller has switched off, and say in one sentence that a device is full."""

    @wraps(work)
    def checked(*args: Any, **kwargs: Any) -> Out:
        import torch

        try:
            with torch.inference_mode(False), torch.enable_grad():
                return work(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise MemoryError("the device has too little memory for these counts: pass device='cpu'.") from error

    return checked


class _AutoencoderLearner(Learner):
    """An autoencoder; its width is chosen on all molecules but those that it sets aside.

    A width chosen on halves would be that for halves: on sparse data they support a narrower one. What the choice
    may tell of a half's held-out molecules is which of a handful of widths was best.
    """

    enough_cells: int | None = _LEARNED_CELLS
    _choice: _Training  # from `prepare` on
    _fitted: _Training

    def __init__(self, options: Autoencoder, counts: Counts, like: _AutoencoderLearner | None = None) -> None:
        """Take the width of `like`, another learner, instead of choosing one: this one then differs by its seed."""
        super().__init__(options.name)
        self._options, self._like, self._used = options, like, counts.used
        key = options.batch_key
        self._codes = None if key is None else counts.columns[key].cat.codes.to_numpy()

    @property
    def settings(self) -> Sequence[Any]:
        """The width chosen."""
        return (f"width {self.width}",)

    @property
    def width(self) -> int:
        """Width of its bottleneck."""
        return self._fitted.model.width

    def prepare(self, counts: sp.csr_matrix, cells: np.ndarray, rng: np.random.Generator) -> None:
        widths = as_several(self._options.width) if self._like is None else (self._like.width,)
        self._fitted = self._choice = self._fit(*_enough(counts, cells, rng), widths, rng)

    def learn(self, half: Fold, rng: np.random.Generator) -> None:
        self._fits.append(self._fit(*_enough(half.seen, half.cells, rng), (self.width,), rng).model)

    def predict(self, half: int, setting: Any, seen: sp.csr_matrix, cells: np.ndarray) -> LowRankProfiles:
        return self._fits[half].predict(seen, _of_cells(self._codes, cells))

    def refit(self, counts: Counts, setting: Any, rng: np.random.Generator) -> Profiles:
        """Return the mean of the networks of all molecules and of each half, weighted by the molecules they learned.

        Where there were more cells than the halves were learned from, the network of all stands alone.
        """
        n_cells, of_halves = counts.chunks.shape[0], self._fits
        if n_cells > _LEARNED_CELLS:
            cells, of_halves = random_sample(n_cells, _LEARNED_CELLS, rng), []
            self._fitted = self._fit(counts.chunks.take(cells), cells, (self.width,), rng, shown=counts)
        whole = self._fitted.model
        fitted = [whole, *(replace(half, gene_share=whole.gene_share) for half in of_halves)]
        weights = np.array([1.0, *(0.5 for _ in of_halves)])
        profiles = [model.profiles(counts, self._codes, self.refinement) for model in fitted]
        # With the scales of its own genes each gives these cells again, and other cells by the same law.
        self.models = [
            replace(model, gene_scale=own.gene_scale, populations=own.populations)
            for model, own in zip(fitted, profiles, strict=True)
        ]
        self.counts_for = float(weights.sum())
        return combine(profiles, (weights / weights.sum()).tolist())

    def learned(self, setting: Any) -> Learned:
        history = self._fitted.history
        table = self._choice.comparison.table("one_standard_error", last=True, gain=True)
        values = {
            "table": table.drop(columns=["seconds", "failure"]),
            "epoch_losses": np.array(history.losses),
            "checked_epochs": np.array(history.checked),
            "checked_gains": np.array(history.gains),
        }
        return Learned(self._options.title, self._options.described(setting), self.width, values)

    @_by_torch
    def _fit(
        self,
        counts: sp.csr_matrix,
        cells: np.ndarray,
        widths: Sequence[int],
        rng: np.random.Generator,
        *,
        shown: Counts | None = None,
    ) -> _Training:
        """Train networks from the widest to the first that is worse, and keep the narrowest that is not.

        `shown` are counts of all cells, where training shows more than these. What needs no more is learned from
        these: the principal components, and when to stop.
        """
        import torch

        from ._network import Aside, DeviceCounts, counts_of_all
        from ._network_losses import LOSSES
        from ._training import choose_device

        options, device = self._options, choose_device(self._options.device)
        n_cells, n_genes = counts.shape
        held = random_sample(n_cells, max(2, _VALIDATION_ENTRIES // n_genes), rng)
        seen, aside = set_aside(counts, held, rng)
        fold = fold_of(seen[held], aside, cells[held], share=column_sums(seen) / seen.sum())
        n_shown = n_cells if shown is None else shown.chunks.shape[0]
        least = min(_LEAST_EPOCHS, -(-_STEPS * _BATCHES[1] // n_shown))
        n_epochs = options.n_epochs or int(np.clip(_CELLS_SHOWN // n_shown, least, _MOST_EPOCHS))
        plan = _Plan(
            fold,
            self._principal_scores(seen, device, rng),
            LOSSES[options.loss](seen, _INVARIANCE if options.invariance is None else options.invariance),
            n_epochs,
            options.batch_size or int(np.clip(n_epochs * n_shown // _STEPS, *_BATCHES)),
        )
        if shown is None:
            on_device: AnyCounts = DeviceCounts.of(seen, _of_cells(self._codes, cells), device)
        else:
            on_device = counts_of_all(shown, self._codes, device, Aside(cells[held], aside))
        comparison, models, histories = Comparison(), [], []
        with _TRAINING, torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for width in sorted(set(widths), reverse=True):
                model, history = self._of_width(int(width), plan, on_device, rng)
                models.append(model)
                histories.append(history)
                comparison.add({"width": model.width}, -self._gain(model, fold))
                if narrowest_as_good(comparison) < len(models) - 1:
                    break
        best = narrowest_as_good(comparison)
        totals = column_sums(counts) if shown is None else shown.totals
        model = replace(models[best], gene_share=totals / totals.sum())
        if model.link != "exp":
            model = replace(model, gene_scale=self._learned_gene_scale(model, counts, cells, rng))
        return _Training(model, comparison, histories[best])

    def _of_width(
        self, width: int, plan: _Plan, counts: AnyCounts, rng: np.random.Generator
    ) -> tuple[AutoencoderModel, History]:
        """Train one network; where the device has too little memory, once more with half the batch."""
        import torch

        seed, batch_size = int(rng.integers(2**63)), plan.batch_size
        while True:
            torch.manual_seed(seed)
            try:
                return self._trained(width, plan, counts, batch_size, rng)
            except torch.OutOfMemoryError as error:
                if batch_size < plan.batch_size or batch_size == 1:
                    raise MemoryError(
                        f"{counts.device} has too little memory: pass a smaller batch_size (it was {batch_size}) or "
                        "device='cpu'."
                    ) from error
            batch_size //= 2
            warn(f"{counts.device} has too little memory for batch_size={plan.batch_size}: {batch_size} is taken.")

    def _trained(
        self, width: int, plan: _Plan, counts: AnyCounts, batch_size: int, rng: np.random.Generator
    ) -> tuple[AutoencoderModel, History]:
        """Train one network in these batches."""
        from ._network import Network
        from ._training import Schedule, train

        options, fold = self._options, plan.fold
        n_genes, n_batches = len(plan.loss.start), 0 if self._codes is None else int(self._codes.max()) + 1
        n_hidden = options.n_hidden or max(64, 2 * width)
        network = Network(plan.scores, width, n_hidden, plan.loss.start, n_batches)
        of_genes = fold.share, np.ones(n_genes, np.float32), Populations.one(fold.share)
        model = AutoencoderModel(network.to(counts.device), options.loss, width, plan.loss.depth, *of_genes)
        few = fold.of_cells(np.arange(fold.seen.shape[0])[: max(2, _CHECKED_ENTRIES // n_genes)])
        steps = plan.n_epochs, batch_size, options.learning_rate, options.prior_scale
        loss, schedule = copy.deepcopy(plan.loss).to(counts.device), Schedule(f"autoencoder, width {width}", *steps)
        return model, train(
            network, loss, counts, rng, lambda each: self._gain(replace(model, network=each), few), schedule
        )

    def _gain(self, model: AutoencoderModel, fold: Fold) -> Gain:
        """Return what a model gains on molecules set aside."""
        profiles = model.unscaled(fold.seen, _of_cells(self._codes, fold.cells))
        return fold.gain(profiles.balanced(n_rounds=int(model.link != "exp")))

    def _learned_gene_scale(
        self, model: AutoencoderModel, counts: sp.csr_matrix, cells: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """Return what gives every gene the total that it has in some of the cells, shape (genes,)."""
        rows = random_sample(counts.shape[0], _SCALED_CELLS, rng)
        some, codes = counts[rows], _of_cells(self._codes, cells[rows])
        model = replace(model, gene_share=column_sums(some) / max(1, some.sum()))
        return model.unscaled(some, codes).balanced(n_rounds=2).gene_scale

    def _principal_scores(
        self, counts: sp.csr_matrix, device: torch.device, rng: np.random.Generator
    ) -> PrincipalScores:
        """Return the first layer of the network, which is learned beforehand."""
        from ._device import gram_product_on
        from ._network import PrincipalScores

        cells = np.flatnonzero(row_sums(counts))
        if len(cells) > _COMPONENT_CELLS:
            cells = cells[random_sample(len(cells), _COMPONENT_CELLS, rng)]
        some = counts[cells]
        some.eliminate_zeros()
        assert self._options.n_components is not None  # checked: less than the genes used
        n_components = min(self._options.n_components, max(1, len(cells) - 1))
        product = gram_product if device.type == "cpu" else gram_product_on(device)
        found = learn_components(some, "log1p", n_components, rng, n_passes=3, used=self._used, product=product)
        components = found.vectors * found.used[:, None]
        # Where cells do not differ, the components are rounding errors, and so would be what they are divided by.
        first = replace(found, vectors=found.vectors[:, :1])
        (along_it,) = InMemory(some).run(lambda block: Partial(rows=[first.coordinates(block.counts)])).rows
        scale = max(along_it.std(), _LEAST_SPREAD * np.linalg.norm(found.mean))
        center, depth = found.mean @ components, found.transform.target
        return PrincipalScores(components, found.gene_weights, center, depth, found.mean, found.gene_share, scale)


@dataclass(frozen=True, eq=False)
class AutoencoderModel:
    """A trained network, which denoises other cells too."""

    network: Network
    loss: str
    width: int
    depth: float  # of a square root
    gene_share: np.ndarray  # share of all molecules that each gene has
    gene_scale: np.ndarray  # what gives it that share; 1 for a likelihood, which learns it
    populations: Populations

    name: ClassVar[str] = "autoencoder"

    @property
    def link(self) -> Link:
        """How the output becomes rates."""
        return LINKS[self.loss]

    def learned(self) -> Learned:
        """Return what is worth writing down."""
        return Learned(Autoencoder.title, f"{Autoencoder.title} (width {self.width})", self.width)

    def state(self) -> State:
        """Return what a model file keeps of it."""
        values, arrays = self.populations.state()
        values |= {"loss": self.loss, "width": self.width, "n_batches": self.network.n_batches, "depth": self.depth}
        arrays |= {"gene_share": self.gene_share, "gene_scale": self.gene_scale} | self.network.arrays()
        return State(self.name, values, arrays)

    @classmethod
    def from_state(cls, state: State, device: str) -> Self:
        """Return the model that a state was made of, on a device."""
        require_torch()
        from ._network import Network
        from ._training import choose_device

        values, arrays = state.values, dict(state.arrays)
        populations = Populations.from_state(state)
        share, scale = (arrays.pop(name) for name in ("gene_share", "gene_scale"))
        arrays = {name: value for name, value in arrays.items() if not name.startswith("population_")}
        network = Network.from_arrays(arrays).to(choose_device(device))
        return cls(network, values["loss"], values["width"], values["depth"], share, scale, populations)

    @_by_torch
    def predict(self, counts: sp.csr_matrix, codes: np.ndarray | None = None) -> LowRankProfiles:
        """Return the denoised profiles of cells with codes of batches; genes keep the scale of the fit."""
        found = self.unscaled(counts, codes, self.gene_scale)
        return found.checked("the autoencoder's output").of_populations(self.populations)

    @_by_torch
    def profiles(self, counts: Counts, codes: np.ndarray | None, refinement: Refinement) -> LowRankProfiles:
        """Return the denoised profiles of all cells, wherever their counts are, every gene with its total."""

        def scores(block: Block) -> np.ndarray:
            return self.scores(block.counts, _of_cells(codes, block.cells))

        n_cells, n_genes = counts.chunks.shape
        cells = np.arange(0, n_cells, max(1, n_cells * n_genes // SCALED))
        counts_of_some = counts.chunks.take(cells)
        some = self.predict(counts_of_some, _of_cells(codes, cells)).balanced().refined(counts_of_some, refinement)
        return profiles_in_blocks(counts.chunks, counts.size, some, scores)

    def unscaled(
        self, counts: sp.csr_matrix, codes: np.ndarray | None, gene_scale: np.ndarray | None = None
    ) -> LowRankProfiles:
        """Return the denoised profiles of cells, which have no scale yet."""
        from ._device import on_device

        about = self.network.loadings(), row_sums(counts), self.gene_share, gene_scale
        found = LowRankProfiles.unscaled(self.link, self.scores(counts, codes), *about)
        return on_device(found, self.network.scores.components.device)

    def scores(self, counts: sp.csr_matrix, codes: np.ndarray | None) -> np.ndarray:
        """Return the scores of cells, shape (cells, factors + 2): a constant and a level are among them."""
        import torch

        from ._network import DeviceCounts

        network = self.network
        cells = DeviceCounts.of(counts, codes, network.scores.components.device)
        factors = np.ones((len(cells), network.n_factors + 2), np.float32)
        factors[:, -1] = 0
        with torch.no_grad():
            for start in range(0, len(cells), _PREDICTED):
                some = np.arange(start, min(start + _PREDICTED, len(cells)))
                factors[some, :-2] = network.factors(cells[some]).cpu().numpy()
        if self.link == "sqrt":
            factors *= np.sqrt(row_sums(counts) / self.depth).astype(np.float32)[:, None]
        return factors


@dataclass(frozen=True, eq=False)
class _Plan:
    """What the trainings of all widths share: the molecules set aside, the first layer, the loss, epochs, batches."""

    fold: Fold
    scores: PrincipalScores
    loss: Loss
    n_epochs: int
    batch_size: int


@dataclass(frozen=True, eq=False)
class _Training:
    """A model, how each width compared on molecules set aside, and the history of the one kept."""

    model: AutoencoderModel
    comparison: Comparison
    history: History


def narrowest_as_good(comparison: Comparison) -> int:
    """Return the row of the narrowest width within one paired standard error of the best."""
    return comparison.best("one_standard_error", last=True)


def _enough(counts: sp.csr_matrix, cells: np.ndarray, rng: np.random.Generator) -> tuple[sp.csr_matrix, np.ndarray]:
    """Return as many of the cells as are enough to learn from."""
    if counts.shape[0] <= _LEARNED_CELLS:
        return counts, cells
    some = random_sample(counts.shape[0], _LEARNED_CELLS, rng)
    return counts[some], cells[some]


def _of_cells(codes: np.ndarray | None, cells: np.ndarray) -> np.ndarray | None:
    """Return the codes of some cells' batches, where there are batches."""
    return None if codes is None else codes[cells]


def require_torch() -> None:
    """Raise unless PyTorch is installed, without importing it."""
    if find_spec("torch") is None:
        raise ImportError(
            'the autoencoder needs PyTorch: pip install "sc-noise2self[autoencoder]" (for the processor alone, add '
            "--extra-index-url https://download.pytorch.org/whl/cpu)."
        )
