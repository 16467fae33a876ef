"""Denoisers on count matrices; none of them knows AnnData."""
