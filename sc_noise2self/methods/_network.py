"""The autoencoder's network: sampled molecules of a cell in, one output per gene out. It needs PyTorch.

A cell enters by its principal scores, which were learned beforehand and stay fixed: the first layer of an autoencoder
on genes has most of its parameters and little to learn from a few thousand cells.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._blocks import Counts
from .._memory import available_memory
from .._threads import read_ahead

_BYTES = 6  # an entry, on the device
_MOST_OF_DEVICE = 0.5  # of the memory that is free, for counts
_FEW = 4  # molecules dealt by inverting their distribution, which is faster than binomial draws


@dataclass(frozen=True, eq=False)
class Entries:
    """Stored counts of a batch of cells, on the device.

    Values are gathered by `index_select`, which takes a quarter of the time of an index in brackets.
    """

    rows: Tensor  # cell in the batch and gene of each entry, int64
    genes: Tensor
    values: Tensor  # counts, float32; zeros may be stored
    starts: Tensor  # first entry of each cell, int64
    lengths: Tensor  # entries of each cell, int64
    batch: Tensor | None  # code of each cell's batch, int64
    n_genes: int
    hidden: Tensor | None = None  # boolean of shape (cells, genes); counts of hidden genes are 0

    def sizes(self) -> Tensor:
        """Return the molecules of each cell, shape (cells,)."""
        # `unsafe` leaves out checks that would wait for the device.
        return torch.segment_reduce(self.values, "sum", lengths=self.lengths, unsafe=True)

    def dense(self) -> Tensor:
        """Return the counts, dense of shape (cells, genes)."""
        out = torch.zeros(len(self.starts), self.n_genes, device=self.values.device)
        out.view(-1).index_copy_(0, self.places(), self.values)
        return out

    def places(self) -> Tensor:
        """Return where each entry is in dense counts, row after row."""
        return self.rows * self.n_genes + self.genes

    def split(self, low: float, high: float) -> tuple[Entries, Entries]:
        """Deal each molecule to the first of two parts with a probability that each cell draws between two bounds."""
        shares = torch.empty(len(self.starts), device=self.values.device).uniform_(low, high)
        shares = shares.index_select(0, self.rows)
        few = torch.where(self.values <= _FEW, self.values, 0)
        # How many of few: a uniform number less the probabilities of 0, of 1, and so on, until it is below zero.
        odds = shares / (1 - shares)
        left, mass, most = torch.rand_like(few), (1 - shares) ** few, odds * (few + 1)
        first = torch.zeros_like(few)
        for k in range(_FEW):
            left.sub_(mass, alpha=1 / math.factorial(k))  # mass is the probability of k, times k!
            first += left >= 0
            mass.mul_(torch.sub(most, odds, alpha=k + 1))
        first = torch.minimum(first, few) + torch.binomial(self.values - few, shares)
        return replace(self, values=first), replace(self, values=self.values - first)

    def hide(self, low: float, high: float) -> tuple[Entries, Entries]:
        """Return cells without some genes, and these alone; each cell draws the probability of a gene to be hidden."""
        shares = torch.empty(len(self.starts), 1, device=self.values.device).uniform_(low, high)
        hidden = torch.rand(len(shares), self.n_genes, device=self.values.device) < shares
        is_hidden = hidden.view(-1).index_select(0, self.places())
        seen, held_out = self.values.masked_fill(is_hidden, 0), self.values.masked_fill(~is_hidden, 0)
        return replace(self, values=seen, hidden=hidden), replace(self, values=held_out, hidden=hidden)


class Process(NamedTuple):
    """Which of several processes that train together this is: each has its share of the cells."""

    number: int = 0
    of: int = 1

    def own(self, cells: np.ndarray) -> np.ndarray:
        """Return this process's share of some cells, as many as every other's: one may come twice."""
        return np.resize(cells, -(-len(cells) // self.of) * self.of)[self.number :: self.of]


class Packed(NamedTuple):
    """Counts of consecutive cells as they go to the device, 16-bit where that suffices."""

    data: np.ndarray
    genes: np.ndarray
    lengths: np.ndarray
    n_molecules: float

    @classmethod
    def of(cls, counts: sp.csr_matrix) -> Packed:
        """Return what the device keeps of counts."""
        data = counts.data.astype(np.int16 if counts.data.max(initial=0) < 2**15 else np.int32)
        genes = np.require(counts.indices, np.int32, "W")  # PyTorch refuses arrays that are read-only
        return cls(data, genes, np.diff(counts.indptr).astype(np.int64), float(data.sum(dtype=np.int64)))


class DeviceCounts:
    """Counts of consecutive cells as tensors on the device: 6 bytes an entry, or 8.

    No more than `n_entries` are stored; `batch` has the code of each cell's batch, shape (cells,).
    """

    def __init__(
        self, parts: Iterable[Packed], n_entries: int, n_genes: int, batch: np.ndarray | None, device: torch.device
    ) -> None:
        self.device, self.process, self.n_genes = device, Process(), n_genes
        self.data = torch.empty(n_entries, dtype=torch.int16, device=device)
        self.genes = torch.empty(n_entries, dtype=torch.int32, device=device)
        lengths, n_stored, self.n_molecules = [], 0, 0.0
        for part in parts:
            here = slice(n_stored, n_stored + len(part.data))
            if part.data.dtype != np.int16:
                self.data = self.data.int()
            self.data[here], self.genes[here] = torch.from_numpy(part.data), torch.from_numpy(part.genes)
            lengths.append(part.lengths)
            n_stored, self.n_molecules = here.stop, self.n_molecules + part.n_molecules
        self.lengths = np.concatenate(lengths)
        self._lengths = torch.from_numpy(self.lengths).to(device)
        self._starts = self._lengths.cumsum(0) - self._lengths
        self._batch = None if batch is None else torch.from_numpy(batch.astype(np.int64)).to(device)

    @classmethod
    def of(cls, counts: sp.csr_matrix, batch: np.ndarray | None, device: torch.device) -> DeviceCounts:
        """Return the counts of one matrix."""
        return cls([Packed.of(counts)], counts.nnz, counts.shape[1], batch, device)

    def __len__(self) -> int:
        return len(self.lengths)

    def batches(self, rng: np.random.Generator, batch_size: int) -> Iterator[Entries]:
        """Yield the cells that hold a molecule, in random order."""
        order = rng.permutation(self._trained())
        ends, cells = np.cumsum(self.lengths[order]), torch.from_numpy(order).to(self.device)
        for start in range(0, len(order), batch_size):
            stop = min(start + batch_size, len(order))
            yield self._entries(cells[start:stop], int(ends[stop - 1] - (ends[start - 1] if start else 0)))

    def __getitem__(self, cells: np.ndarray) -> Entries:
        """Return the entries of these cells."""
        return self._entries(torch.from_numpy(cells).to(self.device), int(self.lengths[cells].sum()))

    def _trained(self) -> np.ndarray:
        """Return this process's share of the cells that hold a molecule."""
        return self.process.own(np.flatnonzero(self.lengths))

    def _entries(self, cells: Tensor, n_entries: int) -> Entries:
        """Return the entries of cells, as many as there are: their number is told so that nobody waits for it."""
        lengths = self._lengths[cells]
        starts = lengths.cumsum(0) - lengths
        rows = torch.repeat_interleave(lengths, output_size=n_entries)
        positions = torch.arange(n_entries, device=self.device) + (self._starts[cells] - starts).index_select(0, rows)
        genes, values = (stored.index_select(0, positions) for stored in (self.genes, self.data))
        batch = None if self._batch is None else self._batch[cells]
        return Entries(rows, genes.long(), values.float(), starts, lengths, batch, self.n_genes)


