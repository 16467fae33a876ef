"""Bars for what lasts."""

from __future__ import annotations

from typing import Any

from scanpy import settings
from tqdm.auto import tqdm


def progress_bar(name: str, total: int, **options: Any) -> tqdm:
    """Return a bar that says what is being done and how long it will take, and goes when it is done.

    It is shown where that lasts over five seconds, or two from scanpy's verbosity 2 (info); never at 0 (error).
    """
    verbosity = int(settings.verbosity)
    delay = 5 if verbosity < 2 else 2
    return tqdm(total=total, desc=name, delay=delay, disable=verbosity < 1, leave=False, **options)
