"""The autoencoder's network: sampled molecules of a cell in, one output per gene out. It needs PyTorch.

A cell enters by its principal scores, which were learned beforehand and stay fixed: the first layer of an autoencoder
on genes has most of its parameters and little to learn from a few thousand cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._blocks import Counts as AllCounts

_FEW = 4  # molecules dealt one by one, which is faster than binomial draws


@dataclass(frozen=True, eq=False)
class Entries:
    """Stored counts of a batch of cells, on the device."""

    rows: Tensor  # cell in the batch and gene of each entry, int64
    genes: Tensor
    values: Tensor  # counts, float32; zeros may be stored
    starts: Tensor  # first entry of each cell, int64
    batch: Tensor | None  # code of each cell's batch, int64
    n_genes: int
    hidden: Tensor | None = None  # boolean of shape (cells, genes); counts of hidden genes are 0

    def sizes(self) -> Tensor:
        """Return the molecules of each cell, shape (cells,)."""
        return torch.zeros(len(self.starts), device=self.values.device).index_add_(0, self.rows, self.values)

    def dense(self) -> Tensor:
        """Return the counts, dense of shape (cells, genes)."""
        out = torch.zeros(len(self.starts), self.n_genes, device=self.values.device)
        out[self.rows, self.genes] = self.values
        return out

    def split(self, low: float, high: float) -> tuple[Entries, Entries]:
        """Deal each molecule to the first of two parts with a probability that each cell draws between two bounds."""
        shares = torch.empty(len(self.starts), device=self.values.device).uniform_(low, high)[self.rows]
        first = torch.where(torch.rand_like(self.values) < shares, self.values, 0)  # right for counts of 0 and 1
        few = torch.nonzero((self.values > 1) & (self.values <= _FEW)).squeeze(1)
        tosses = torch.rand(len(few), _FEW, device=self.values.device) < shares[few, None]
        tosses &= torch.arange(_FEW, device=self.values.device) < self.values[few, None]
        first[few] = tosses.sum(dim=1).float()
        many = torch.nonzero(self.values > _FEW).squeeze(1)
        first[many] = torch.binomial(self.values[many], shares[many])
        return replace(self, values=first), replace(self, values=self.values - first)

    def hide(self, low: float, high: float) -> tuple[Entries, Entries]:
        """Return cells without some genes, and these alone; each cell draws the probability of a gene to be hidden."""
        shares = torch.empty(len(self.starts), 1, device=self.values.device).uniform_(low, high)
        hidden = torch.rand(len(shares), self.n_genes, device=self.values.device) < shares
        is_hidden = hidden[self.rows, self.genes]
        seen, held_out = self.values.masked_fill(is_hidden, 0), self.values.masked_fill(~is_hidden, 0)
        return replace(self, values=seen, hidden=hidden), replace(self, values=held_out, hidden=hidden)


class Counts:
    """A CSR count matrix as tensors, 16-bit where they suffice: on the device, or pinned on the host if too large.

    `batch` has the code of each cell's batch, shape (cells,).
    """

    def __init__(self, counts: sp.csr_matrix, batch: np.ndarray | None, device: torch.device) -> None:
        if not counts.has_sorted_indices:
            counts = counts.sorted_indices()  # else SciPy may sort the indices that are shared here in place
        largest = counts.data.max(initial=0)
        self.data = torch.from_numpy(counts.data.astype(np.int16 if largest < 2**15 else np.int32))
        self.genes = torch.from_numpy(np.require(counts.indices, np.int32, "W"))  # PyTorch refuses read-only arrays
        self.batch = None if batch is None else torch.from_numpy(batch.astype(np.int64))
        self.starts = counts.indptr[:-1].astype(np.int64)
        self.lengths = np.diff(counts.indptr).astype(np.int64)
        self.n_genes, self.n_molecules, self.device = int(counts.shape[1]), float(counts.sum()), device
        if device.type == "cuda":
            size = self.data.nbytes + self.genes.nbytes
            fits = size < 0.5 * torch.cuda.mem_get_info(device)[0]
            self.data, self.genes = (x.to(device) if fits else x.pin_memory() for x in (self.data, self.genes))

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def n_trained(self) -> int:
        """Cells that hold a molecule."""
        return int((self.lengths > 0).sum())

    def n_batches(self, batch_size: int) -> int:
        """Return how many batches an epoch has."""
        return -(-self.n_trained // batch_size)

    def batches(self, rng: np.random.Generator, batch_size: int) -> Iterator[Entries]:
        """Yield the cells that hold a molecule, in random order."""
        order = rng.permutation(np.flatnonzero(self.lengths > 0))
        for start in range(0, len(order), batch_size):
            yield self[order[start : start + batch_size]]

    def __getitem__(self, cells: np.ndarray) -> Entries:
        """Return the entries of these cells, gathered where the counts lie."""
        stored, lengths = self.data.device, torch.from_numpy(self.lengths[cells])
        ends = torch.cumsum(lengths, 0)
        starts, total = ends - lengths, int(ends[-1])
        shift = torch.from_numpy(self.starts[cells]) - starts
        rows = torch.repeat_interleave(torch.arange(len(cells), device=stored), lengths.to(stored), output_size=total)
        positions = torch.arange(total, device=stored) + shift.to(stored)[rows]

        found = (rows, self.genes[positions], self.data[positions], starts)
        rows, genes, data, starts = (x.to(self.device, non_blocking=True) for x in found)
        batch = None
        if self.batch is not None:
            batch = self.batch[torch.from_numpy(cells)].to(self.device, non_blocking=True)
        return Entries(rows, genes.long(), data.float(), starts, batch, self.n_genes)


class StreamedCounts:
    """Counts that are not in memory, trained on a pool of random stretches of cells at a time.

    `instead` are numbers of some cells, rising, and the counts to train on in place of their own.
    """

    def __init__(
        self, counts: AllCounts, batch: np.ndarray | None, device: torch.device, instead: tuple[np.ndarray, Any]
    ) -> None:
        self.device = device
        self.n_trained = int((counts.size > 0).sum())
        self.n_molecules = float(counts.totals.sum())
        self._chunks, self._batch, self._instead = counts.chunks, batch, instead

    def n_batches(self, batch_size: int) -> int:
        """Return how many batches an epoch has, nearly: cells without molecules are not known by pool."""
        return sum(-(-n_cells // batch_size) for n_cells in self._chunks.pools())

    def batches(self, rng: np.random.Generator, batch_size: int) -> Iterator[Entries]:
        """Yield the cells that hold a molecule, in random order within a pool."""
        for own_cells, own_counts in self._chunks.shuffled(rng):
            cells, counts = self._trained(own_cells, own_counts)
            batch = None if self._batch is None else self._batch[cells]
            yield from Counts(counts, batch, self.device).batches(rng, batch_size)

    def _trained(self, cells: np.ndarray, counts: sp.csr_matrix) -> tuple[np.ndarray, sp.csr_matrix]:
        """Return a pool, the counts to train on in place of some cells' own."""
        replaced, instead = self._instead
        both, rows, found = np.intersect1d(cells, replaced, assume_unique=True, return_indices=True)
        if not len(both):
            return cells, counts
        others = np.delete(np.arange(len(cells)), rows)
        return np.concatenate([cells[others], both]), sp.vstack([counts[others], instead[found]], format="csr")


