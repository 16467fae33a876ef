"""Warnings that are also written down with the result they belong to."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_written: ContextVar[list[str] | None] = ContextVar("written", default=None)


def caveat(message: str, *, stacklevel: int) -> None:
    """Warn, and add the message to what `written_down` gathers; `stacklevel` 1 is the caller's own line."""
    written = _written.get()
    if written is not None and message not in written:
        written.append(message)
    warnings.warn(message, UserWarning, stacklevel=stacklevel + 1)


@contextmanager
def written_down(messages: list[str]) -> Iterator[None]:
    """Add the messages of `caveat` to a list while the block runs."""
    token = _written.set(messages)
    try:
        yield
    finally:
        _written.reset(token)
