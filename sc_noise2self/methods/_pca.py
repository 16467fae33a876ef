"""PCA regression, its components weighted by what held-out molecules say they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np
import scipy.sparse as sp

from .._blocks import Block, Counts, Partial
from .._checks import bounded, check_one_of
from .._counts import depth_of
from .._model import State
from .._split import cell_folds
from .._transform import Transform, TransformName
from ..partitions import Fold
from ._base import Learned, Learner, Method, Sample
from ._components import (
    Components,
    learn_components,
    learn_halves,
    noise_edge,
    noise_squares,
    shrinkage,
    worth_from,
)
from ._populations import Populations
from ._profiles import LowRankProfiles, profiles_in_blocks, ratio

_MOST_COMPONENTS = 100  # learned beyond the mean profile unless another number is asked for
_COMPARED_TRANSFORMS: Sequence[TransformName] = ("log1p", "none")  # of "auto"; sqrt was best on none of nine data sets
_COMPARED_CELLS = 5_000  # that settings are compared on
_FURTHER_PASSES = 2  # over all cells, for components that start from those of some cells
SCALED = 100_000_000  # dense entries of the cells that populations, and all but the last scale of genes, look at
_KEPT = ("gene_weights", "used", "mean", "gene_share")  # of components, in a model file
_TITLES = {"log1p": "PCA of log1p", "sqrt": "PCA of square roots", "none": "PCA of counts"}


@dataclass(frozen=True, kw_only=True)
class PCA(Method):
    """PCA regression with shrunken components, in the transform that gains more: fast, a good first look.

    Parameters
    ----------
    transform
        Scale on which the model is linear: `"log1p"`, `"sqrt"` or `"none"`; `"auto"` compares log1p and none, between
        which the square root lies, and an ensemble averages them.
    n_components
        Components learned beyond the mean profile; their weights decide how many matter. None takes 100, or as many as
        there are.

    Notes
    -----
    Noise2Self (Batson & Royer 2019), section 3.2. A component is weighted by its worth, the regression of held-out
    molecules on it, shrunk by one of six strengths or cut; see `docs/method.md`.
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
        return replace(self, n_components=n_components_of(self.n_components, counts))

    def learners(self, counts: Counts) -> Sequence[Learner]:
        transforms = _COMPARED_TRANSFORMS if self.transform == "auto" else (self.transform,)
        assert self.n_components is not None  # checked
        return [PCALearner(name, self.n_components, counts.used) for name in transforms]


def n_components_of(value: int | None, counts: Counts) -> int:
    """Return the number of components: as asked, or the usual one cut to what the counts have."""
    return bounded("n_components", value, _MOST_COMPONENTS, counts.chunks.shape[0], counts.n_used)


@dataclass(frozen=True)
class Shrinkage:
    """How components are weighted: by `shrinkage` of a strength at the depth of a half, 1 being least squares, or cut.

    A cut, of strength None, gives weight 1 to components worth more than half, 0 to the rest.
    """

    strength: float | None

    def __str__(self) -> str:
        return "cut" if self.strength is None else f"shrinkage {self.strength:g}"

    def weights(self, worth: np.ndarray, noise: float) -> np.ndarray:
        """Return the weights of components, where noise is `noise` times that of the halves that tell their worth."""
        if self.strength is None:
            return (shrinkage(worth, noise) > 0.5).astype(np.float64)
        return shrinkage(worth, noise * self.strength)


@dataclass(frozen=True, eq=False)
class _Fit:
    """Components of one half, the half, the worth of components by fold, shape (folds, k), and genes' settled scale."""

    components: Components
    half: Fold
    worth: np.ndarray
    gene_scale: np.ndarray | None = None

    def profiles(self, setting: Shrinkage, seen: sp.csr_matrix, cells: np.ndarray) -> LowRankProfiles:
        """Return the profiles of cells, which have no scale yet; a fold's weights are learned from the other fold."""
        weights = np.array([setting.weights(fold, noise=1) for fold in self.worth])
        return self.components.weighted_profiles(seen, weights[1 - cell_folds(cells)], self.gene_scale)