AnyCounts = Counts | StreamedCounts


class PrincipalScores(nn.Module):
    """The fixed first layer: log1p of a cell at one depth, genes weighted, on principal components.

    It is made of the values of `NAMES`, in this order. All scores are divided by `scale`: the first one enters with a
    standard deviation of 1, the others in proportion, so that a component of noise stays small.
    """

    NAMES = ("components", "gene_weights", "center", "depth", "mean", "share", "scale")
    components: Tensor  # V, shape (genes, k); 0 for genes that do not determine the scores
    gene_weights: Tensor  # those of `Components`
    center: Tensor  # scores of the mean profile, shape (k,)
    depth: Tensor  # that cells are brought to, in molecules
    mean: Tensor  # transformed, weighted mean profile: the value that a hidden gene is given
    share: Tensor  # of all molecules that each gene has: it tells a cell's size where genes are hidden
    scale: Tensor

    def __init__(self, *values: np.ndarray | float) -> None:
        super().__init__()
        for name, value in zip(self.NAMES, values, strict=True):
            self.register_buffer(name, torch.from_numpy(np.array(value, dtype=np.float32)))

    def forward(self, entries: Entries) -> Tensor:
        """Return the scores, shape (cells, k)."""
        sizes = entries.sizes()
        if entries.hidden is not None:
            sizes = sizes / (1 - entries.hidden.float() @ self.share).clamp_min(1e-3)
        to_depth = self.depth / sizes.clamp_min(1)
        values = torch.log1p(entries.values * to_depth[entries.rows]) * self.gene_weights[entries.genes]
        scores = F.embedding_bag(entries.genes, self.components, entries.starts, mode="sum", per_sample_weights=values)
        if entries.hidden is not None:
            scores = scores + entries.hidden.float() @ (self.mean[:, None] * self.components)
        return (scores - self.center) / self.scale