class Aside(NamedTuple):
    """Molecules that are not trained on: numbers of cells, rising, and what they have less, CSR."""

    cells: np.ndarray
    counts: sp.csr_matrix

    def taken_from(self, counts: sp.csr_matrix, cells: np.ndarray) -> sp.csr_matrix:
        """Return the counts of cells without them."""
        _, rows, found = np.intersect1d(cells, self.cells, assume_unique=True, return_indices=True)
        if not len(rows):
            return counts
        at = sp.csr_matrix((np.ones(len(rows), np.float32), (rows, found)), (counts.shape[0], len(self.cells)))
        return counts - at @ self.counts


class StreamedCounts:
    """Counts that are not on the device, trained on a pool of random stretches of cells at a time."""

    def __init__(self, counts: Counts, batch: np.ndarray | None, device: torch.device, aside: Aside) -> None:
        self.device, self.process = device, Process()
        self.n_molecules = float(counts.totals.sum())
        self._chunks, self._batch, self._aside = counts.chunks, batch, aside

    def batches(self, rng: np.random.Generator, batch_size: int) -> Iterator[Entries]:
        """Yield the cells that hold a molecule, in random order within a pool; the next pool is read meanwhile."""
        for cells, pool in read_ahead(self._chunks.shuffled(rng)):
            batch = None if self._batch is None else self._batch[cells]
            counts = DeviceCounts.of(self._aside.taken_from(pool, cells), batch, self.device)
            counts.process = self.process
            yield from counts.batches(rng, batch_size)


