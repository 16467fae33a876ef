"""Randomness: one way to turn `random_state` into a generator, and a generator into the key of a split.

Seeds and generators are taken as scanpy's `random_state` and `rng` take them, but None, which cannot be repeated.

A split draws a key alone from the generator: its random numbers belong to a cell and a gene, not to turns
(`sc_noise2self._dealing`).
"""

from __future__ import annotations

from numbers import Integral

import numpy as np

RandomState = int | np.random.Generator | np.random.RandomState
"""A whole number from 0, or a generator that is drawn from, NumPy's old kind too."""


def as_generator(random_state: RandomState) -> np.random.Generator:
    """Return a generator for a seed; a generator is returned as it is, and so moves on when it is used."""
    if isinstance(random_state, np.random.Generator):
        return random_state
    if isinstance(random_state, np.random.RandomState):
        return np.random.default_rng([int(word) for word in random_state.randint(1 << 32, size=4, dtype=np.uint64)])
    if isinstance(random_state, bool) or not isinstance(random_state, Integral):
        raise TypeError(
            f"random_state is {random_state!r}: pass a whole number, e.g. random_state=0, or a numpy.random.Generator."
        )
    if random_state < 0:
        raise ValueError(f"random_state is {random_state}: a seed is 0 or more.")
    if random_state >= 1 << 63:
        raise ValueError(f"random_state is {random_state}: a seed is below 2**63, which is what files keep.")
    return np.random.default_rng(int(random_state))


def as_key(rng: np.random.Generator) -> int:
    """Return a key, drawn from the generator, that stands for all random numbers of one split."""
    return int(rng.integers(1 << 64, dtype=np.uint64))


def random_sample(n: int, most: int, rng: np.random.Generator) -> np.ndarray:
    """Return the numbers of at most so many of n cells, drawn at random, in rising order."""
    return np.sort(rng.choice(n, min(n, most), replace=False))


def random_groups(n: int, n_groups: int, rng: np.random.Generator) -> np.ndarray:
    """Return the random group of each of n cells or genes, as even as can be, shape (n,)."""
    return rng.permutation(n) % n_groups
