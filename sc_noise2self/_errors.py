"""Errors of the package's own kind."""

from __future__ import annotations


class NotThere(KeyError, ValueError):
    """A name that is not there; whoever catches either kind catches it, and its message stands without quotes."""

    __str__ = Exception.__str__