class PCALearner(Learner):
    """PCA regression in one transform; it is set by how its components are weighted (`Shrinkage`).

    Weights are learned on halves and carried to the depth of all molecules, where noise is half as large.
    """

    enough_cells: int | None = _COMPARED_CELLS
    learns_alone = False
    settings = tuple(Shrinkage(strength) for strength in (2.0, None, 1.0, 1.4, 2.8, 4.0, 8.0))

    def __init__(self, transform: TransformName, n_components: int, used: np.ndarray | None) -> None:
        super().__init__(f"pca {transform}")
        self._title = _TITLES[transform]
        self._options: dict[str, Any] = {"transform": transform, "n_components": n_components, "used": used}
        self._edge: float | None = None

    def learn(self, half: Fold, rng: np.random.Generator) -> None:
        components = learn_components(half.seen, rng=rng, n_passes=3, **self._options)
        products = components.products(half.seen, half.held_out, cell_folds(half.cells))
        self._fits.append(_Fit(components, half, worth_from(*products)))

    def learn_all(self, counts: Counts, keys: Sequence[int]) -> None:
        """Start each half from what some of its own cells gave, which has seen nothing of the other half."""
        fits, depth, self._edge = [], depth_of(counts.size) / 2, None
        for key, *pair in zip(keys, self._fits[::2], self._fits[1::2], strict=True):
            about: dict[str, Any] = {"key": key, "depth": depth, "n_passes": _FURTHER_PASSES}
            starts = [fit.components.used_vectors for fit in pair]
            learned, worths, edge = learn_halves(counts.chunks, starts=starts, **about, **self._options)
            self._edge = edge if self._edge is None else self._edge
            fits += [_Fit(own, fit.half, worth) for own, fit, worth in zip(learned, pair, worths, strict=True)]
        self._fits = fits

    def predict(self, half: int, setting: Shrinkage, seen: sp.csr_matrix, cells: np.ndarray) -> LowRankProfiles:
        fit = self._fits[half]
        return fit.profiles(setting, seen, cells).balanced(n_rounds=int(fit.gene_scale is None))

    def settle(self, setting: Shrinkage, sample: Sample) -> None:
        """Learn the scale of genes."""
        fits = [replace(fit, gene_scale=None) for fit in self._fits]

        def totals(cells: np.ndarray, parts: list[sp.csr_matrix]) -> Partial:
            return Partial(
                [fit.profiles(setting, seen, cells).scale_cells() for fit, seen in zip(fits, parts, strict=True)]
            )

        found = zip(fits, sample.run(totals).sums, strict=True)
        self._fits = [
            replace(fit, gene_scale=ratio(fit.components.gene_share * total.sum(), total)) for fit, total in found
        ]

    def refit(self, counts: Counts, setting: Shrinkage, rng: np.random.Generator) -> LowRankProfiles:
        """Return the profiles, the components starting from those of a half, in two passes or a few more.

        All rounds of scaling genes but the last look at some of the cells, the last at all.
        """
        chunks, weights = counts.chunks, self._full_weights(setting)
        about: dict[str, Any] = {"start": self._fits[0].components.used_vectors, "depth": depth_of(counts.size)}
        components = learn_components(chunks, rng=rng, n_passes=_FURTHER_PASSES + 1, **about, **self._options)
        step = max(1, chunks.shape[0] * chunks.shape[1] // SCALED)
        counts_of_some = chunks.take(np.arange(0, chunks.shape[0], step))
        some = components.weighted_profiles(counts_of_some, weights).balanced().refined(counts_of_some, self.refinement)

        def scores(block: Block) -> np.ndarray:
            return components.weighted_profiles(block.counts, weights).scores

        profiles = profiles_in_blocks(chunks, counts.size, some, scores)
        self.models = [PCAModel(components, weights, profiles.gene_scale, profiles.populations)]
        return profiles

    def learned(self, setting: Shrinkage) -> Learned:
        worth, fit, edge = self._worth(), self._fits[0], self._edge
        if edge is None:
            edge = noise_edge(noise_squares(fit.components, fit.half.seen, fit.half.held_out), len(fit.half.cells))
        rank, title = int((shrinkage(worth, 0.5) > 0.5).sum()), self._title
        values = {
            "worth": worth,
            "weights": self._full_weights(setting),
            "singular_values": fit.components.singular_values,
            "noise_edge": edge,
        }
        found = f"{rank} components" if rank < len(worth) else f"all {rank} components tried"
        return Learned(title, f"{title} ({found} worth more than noise, {setting})", rank, values)

    def _full_weights(self, setting: Shrinkage) -> np.ndarray:
        """Return the weight of each component in a fit to all molecules, shape (k,)."""
        return setting.weights(self._worth(), noise=0.5)

    def _worth(self) -> np.ndarray:
        return np.mean([fit.worth.mean(axis=0) for fit in self._fits], axis=0)


@dataclass(frozen=True, eq=False)
class PCAModel:
    """A fitted PCA regression, which denoises other cells too: weights of components, scale of genes, populations."""

    components: Components
    weights: np.ndarray
    gene_scale: np.ndarray
    populations: Populations

    @property
    def name(self) -> str:
        """E.g. ``"pca log1p"``."""
        return f"pca {self.components.transform.name}"

    def predict(self, counts: sp.csr_matrix, codes: np.ndarray | None = None) -> LowRankProfiles:
        """Return the denoised profiles of cells, CSR of shape (cells, genes); genes keep the scale of the fit."""
        found = self.components.weighted_profiles(counts, self.weights, self.gene_scale)
        return found.checked("the output of the PCA").of_populations(self.populations)

    def learned(self) -> Learned:
        """Return what is worth writing down."""
        rank, title = int((self.weights > 0.5).sum()), _TITLES[self.components.transform.name]
        return Learned(title, f"{title} ({rank} components of a weight above 1/2)", rank, {"weights": self.weights})

    def state(self) -> State:
        """Return what a model file keeps of it."""
        own = self.components
        values, arrays = self.populations.state()
        values |= {"transform": own.transform.name, "target": own.transform.target}
        arrays |= {"components": own.vectors, "weights": self.weights, "gene_scale": self.gene_scale}
        return State("pca", values, arrays | {name: getattr(own, name) for name in _KEPT})

    @classmethod
    def from_state(cls, state: State, device: str) -> Self:
        """Return the model that a state was made of."""
        arrays, kept = state.arrays, {name: state.arrays[name] for name in _KEPT}
        vectors, transform = arrays["components"], Transform(state.values["transform"], state.values["target"])
        unknown = np.zeros(vectors.shape[1], np.float32)
        components = Components(transform=transform, vectors=vectors, singular_values=unknown, **kept)
        return cls(components, arrays["weights"], arrays["gene_scale"], Populations.from_state(state))
