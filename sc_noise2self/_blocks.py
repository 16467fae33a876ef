"""Counts that are read a block of cells at a time: from memory, from a file, or from a Dask array.

Whatever is learned from them is a sum over blocks of cells, or a row for each cell: a function of a block (`Work`), run
in threads for memory and files, on the active scheduler for Dask. A run is one pass over the counts. Sums are taken in
double precision in a fixed order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import scipy.sparse as sp

from ._counts import column_sums, row_sums
from ._memory import available_memory
from ._progress import progress_bar
from ._threads import alone, in_threads, one_blas_thread

if TYPE_CHECKING:
    import dask.array

_ENTRIES = 1 << 25  # at most, of a dense block: 13 MB of counts where a twentieth is not zero
_ROWS = 20_000  # at most, of any: products within a block are in single precision
_STRETCH, _STRETCHES = 1000, 20  # cells read in a row, and how often, where cells are wanted in random order
_BYTES = 8  # of an entry of CSR in memory
_MOST_KEPT = 0.2  # of the memory that is free, for entries that are kept
_FAN_IN = 8  # partial sums that a Dask task adds up

Out = TypeVar("Out")


def block_rows(n_genes: int) -> int:
    """Return how many cells a block has, wherever counts are, so that rounding is the same: 1, 2 or 5 times 10^n."""
    most = max(1, min(_ROWS, _ENTRIES // max(1, n_genes)))
    tens = 10 ** int(np.log10(most))
    return tens * max(step for step in (1, 2, 5) if step * tens <= most)


@dataclass(frozen=True, eq=False)
class Block:
    """Some consecutive cells: their counts, CSR float32 in canonical form without stored zeros, from number `start`."""

    counts: sp.csr_matrix
    start: int

    @property
    def cells(self) -> np.ndarray:
        return np.arange(self.start, self.start + self.counts.shape[0])


class Partial(NamedTuple):
    """What is learned from a block, or from all of them: arrays to add up, and arrays with a row for each cell."""

    sums: Sequence[np.ndarray] = ()
    rows: Sequence[np.ndarray] = ()


Work = Callable[[Block], Partial]
ToBlock = Callable[[int, Any], Block]


def block_of(start: int, rows: Any) -> Block:
    """Return the block of rows as they are stored, from the number of the first cell."""
    return Block(_canonical(rows), start)


class Chunks(ABC):
    """Counts of shape (cells, genes), read a block of cells at a time."""

    def __init__(self, shape: tuple[int, int], rows: int | None = None) -> None:
        self.shape = shape
        self._rows = block_rows(shape[1]) if rows is None else rows

    @abstractmethod
    def run(self, work: Work, to_block: ToBlock = block_of) -> Partial:
        """Return the sums over all blocks, float64, and the rows of all cells: one pass."""

    def rows(self, work: Work, widths: Sequence[int]) -> list[np.ndarray | dask.array.Array]:
        """Return the rows of all cells, float32 of these widths; those of a Dask array as Dask arrays, not computed."""
        return list(self.run(work).rows)

    def take(self, cells: np.ndarray) -> sp.csr_matrix:
        """Return the counts of some cells, by number in rising order, CSR float32."""
        return self.part(cells)

    def part(self, cells: slice | np.ndarray, genes: slice | np.ndarray = slice(None)) -> sp.csr_matrix:
        """Return the counts of some cells and genes by position, CSR float32; blocks without any are not read."""
        rows, back = np.unique(np.arange(self.shape[0])[cells], return_inverse=True)

        def chosen(block: Block) -> sp.csr_matrix:
            first, last = np.searchsorted(rows, [block.start, block.start + block.counts.shape[0]])
            return block.counts[rows[first:last] - block.start][:, genes]

        parts = [each for each in self._of_blocks(chosen, rows) if each.shape[0]]
        found = _stacked(parts) if parts else sp.csr_matrix((0, self.shape[1]), dtype=np.float32)[:, genes]
        return found if np.array_equal(back, np.arange(found.shape[0])) else found[back]

    @abstractmethod
    def _of_blocks(self, work: Callable[[Block], Any], cells: np.ndarray) -> Iterable[Any]:
        """Return in order what is made of blocks that have all of the cells, which are in rising order."""

    def shuffled(self, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, sp.csr_matrix]]:
        """Yield (cells, their counts) until all have been seen, each time those of a few random stretches."""
        stretches = rng.permutation(-(-self.shape[0] // _STRETCH))
        for i in range(0, len(stretches), _STRETCHES):
            starts = _STRETCH * np.sort(stretches[i : i + _STRETCHES])
            cells = [np.arange(start, min(start + _STRETCH, self.shape[0])) for start in starts]
            yield np.concatenate(cells), _stacked([_canonical(self.stored(each[0], each[-1] + 1)) for each in cells])

    @abstractmethod
    def stored(self, start: int, stop: int) -> Any:
        """Return some rows, sparse or dense."""

    def in_turn(self, work: Callable[[Block], Out], to_block: ToBlock = block_of) -> Iterator[Out]:
        """Yield what is made of each block, in order, read by this process."""
        starts = range(0, self.shape[0], self._rows)
        stored = ((start, self.stored(start, min(start + self._rows, self.shape[0]))) for start in starts)
        return in_threads(lambda item: work(to_block(*item)), stored)

    def of_cells(self, cells: np.ndarray) -> Chunks:
        """Return some of the cells, by number in rising order: all of these, or held in memory."""
        return self if len(cells) == self.shape[0] else InMemory(self.take(cells))

    def of_genes(self, genes: np.ndarray) -> Chunks:
        """Return some of the genes, boolean of shape (genes,)."""
        return OfGenes(self, genes)

    def keeps(self, n_entries: Callable[[Block], int]) -> bool:
        """Return whether entries that are made of blocks may be kept in memory instead of being made in every pass.

        `n_entries` says how many come of a block; three speak for all.
        """
        return False

    def like(self, blocks: np.ndarray) -> Chunks:
        """Return other counts of the same cells, where they are kept: those that `as_row` made of blocks."""
        raise NotImplementedError  # `keeps` says no

    def in_memory(self) -> sp.csr_matrix:
        """Return all counts, CSR float32."""
        return self.take(np.arange(self.shape[0]))


@dataclass(frozen=True, eq=False)
class Counts:
    """Counts wherever they are, and what a method may know of their cells and genes.

    `size` and `totals` are the molecules of each cell and gene, `n_entries` the number of counts that are not zero;
    `used`, boolean of shape (genes,) or None for all, are the genes that determine which cells are alike; `columns` are
    the columns of `obs` that a method asked for.
    """

    chunks: Chunks
    size: np.ndarray
    totals: np.ndarray
    n_entries: int
    cell_names: pd.Index
    gene_names: pd.Index
    used: np.ndarray | None = None
    columns: Mapping[str, pd.Series] = field(default_factory=dict)

    @classmethod
    def of(cls, counts: sp.csr_matrix, used: np.ndarray | None = None) -> Counts:
        """Return counts of cells and genes without names."""
        cells, genes = (pd.RangeIndex(n).astype(str) for n in counts.shape)
        return cls(InMemory(counts), row_sums(counts), column_sums(counts), counts.nnz, cells, genes, used)

    @property
    def n_used(self) -> int:
        return self.chunks.shape[1] if self.used is None else int(self.used.sum())

    def in_memory(self) -> sp.csr_matrix:
        """Return all counts, CSR float32 of shape (cells, genes)."""
        return self.chunks.in_memory()

    def part(self, counts: sp.csr_matrix, cells: np.ndarray) -> Counts:
        """Return other counts of some of the cells, by number: a part of their molecules."""
        return replace(
            self,
            chunks=InMemory(counts),
            size=row_sums(counts),
            totals=column_sums(counts),
            n_entries=counts.nnz,
            cell_names=self.cell_names[cells],
            columns={name: column.iloc[cells] for name, column in self.columns.items()},
        )


class _Local(Chunks):
    """Counts that this process reads."""

    def run(self, work: Work, to_block: ToBlock = block_of) -> Partial:
        n_blocks = -(-self.shape[0] // self._rows)
        return _gathered(progress_bar("reading counts", n_blocks, iterable=self.in_turn(work, to_block)))

    def of_genes(self, genes: np.ndarray) -> Chunks:
        columns = np.flatnonzero(genes)
        if not self.keeps(lambda block: int(genes[block.counts.indices].sum())):
            return OfGenes(self, genes)
        return self.like(self.run(lambda block: Partial(rows=[as_row(block.counts[:, columns])])).rows[0])

    def keeps(self, n_entries: Callable[[Block], int]) -> bool:
        starts = range(0, self.shape[0], self._rows)
        some = [
            block_of(i, self.stored(i, min(i + self._rows, self.shape[0]))) for i in starts[:: -(-len(starts) // 3)]
        ]
        n_each = sum(map(n_entries, some)) / sum(block.counts.shape[0] for block in some)
        return _BYTES * n_each * self.shape[0] <= _MOST_KEPT * available_memory()

    def like(self, blocks: np.ndarray) -> Chunks:
        return _InBlocks(blocks, self.shape[0], self._rows)

    def _of_blocks(self, work: Callable[[Block], Any], cells: np.ndarray) -> Iterable[Any]:
        bounds = np.searchsorted(cells, range(0, self.shape[0] + self._rows, self._rows))
        spans = [cells[first:last] for first, last in pairwise(bounds) if first < last]
        stored = ((int(own[0]), self.stored(int(own[0]), int(own[-1]) + 1)) for own in spans)
        return in_threads(lambda item: work(block_of(*item)), stored)


class InMemory(_Local):
    """A CSR matrix or a NumPy array."""

    def __init__(self, counts: np.ndarray | sp.csr_matrix, rows: int | None = None) -> None:
        super().__init__(counts.shape, rows)
        self._counts = counts

    def stored(self, start: int, stop: int) -> Any:
        x = self._counts
        if not isinstance(x, sp.csr_matrix | sp.csr_array):
            return x[start:stop]
        # SciPy's own slice copies.
        here = slice(x.indptr[start], x.indptr[stop])
        arrays = x.data[here], x.indices[here], x.indptr[start : stop + 1] - x.indptr[start]
        return sp.csr_matrix(arrays, shape=(stop - start, x.shape[1]), copy=False)

    def take(self, cells: np.ndarray) -> sp.csr_matrix:
        return _canonical(self._counts if len(cells) == self.shape[0] else self._counts[cells])

    def part(self, cells: slice | np.ndarray, genes: slice | np.ndarray = slice(None)) -> sp.csr_matrix:
        return _canonical(self._counts[cells][:, genes])

    def of_cells(self, cells: np.ndarray) -> Chunks:
        return self if len(cells) == self.shape[0] else _OfCells(self._counts, cells)


class _OfCells(_Local):
    """Some rows of a matrix, which are not copied."""

    def __init__(self, counts: np.ndarray | sp.csr_matrix, cells: np.ndarray) -> None:
        super().__init__((len(cells), counts.shape[1]))
        self._counts, self._cells = counts, cells

    def stored(self, start: int, stop: int) -> Any:
        return self._counts[self._cells[start:stop]]


class _InBlocks(_Local):
    """Counts of blocks as they were made, which are not copied into one matrix."""

    def __init__(self, blocks: np.ndarray, n_cells: int, rows: int) -> None:
        super().__init__((n_cells, blocks[0].shape[1]), rows)
        self._blocks = blocks

    def stored(self, start: int, stop: int) -> Any:
        first = start // self._rows
        found = _stacked(list(self._blocks[first : -(-stop // self._rows)]))
        if stop - start == found.shape[0]:
            return found
        return found[start - first * self._rows : stop - first * self._rows]


def as_row(counts: sp.csr_matrix) -> np.ndarray:
    """Return the counts of a block as one row of a `Partial`, for `Chunks.like`."""
    row = np.empty(1, object)
    row[0] = counts
    return row


def as_chunks(counts: Chunks | sp.csr_matrix) -> Chunks:
    """Return counts as chunks."""
    return counts if isinstance(counts, Chunks) else InMemory(counts)


class OfGenes(Chunks):
    """Some genes of other counts."""

    def __init__(self, chunks: Chunks, genes: np.ndarray) -> None:
        super().__init__((chunks.shape[0], int(genes.sum())))
        self._chunks = chunks
        self._genes = np.flatnonzero(genes)

    def run(self, work: Work, to_block: ToBlock = block_of) -> Partial:
        genes = self._genes
        return self._chunks.run(lambda block: work(Block(block.counts[:, genes], block.start)), to_block)

    def part(self, cells: slice | np.ndarray, genes: slice | np.ndarray = slice(None)) -> sp.csr_matrix:
        return self._chunks.part(cells, self._genes[genes])

    def _of_blocks(self, work: Callable[[Block], Any], cells: np.ndarray) -> Iterable[Any]:
        raise NotImplementedError  # `part` needs none

    def stored(self, start: int, stop: int) -> Any:
        return self._chunks.stored(start, stop)[:, self._genes]


class OnDisk(_Local):
    """A dataset that returns NumPy arrays or CSR matrices for slices of rows: of a `.h5ad` or zarr store.

    AnnData closes the file of a backed object where it writes it, and opens it again by its name; so does this.
    """

    def __init__(self, dataset: Any, rows: int | None = None) -> None:
        super().__init__(dataset.shape, rows)
        self._stored, self._indptr = getattr(dataset, "group", dataset), None
        self._place = (self._stored.file.filename, self._stored.name) if hasattr(self._stored, "file") else None
        with _reading("the stored matrix"):
            if dataset.dtype.kind not in "biuf":
                raise ValueError(f"it holds {dataset.dtype}, and counts are numbers")
            if hasattr(dataset, "group"):
                self._indptr = _checked_indptr(dataset.group, dataset.shape[0])

    def stored(self, start: int, stop: int) -> Any:
        with _reading(f"cells {start} to {stop - 1} of the stored matrix"):
            return _checked(self._rows_from(start, stop), (stop - start, self.shape[1]))

    def _rows_from(self, start: int, stop: int) -> Any:
        with self._opened() as stored:
            if self._indptr is None:
                return stored[start:stop]
            # anndata's own slice takes as long again for what has nothing to do with the rows.
            indptr = self._indptr[start : stop + 1]
            here = slice(int(indptr[0]), int(indptr[-1]))
            if stored is not self._stored and not np.array_equal(stored["indptr"][start : stop + 1], indptr):
                raise ValueError("its file holds others now")
            arrays = stored["data"][here], stored["indices"][here], indptr - indptr[0]
            return sp.csr_matrix(arrays, shape=(stop - start, self.shape[1]), copy=False)

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        if self._place is None or self._stored:  # of h5py it is false where its file was closed
            yield self._stored
            return
        from h5py import File

        name, path = self._place
        with File(name, "r") as file:
            yield file[path]


class OnDask(Chunks):
    """A Dask array of CSR or NumPy blocks; runs on whatever scheduler is active."""

    def __init__(self, array: dask.array.Array, rows: int | None = None) -> None:
        super().__init__(array.shape, rows)
        chunks = array.chunks[0]
        if array.numblocks[1] > 1 or 0 in chunks or any(n % self._rows for n in chunks[:-1]):
            blocks_each = max(1, round(float(np.median(chunks)) / self._rows))
            array = array.rechunk((blocks_each * self._rows, -1))
        self._array = array
        self._starts = [int(start) for start in np.cumsum([0, *array.chunks[0][:-1]])]

    def run(self, work: Work, to_block: ToBlock = block_of) -> Partial:
        import dask

        add, parts = dask.delayed(_gathered), self._parts(work, to_block)
        while len(parts) > 1:
            parts = [add(parts[i : i + _FAN_IN]) for i in range(0, len(parts), _FAN_IN)]
        with one_blas_thread():
            return parts[0].compute()

    def rows(self, work: Work, widths: Sequence[int]) -> list[np.ndarray | dask.array.Array]:
        import dask.array as da

        parts = list(zip(self._parts(work), self._array.chunks[0], strict=True))
        return [
            da.concatenate([da.from_delayed(part[1][i], (n, width), dtype=np.float32) for part, n in parts])
            for i, width in enumerate(widths)
        ]

    def _of_blocks(self, work: Callable[[Block], Any], cells: np.ndarray) -> Iterable[Any]:
        import dask

        ends = np.searchsorted(cells, np.cumsum(self._array.chunks[0]))
        parts = self._parts(lambda block: Partial(rows=[work(block)]))
        wanted = [part for part, (first, last) in zip(parts, pairwise([0, *ends]), strict=True) if first < last]
        with one_blas_thread():
            return [found.rows[0] for found in dask.compute(*wanted)]

    def stored(self, start: int, stop: int) -> Any:
        return _checked(self._array[start:stop].compute(), (stop - start, self.shape[1]))

    def _parts(self, work: Work, to_block: ToBlock = block_of) -> list[Any]:
        """Return what is learned from each chunk, not computed yet."""
        import dask

        of_chunk, shared = dask.delayed(_of_chunk), dask.delayed(work, traverse=False)
        chunks = zip(self._starts, self._array.to_delayed()[:, 0], strict=True)
        return [of_chunk(shared, to_block, start, chunk, self._rows) for start, chunk in chunks]


def _of_chunk(work: Work, to_block: ToBlock, start: int, rows: Any, step: int) -> Partial:
    """Return what is learned from the blocks of a chunk, in one thread: the scheduler has its own."""
    starts, rows = range(0, rows.shape[0], step), _checked(rows, rows.shape)
    return alone(lambda: _gathered(work(to_block(start + i, rows[i : i + step])) for i in starts))


def _gathered(partials: Iterable[Partial]) -> Partial:
    """Return the sums of the sums, float64, and the rows one after another."""
    sums: list[np.ndarray] = []
    rows: list[Sequence[np.ndarray]] = []
    for partial in partials:
        sums = sums or [np.zeros(np.shape(each)) for each in partial.sums]
        for total, each in zip(sums, partial.sums, strict=True):
            np.add(total, each, out=total)
        rows.append(partial.rows)
    return Partial(sums, [_stacked(column) for column in zip(*rows, strict=True)])


def _stacked(parts: Sequence[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    return sp.vstack(parts, format="csr") if sp.issparse(parts[0]) else np.concatenate(parts)


def _canonical(rows: Any) -> sp.csr_matrix:
    """Return CSR float32 without repeated entries and stored zeros; copied only where that is needed."""
    out = sp.csr_matrix(rows, dtype=np.float32)
    if not out.has_canonical_format:
        out = out.copy()
        out.sum_duplicates()
    if out.nnz and not out.data.all():
        out = out.copy()
        out.eliminate_zeros()
    return out


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Say in one sentence that a file is damaged, whichever library found it, in whichever way."""
    try:
        yield
    except (MemoryError, PermissionError):
        raise
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{what} cannot be read: {why}.") from error


