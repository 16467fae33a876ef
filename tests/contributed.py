"""The denoiser that `docs/contributing.md` shows, taken from the page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "contributing.md"


def blocks() -> list[str]:
    """Return the Python blocks of the page."""
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


def _executed() -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "contributed_page"}
    exec(compile(blocks()[0], str(PAGE), "exec", dont_inherit=True), names)
    return names


Centroids = _executed()["Centroids"]