AnyCounts = DeviceCounts | StreamedCounts


def counts_of_all(counts: Counts, batch: np.ndarray | None, device: torch.device, aside: Aside) -> AnyCounts:
    """Return counts of all cells to train on: on a GPU where they fit, else streamed."""
    if not _fits(counts, device):
        return StreamedCounts(counts, batch, device, aside)
    parts = counts.chunks.in_turn(lambda block: Packed.of(aside.taken_from(block.counts, block.cells)))
    return DeviceCounts(parts, counts.n_entries, counts.chunks.shape[1], batch, device)


def _fits(counts: Counts, device: torch.device) -> bool:
    """Whether a device holds all counts; a processor does not, so that cells come in one order wherever counts are."""
    return device.type != "cpu" and _BYTES * counts.n_entries <= _MOST_OF_DEVICE * free_memory(device)


def free_memory(device: torch.device) -> int:
    """Return the bytes of memory that are free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


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
        values = torch.log1p(entries.values * to_depth.index_select(0, entries.rows))
        values = values * self.gene_weights.index_select(0, entries.genes)
        scores = F.embedding_bag(entries.genes, self.components, entries.starts, mode="sum", per_sample_weights=values)
        if entries.hidden is not None:
            scores = scores + entries.hidden.float() @ (self.mean[:, None] * self.components)
        return (scores - self.center) / self.scale


class Network(nn.Module):
    """Scores -> hidden -> width -> hidden -> genes, with linear ways around both hidden layers.

    `start` is the output of every gene before training, shape (genes,). The decoder's hidden layer, whose units are
    factors of the result, sees the batch, and each batch has an offset for every gene.
    """

    in_bfloat16 = False  # whether the layer of genes, which nearly all operations are of, is computed in bfloat16

    def __init__(self, scores: PrincipalScores, width: int, n_hidden: int, start: np.ndarray, n_batches: int) -> None:
        super().__init__()
        n_inputs = scores.components.shape[1]
        self.scores, self.n_batches = scores, n_batches
        self.encoder = nn.Linear(n_inputs, n_hidden)
        self.code = nn.Linear(n_hidden, width)
        self.code_linear = nn.Linear(n_inputs, width, bias=False)
        self.decoder = nn.Linear(width + n_batches, n_hidden)
        self.decoder_linear = nn.Linear(width, n_hidden, bias=False)
        self.genes = nn.Linear(n_hidden, len(start))
        self.batch_offsets = nn.Parameter(torch.zeros(n_batches, len(start)), requires_grad=n_batches > 0)
        with torch.no_grad():
            self.genes.bias.copy_(torch.from_numpy(start.astype(np.float32)))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Network:
        """Return the network, ready to predict, whose parameters `arrays` returned."""
        state = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in arrays.items()}
        scores = PrincipalScores(*(arrays[f"scores.{name}"] for name in PrincipalScores.NAMES))
        (width, n_hidden), n_batches = arrays["code.weight"].shape, len(arrays["batch_offsets"])
        with torch.device("meta"):  # draws no random numbers
            network = cls(scores, width, n_hidden, arrays["genes.bias"], n_batches)
        network.load_state_dict(state, assign=True)
        return network

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
        return self.code(F.relu(self.encoder(scores))) + self.code_linear(scores)

    def factors(self, entries: Entries) -> Tensor:
        """Return what the output is linear in, shape (cells, hidden + batches)."""
        code = self.bottleneck(entries)
        batch = F.one_hot(entries.batch, self.n_batches).float() if entries.batch is not None else code[:, :0]
        hidden = F.relu(self.decoder(torch.cat([code, batch], dim=1))) + self.decoder_linear(code)
        return torch.cat([hidden, batch], dim=1)

    def forward(self, entries: Entries) -> Tensor:
        """Return the outputs, shape (cells, genes)."""
        factors = self.factors(entries)
        with torch.autocast(factors.device.type, torch.bfloat16, self.in_bfloat16):
            out = self.genes(factors[:, : self.genes.in_features])
        return out if entries.batch is None else out + self.batch_offsets[entries.batch]

    def loadings(self) -> np.ndarray:
        """Return the weights of the factors, the constant, and 1s for a level: shape (genes, hidden + batches + 2)."""
        bias = self.genes.bias[:, None]
        loadings = torch.cat([self.genes.weight, self.batch_offsets.T, bias, torch.ones_like(bias)], dim=1)
        return loadings.detach().cpu().numpy()
