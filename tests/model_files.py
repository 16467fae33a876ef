"""Model files taken apart and put together again, whatever is in them."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np


def read_parts(path) -> tuple[dict, dict]:
    """Return the JSON and the arrays of a model file."""
    with np.load(path) as parts:
        arrays = dict(parts)
    return json.loads(arrays.pop("model").tobytes()), arrays


def write_parts(path, text: dict | bytes, arrays: dict) -> None:
    """Write a model file from its JSON and its arrays; bytes are written as they are."""
    text = text if isinstance(text, bytes) else json.dumps(text).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, value in {"model": np.frombuffer(text, np.uint8), **arrays}.items():
            content = io.BytesIO(value if isinstance(value, bytes) else b"")
            if not isinstance(value, bytes):
                np.save(content, value)
            archive.writestr(f"{name}.npy", content.getvalue())


def claims(shape, dtype="<f4", stored=b"") -> bytes:
    """Return an array in NumPy's format that says what it likes of itself."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(content, {"descr": dtype, "fortran_order": False, "shape": shape})
    return content.getvalue() + stored
