"""Mix the noisy input back into a denoised profile (Noise2Self, Batson & Royer 2019, section 4.2).

A J-invariant prediction and the observation have independent errors, so a combination beats both. For counts it is
conjugate: a rate with mean m (the prediction) and squared coefficient of variation phi, Gamma distributed, given a
Poisson count x has the expectation m (1 + phi x) / (1 + phi m). With phi = 0 the denoiser explains the gene and the
count adds nothing; the larger phi, the more the cell's own count weighs. Held-out molecules say what phi is
(`sc_noise2self.methods._dispersion`), and how much of the count is news to a prediction that it has helped to make:
`Dispersion.evidence`, which phi is multiplied by here.
"""

from __future__ import annotations

import numpy as np

from .._blocks import Block, Chunks, InMemory, Partial
from .._counts import row_sums
from ._dispersion import Dispersion
from ._profiles import MixedProfiles, Profiles


def scales_of_cells(chunks: Chunks, profiles: Profiles, dispersion: Dispersion) -> tuple[np.ndarray, np.ndarray]:
    """Return what gives mixed cells their sizes, shape (cells,), and the weight of a cell's own count, shape (genes,).

    The weight is phi m / (1 + phi m), its mean over cells: 0 where nothing is mixed in. One pass over the counts.
    """

    def of_block(block: Block) -> Partial:
        own = profiles.of_cells(block.cells)
        ones, share = np.ones(len(block.cells), np.float32), np.zeros(chunks.shape[1])
        scale = MixedProfiles(own, InMemory(block.counts), dispersion, ones).scales_to(row_sums(block.counts))
        for _, m in own.blocks():
            scaled = m * dispersion.mixing(m)
            share += (scaled / (1 + scaled)).sum(axis=0)
        return Partial([share], [scale])

    (share,), (scale,) = chunks.run(of_block)
    return scale, share / chunks.shape[0]
