"""The mixture under which what was observed is likeliest: the weights of denoisers, and priors of empirical Bayes."""

from __future__ import annotations

import numpy as np

_STEPS = 200  # of expectation maximisation
_LEAST = 1e-12  # probability of what a member holds impossible


def mixture_weights(likelihood: np.ndarray, times: np.ndarray | None = None) -> np.ndarray:
    """Return the weights of members, shape (members,), that make observations likeliest; they sum to 1.

    Takes the likelihood of each observation by each member, shape (members, observations), and how often each was made,
    None for once: a mixture of denoisers is that of the probabilities that they gave to held-out molecules, the prior
    of a parameter that of its values' likelihoods (nonparametric empirical Bayes, Kiefer & Wolfowitz 1956). A concave
    problem; expectation maximisation climbs it without a step size.
    """
    times = np.ones(likelihood.shape[1]) if times is None else times
    weights, likelihood = np.full(len(likelihood), 1 / len(likelihood)), likelihood + _LEAST
    for _ in range(_STEPS):
        weights = weights * (likelihood @ (times / (weights @ likelihood))) / times.sum()
    return weights