class Network(nn.Module):
    """Scores -> hidden -> width -> hidden -> genes, with linear ways around both hidden layers.

    `start` is the output of every gene before training, shape (genes,). The decoder's hidden layer, whose units are
    factors of the result, sees the batch, and each batch has an offset for every gene. Dropout is the encoder's alone.
    """

    def __init__(
        self, scores: PrincipalScores, width: int, n_hidden: int, start: np.ndarray, n_batches: int, dropout: float
    ) -> None:
        super().__init__()
        n_inputs = scores.components.shape[1]
        self.scores, self.n_batches, self.dropout = scores, n_batches, dropout
        self.encoder = nn.Linear(n_inputs, n_hidden)
        self.code = nn.Linear(n_hidden, width)
        self.code_linear = nn.Linear(n_inputs, width, bias=False)
        self.decoder = nn.Linear(width + n_batches, n_hidden)
        self.decoder_linear = nn.Linear(width, n_hidden, bias=False)
        self.genes = nn.Linear(n_hidden, len(start))
        self.batch_offsets = nn.Parameter(torch.zeros(n_batches, len(start)))
        with torch.no_grad():
            self.genes.bias.copy_(torch.from_numpy(start.astype(np.float32)))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Network:
        """Return the network, ready to predict, whose parameters `arrays` returned."""
        state = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in arrays.items()}
        scores = PrincipalScores(*(arrays[f"scores.{name}"] for name in PrincipalScores.NAMES))
        (width, n_hidden), n_batches = arrays["code.weight"].shape, len(arrays["batch_offsets"])
        with torch.device("meta"):  # draws no random numbers
            network = cls(scores, width, n_hidden, arrays["genes.bias"], n_batches, dropout=0)
        network.load_state_dict(state, assign=True)
        return network.eval()

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all parameters by name, those of the fixed first layer among them, float32."""
        return {name: value.cpu().numpy() for name, value in self.state_dict().items()}

    @property
    def n_factors(self) -> int:
        """Number of factors that the output is linear in."""
        return self.genes.in_features + self.n_batches

    def bottleneck(self, entries: Entries) -> Tensor:
        """Return the code of each cell, shape (cells, width)."""
        scores = self.scores(entries)
        hidden = F.dropout(F.relu(self.encoder(scores)), self.dropout, self.training)
        return self.code(hidden) + self.code_linear(scores)

    def factors(self, entries: Entries) -> Tensor:
        """Return what the output is linear in, shape (cells, hidden + batches)."""
        code = self.bottleneck(entries)
        batch = F.one_hot(entries.batch, self.n_batches).float() if entries.batch is not None else code[:, :0]
        hidden = F.relu(self.decoder(torch.cat([code, batch], dim=1))) + self.decoder_linear(code)
        return torch.cat([hidden, batch], dim=1)

    def forward(self, entries: Entries) -> Tensor:
        """Return the outputs, shape (cells, genes)."""
        factors = self.factors(entries)
        out = self.genes(factors[:, : self.genes.in_features])
        return out if entries.batch is None else out + self.batch_offsets[entries.batch]

    def loadings(self) -> np.ndarray:
        """Return the weights of the factors, the constant, and 1s for a level: shape (genes, hidden + batches + 2)."""
        bias = self.genes.bias[:, None]
        loadings = torch.cat([self.genes.weight, self.batch_offsets.T, bias, torch.ones_like(bias)], dim=1)
        return loadings.detach().cpu().numpy()
