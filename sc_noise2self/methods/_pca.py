"""PCA regression, its components weighted by what held-out molecules say they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import numpy as np
import scipy.sparse as sp

from .._blocks import Block, Chunks, Counts, InMemory, Partial
from .._checks import bounded, check_one_of
from .._transform import Transform, TransformName
from ..partitions import Fold
from ._base import Learned, Learner, Method, Sample
from ._components import (
    Components,
    folds_of,
    halves_of,
    learn_components,
    noise_edge,
    shrinkage,
    worth_from,
    worth_of_halves,
)
from ._profiles import LowRankProfiles, profiles_in_blocks, scaled_to

if TYPE_CHECKING:
    from .._model import State

MOST_COMPONENTS = 100
"""Components that are learned beyond the mean profile unless another number is asked for."""

_COMPARED_CELLS = 5_000  # that settings are compared on
_FURTHER_PASSES = 2  # over all cells, for components that start from those of some cells
_SCALED = 20_000_000  # dense entries of the cells that all but the last round of scaling genes look at
_TITLES: dict[TransformName, str] = {
    "log1p": "PCA of log1p",
    "sqrt": "PCA of square roots",
    "none": "PCA of counts",
}


@dataclass(frozen=True, kw_only=True)
class PCA(Method):
    """PCA regression with shrunken components, in the one transform that gains most: fast, a good first look.

    Parameters
    ----------
    transform
        Scale on which the model is linear: `"log1p"`, `"sqrt"` or `"none"`; `"auto"` compares all three, and an
        ensemble averages them.
    n_components
        Components learned beyond the mean profile; their weights decide how many matter. None takes 100, or as many as
        there are.

    Notes
    -----
    Noise2Self (Batson & Royer 2019), section 3.2. A component is weighted by its worth, the regression of held-out
    molecules on it, shrunk by one of five strengths or cut; see `docs/method.md`.
    """

    name: ClassVar[str] = "pca"
    title: ClassVar[str] = "PCA"
    needs_memory: ClassVar[bool] = False
    can_transfer: ClassVar[bool] = True

    transform: TransformName | Literal["auto"] = "auto"
    n_components: int | None = None

    def __post_init__(self) -> None:
        check_one_of("transform", self.transform, ("auto", *get_args(TransformName)))

    def checked(self, counts: Counts) -> Self:
        """See `Method`."""
        return replace(self, n_components=n_components_of(self.n_components, counts))

    def learners(self, counts: Counts) -> Sequence[Learner]:
        """See `Method`."""
        transforms = get_args(TransformName) if self.transform == "auto" else (self.transform,)
        assert self.n_components is not None  # checked
        return [PCALearner(name, self.n_components, counts.used) for name in transforms]


def n_components_of(value: int | None, counts: Counts) -> int:
    """Return the number of components: as asked, or the usual one cut to what the counts have."""
    n_cells, n_genes = counts.chunks.shape
    return bounded("n_components", value, MOST_COMPONENTS, n_cells, n_genes if counts.used is None else counts.n_used)


@dataclass(frozen=True)
class Shrinkage:
    """How components are weighted: shrunk by a strength at the depth of a half, or cut.

    Attributes
    ----------
    strength
        Strength of `shrinkage`, 1 being least squares; None gives weight 1 to components worth more than half, 0 to the
        rest.
    """

    strength: float | None

    def __str__(self) -> str:
        """Return it in words."""
        return "cut" if self.strength is None else f"shrinkage {self.strength:g}"

    def weights(self, worth: np.ndarray, noise: float) -> np.ndarray:
        """Return the weights of components, where noise is `noise` times that of the halves that tell their worth."""
        if self.strength is None:
            return (shrinkage(worth, noise) > 0.5).astype(np.float64)
        return shrinkage(worth, noise * self.strength)


_SETTINGS = tuple(Shrinkage(strength) for strength in (2.0, None, 1.0, 4.0, 8.0))


@dataclass(frozen=True, eq=False)
class _Fit:
    """Components of one half, the half, and the worth of components by fold, shape (folds, k)."""

    components: Components
    half: Fold
    worth: np.ndarray


class PCALearner(Learner):
    """PCA regression in one transform; it is set by how its components are weighted (`Shrinkage`).

    Weights are learned on halves and carried to the depth of all molecules, where noise is half as large.
    """

    enough_cells: int | None = _COMPARED_CELLS
    settings = _SETTINGS

    def __init__(self, transform: TransformName, n_components: int, used: np.ndarray | None = None) -> None:
        self.name = f"pca {transform}"
        self._transform: TransformName = transform
        self._n_components = n_components
        self._used = used
        self._fits: list[_Fit] = []
        self._gene_scales: list[np.ndarray] = []
        self._edge: float | None = None
        self._model: PCAModel | None = None

    def learn(self, half: Fold, rng: np.random.Generator) -> None:
        """See `Learner`."""
        (components,) = learn_components(
            half.seen, self._transform, self._n_components, rng, n_passes=3, used=self._used
        )
        products = components.products(half.seen, half.held_out, folds_of(half.cells))
        self._fits.append(_Fit(components, half, worth_from(*products)))

    def learn_all(self, chunks: Chunks, keys: Sequence[int], rng: np.random.Generator) -> None:
        """See `Learner`. Each half starts from what some of its own cells gave, which has seen nothing of the other."""
        fits = []
        for key, *pair in zip(keys, self._fits[::2], self._fits[1::2], strict=True):
            starts = [fit.components.used_vectors for fit in pair]
            learned = self._learn(chunks, rng, starts, _FURTHER_PASSES, halves_of([key]))
            worths = worth_of_halves(learned, chunks, key)
            fits += [_Fit(own, fit.half, worth) for own, fit, worth in zip(learned, pair, worths, strict=True)]
        self._fits = fits
        self._edge = noise_edge(fits[0].components, chunks, halves_of(keys[:1]))

    def forget(self) -> None:
        """See `Learner`."""
        self._fits.clear()
        self._gene_scales.clear()

    def predict(self, half: int, setting: Shrinkage, seen: sp.csr_matrix, cells: np.ndarray) -> LowRankProfiles:
        """See `Learner`."""
        scale = self._gene_scales[half] if self._gene_scales else None
        weights = self._weights(half, setting, cells)
        return self._fits[half].components.weighted_profiles(seen, weights, scale).scaled(n_rounds=int(scale is None))

    def settle(self, setting: Shrinkage, sample: Sample) -> None:
        """See `Learner`: that is the scale of genes."""

        def totals(cells: np.ndarray, parts: list[sp.csr_matrix]) -> Partial:
            return Partial(
                [
                    fit.components.weighted_profiles(seen, self._weights(i, setting, cells)).scale_cells()
                    for i, (fit, seen) in enumerate(zip(self._fits, parts, strict=True))
                ]
            )

        shares = [fit.components.gene_share for fit in self._fits]
        self._gene_scales = [
            scaled_to(share * total.sum(), total, np.ones_like(share))
            for share, total in zip(shares, sample.run(totals).sums, strict=True)
        ]

    def refit(self, counts: Counts, setting: Shrinkage, rng: np.random.Generator) -> LowRankProfiles:
        """See `Learner`. The components start from those of a half."""
        starts = [self._fits[0].components.used_vectors]
        (components,) = self._learn(counts.chunks, rng, starts, _FURTHER_PASSES + 1)
        weights = self._full_weights(setting)
        profiles = _profiles(components, counts, weights)
        self._model = PCAModel(components, weights, np.asarray(profiles.gene_scale))
        return profiles

    def learned(self, setting: Shrinkage) -> Learned:
        """See `Learner`."""
        worth, fit, edge = self._worth(), self._fits[0], self._edge
        if edge is None:

            def parts(block: Block) -> list[sp.csr_matrix]:
                return [block.counts, fit.half.held_out[block.cells]]

            edge = noise_edge(fit.components, InMemory(fit.half.seen), parts)
        rank, title = int((shrinkage(worth, 0.5) > 0.5).sum()), _TITLES[self._transform]
        values = {
            "worth": worth,
            "weights": self._full_weights(setting),
            "singular_values": fit.components.singular_values,
            "noise_edge": edge,
        }
        return Learned(title, f"{title} ({rank} components worth more than noise, {setting})", rank, values)

    def state(self) -> State:
        """See `Learner`."""
        assert self._model is not None  # refitted
        return self._model.state()

    def _learn(self, chunks: Chunks, rng: np.random.Generator, starts: Any, n_passes: int, *parts: Any) -> Any:
        given = {"parts": parts[0]} if parts else {}
        return learn_components(
            chunks, self._transform, self._n_components, rng, n_passes=n_passes, used=self._used, starts=starts, **given
        )

    def _weights(self, half: int, setting: Shrinkage, cells: np.ndarray) -> np.ndarray:
        """Return the weight of each component in each cell; a fold's own are learned from the other fold."""
        weights = np.array([setting.weights(fold, noise=1) for fold in self._fits[half].worth])
        return weights[1 - folds_of(cells)]

    def _full_weights(self, setting: Shrinkage) -> np.ndarray:
        """Return the weight of each component in a fit to all molecules, shape (k,)."""
        return setting.weights(self._worth(), noise=0.5)

    def _worth(self) -> np.ndarray:
        return np.mean([fit.worth.mean(axis=0) for fit in self._fits], axis=0)