def _checked_indptr(stored: Any, n_rows: int) -> np.ndarray:
    """Return where the rows of CSR are; refuse what cannot be right: to follow it would read other memory."""
    indptr, n_values = np.asarray(stored["indptr"]), stored["data"].shape[0]
    if indptr.dtype.kind not in "iu" or indptr.shape != (n_rows + 1,) or stored["indices"].shape != (n_values,):
        raise ValueError(f"its indptr, indices and data do not fit {n_rows} rows")
    if indptr[0] != 0 or indptr[-1] != n_values or (indptr[1:] < indptr[:-1]).any():
        raise ValueError(f"its indptr does not rise from 0 to the number of its values, {n_values}")
    # zarr reads a chunk that is gone as zeros, and does not write one of zeros: more than one a row is no row of CSR.
    for name in ("data", "indices"):
        if n_values > n_rows and _n_missing(stored[name]):
            raise ValueError(f"{_n_missing(stored[name])} chunks of its {name} are missing")
    return indptr


def _n_missing(array: Any) -> int:
    """Return how many chunks of an array of zarr are not there."""
    if not hasattr(array, "nchunks_initialized"):
        return 0
    n_there, shards = int(array.nchunks_initialized), getattr(array, "shards", None)
    if shards is not None and n_there == -(-array.shape[0] // shards[0]):
        return 0  # an earlier zarr counts shards
    return max(0, int(array.nchunks) - n_there)  # of a shard that the array ends in all chunks are counted


def _checked(rows: Any, shape: tuple[int, int]) -> Any:
    """Return rows that were read from outside if they are whole: SciPy follows a wrong index out of memory."""
    if rows.shape != shape:
        raise ValueError(f"there are {rows.shape[0]} x {rows.shape[1]} values instead of {shape[0]} x {shape[1]}")
    if sp.issparse(rows):
        rows.check_format(full_check=True)
    return rows
