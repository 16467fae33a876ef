"""Bars for what lasts."""

from __future__ import annotations

from typing import Any

from scanpy import settings
from tqdm.auto import tqdm


def progress_bar(name: str, total: int, **options: Any) -> tqdm:
    """Return a bar for a stage that lasts over two seconds, silent below verbosity 2 (info)."""
    return tqdm(total=total, desc=name, delay=2, disable=int(settings.verbosity) < 2, leave=False, **options)
