"""Warnings that are also written down with the result they belong to."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_PACKAGE = __name__.partition(".")[0]
_recorded: ContextVar[list[str] | None] = ContextVar("recorded", default=None)


def warn(message: str) -> None:
    """Warn whoever called the package, at the line that did, and add the message to what is being recorded."""
    recorded = _recorded.get()
    if recorded is not None and message not in recorded:
        recorded.append(message)
    warnings.warn(message, UserWarning, stacklevel=_outside() + 1)


@contextmanager
def recorded_warnings() -> Iterator[list[str]]:
    """Yield a list that the messages of `warn` are added to while the block runs."""
    messages: list[str] = []
    token = _recorded.set(messages)
    try:
        yield messages
    finally:
        _recorded.reset(token)


def _outside() -> int:
    """Return how many frames above the caller of this function lies the first that is not the package's own."""
    frame, level = inspect.currentframe(), -1
    while frame is not None and str(frame.f_globals.get("__name__")).partition(".")[0] == _PACKAGE:
        frame, level = frame.f_back, level + 1
    return level
