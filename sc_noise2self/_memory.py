"""What fits: memory and disk, asked before anything large is made."""

from __future__ import annotations

import shutil
from pathlib import Path

_OF_CONTAINERS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Where a container says what it may have, what it has, and what of that is files that were read; both versions."""


def check_fits_memory(n_cells: int, n_genes: int) -> None:
    """Raise a MemoryError that names the gigabytes if a dense layer would not fit in the memory that is free."""
    needed, free = 4 * n_cells * n_genes, available_memory()
    if needed > free:
        raise MemoryError(
            f"the layer of {n_cells} cells x {n_genes} genes takes {gigabytes(needed)} and {gigabytes(free)} of memory "
            "are free: pass write_layer=False and read genes from the factors (get.denoised, get.lazy)."
        )


def check_fits_disk(n_bytes: int, folder: Path) -> None:
    """Raise an OSError that names the gigabytes if a file would not fit on the disk of a folder."""
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise OSError(
            f"the result takes {gigabytes(n_bytes)} and {gigabytes(free)} are free in {folder}: write the factors "
            "alone (--factors, write_layer=False), or choose another folder."
        )


def available_memory() -> int:
    """Return the bytes that can be taken without swapping; what a container may have counts too, where it says so."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for folder, limit, used, cached in _OF_CONTAINERS:
        if all((folder / name).exists() for name in (limit, used, "memory.stat")):
            allowed = (folder / limit).read_text().strip()
            if allowed != "max":
                stat = dict(line.split(maxsplit=1) for line in (folder / "memory.stat").read_text().splitlines())
                # Files that were read stay in memory until it is wanted.
                free = min(free, int(allowed) - int((folder / used).read_text()) + int(stat.get(cached, 0)))
    return free


def gigabytes(n_bytes: float) -> str:
    """Return e.g. ``"8.0 GB"``."""
    return f"{n_bytes / 1e9:.1f} GB"
