"""Randomness: one way to turn `random_state` into a generator, and random numbers that belong to a place.

A generator's numbers belong to turns, so what an entry of a matrix gets depends on which entries were drawn before it.
`random_words` belong to a cell and a gene instead: any piece of a matrix gets the same, on any machine. They are the
outputs of SplitMix64 (Steele, Lea & Flood 2014), a hash of a counter: each cell has a stream of its own, and the gene
is the counter.
"""

from __future__ import annotations

from numbers import Integral

import numpy as np

RandomState = int | np.random.Generator
"""A whole number from 0, or a generator that is drawn from."""

_STEP = np.uint64(0x9E3779B97F4A7C15)  # the golden ratio, as in SplitMix64
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFTS = np.uint64(30), np.uint64(27), np.uint64(31)


def as_generator(random_state: RandomState) -> np.random.Generator:
    """Return a generator for a seed; a generator is returned as it is, and so moves on when it is used.

    Raises
    ------
    TypeError
        If `random_state` is neither a whole number nor a `numpy.random.Generator`.
    ValueError
        If it is negative, or larger than a file can keep.
    """
    if isinstance(random_state, np.random.Generator):
        return random_state
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
    """Return a key, drawn from the generator, that stands for all random words of one split."""
    return int(rng.integers(1 << 64, dtype=np.uint64))


def row_keys(key: int, rows: np.ndarray) -> np.ndarray:
    """Return the start of each row's stream, uint64 of shape (rows,)."""
    return _mixed(np.uint64(key) + (rows.astype(np.uint64) + np.uint64(1)) * _STEP)


def random_words_at(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return 64 random bits for each entry: the output of its row's stream that its column counts.

    Parameters
    ----------
    rows
        From `row_keys`, one for each entry.
    columns
        Of each entry.
    """
    words = columns.astype(np.uint64)
    words += np.uint64(1)
    words *= _STEP
    words += rows
    return _mixed(words)


def random_words(words: np.ndarray) -> np.ndarray:
    """Return 64 further bits for each entry, from those it had last."""
    return _mixed(words + _STEP)


def random_uniforms(words: np.ndarray) -> np.ndarray:
    """Return numbers in (0, 1) from the upper 53 bits of words."""
    return ((words >> np.uint64(11)) + 0.5) * 2.0**-53


def _mixed(words: np.ndarray) -> np.ndarray:
    """Return SplitMix64's output function of each word, in place."""
    other = words >> _SHIFTS[0]
    words ^= other
    words *= _FACTORS[0]
    np.right_shift(words, _SHIFTS[1], out=other)
    words ^= other
    words *= _FACTORS[1]
    np.right_shift(words, _SHIFTS[2], out=other)
    words ^= other
    return words