def _profiles(components: Components, counts: Counts, weights: np.ndarray) -> LowRankProfiles:
    """Return the denoised profiles of all cells, in two passes over the counts or a few more.

    All rounds of scaling genes but the last look at some of the cells, the last at all.
    """
    chunks = counts.chunks
    step = max(1, chunks.shape[0] * chunks.shape[1] // _SCALED)
    some = components.weighted_profiles(chunks.take(np.arange(0, chunks.shape[0], step)), weights).scaled()

    def unscaled(block: Block, gene_scale: np.ndarray) -> LowRankProfiles:
        return components.weighted_profiles(block.counts, weights, gene_scale)

    return profiles_in_blocks(chunks, counts.size, some, unscaled)


@dataclass(frozen=True, eq=False)
class PCAModel:
    """A fitted PCA regression, which denoises other cells too.

    Attributes
    ----------
    components
        Components that all molecules gave.
    weights
        Weight of each component, shape (k,).
    gene_scale
        Scale of genes that gave them their totals, shape (genes,).
    """

    components: Components
    weights: np.ndarray
    gene_scale: np.ndarray

    @property
    def name(self) -> str:
        """E.g. ``"pca log1p"``."""
        return f"pca {self.components.transform.name}"

    def predict(self, counts: sp.csr_matrix, codes: np.ndarray | None = None) -> LowRankProfiles:
        """Return the denoised profiles of cells, CSR of shape (cells, genes); genes keep the scale of the fit."""
        found = self.components.weighted_profiles(counts, self.weights, self.gene_scale)
        return found.checked("the output of the PCA").scaled(n_rounds=0)

    def learned(self) -> Learned:
        """Return what is worth writing down."""
        rank, title = int((self.weights > 0.5).sum()), _TITLES[self.components.transform.name]
        return Learned(title, f"{title} ({rank} components worth more than noise)", rank, {"weights": self.weights})

    def state(self) -> State:
        """Return what a model file keeps of it."""
        from .._model import State

        own = self.components
        values = {"transform": own.transform.name, "target": own.transform.target}
        arrays = {
            "gene_weights": own.gene_weights,
            "mean": own.mean,
            "components": own.vectors,
            "used": own.used,
            "gene_share": own.gene_share,
            "weights": self.weights,
            "gene_scale": self.gene_scale,
        }
        return State("pca", values, arrays)

    @classmethod
    def from_state(cls, state: State, device: str) -> Self:
        """Return the model that a state was made of."""
        values, arrays = state.values, state.arrays
        components = Components(
            Transform(values["transform"], values["target"]),
            arrays["gene_weights"],
            arrays["used"],
            arrays["mean"],
            arrays["components"],
            np.zeros(arrays["components"].shape[1], np.float32),
            arrays["gene_share"],
        )
        return cls(components, arrays["weights"], arrays["gene_scale"])
